"""Prefixes: against attention written out, with masks, caches, grouped heads and both softmaxes."""

from __future__ import annotations

import math

import pytest
import torch
from models import batch, bert, gpt2, llama, logits, qwen, vit

from sparing.core.errors import RequestError
from sparing.weights import installed
from sparing.weights.adapters import SparseAdapter, adapt_
from sparing.weights.prefix import Prefix, sizes
from sparing.weights.switching import delete_

both = pytest.mark.parametrize("zero_start", [True, False])


def adapted(model, zero_start=True, **options):
    chosen = {"kind": "prefix", "length": 3, "score": "random", "zero_start": zero_start, **options}
    adapt_(model, SparseAdapter(**chosen), data=[batch(model)])
    generator = torch.Generator().manual_seed(1)
    for part in installed.parts(model, "default").values():
        for _, factor in part.named_factors():
            factor.values.data.normal_(generator=generator)
    return model


def reference(query, key, value, prefix, mask, scaling):
    """(B, H, S, d) in float64, one softmax or two, by the definition."""
    heads = query.shape[1]
    shaped = [
        factor.matrix().view(factor.shape[0], -1, prefix.head_dim).transpose(0, 1)
        for factor in (prefix.key, prefix.value)
    ]
    first_key, first_value = (pair.repeat_interleave(heads // pair.shape[0], 0) for pair in shaped)
    key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    on_tokens = torch.einsum("bhsd,bhtd->bhst", query, key) * scaling
    on_tokens = on_tokens.masked_fill(~mask, -math.inf)
    on_prefix = torch.einsum("bhsd,hpd->bhsp", query, first_key) * scaling
    if prefix.shared_softmax:
        share = torch.cat([on_prefix, on_tokens], -1).softmax(-1)
        own, tokens = share.split([on_prefix.shape[-1], on_tokens.shape[-1]], -1)
    else:
        own, tokens = on_prefix.softmax(-1), on_tokens.softmax(-1)
    return tokens @ value + torch.einsum("bhsp,hpd->bhsd", own, first_value)


@both
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_attention_with_more_keys(zero_start, attention, padded, causal):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = adapted(llama(attn_implementation=attention), zero_start).double()
    module = model.model.layers[0].self_attn
    module.is_causal = causal
    prefix = installed.parts(model, "default")["model.layers.0.self_attn"]
    assert isinstance(prefix, Prefix)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 4, dtype=torch.float64, generator=generator)
    key, value = torch.randn(2, 2, 2, 5, 4, dtype=torch.float64, generator=generator)
    seen = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    if causal:
        seen = seen.tril()
    if padded:
        seen[1, :, :, 3:] = False
    given = None if attention == "sdpa" and not padded else seen
    if given is not None and attention == "eager":
        given = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e30)
    function = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    output, _ = function(module, query, key, value, given, scaling=0.5)
    expected = reference(query, key, value, prefix, seen, 0.5).transpose(1, 2)
    torch.testing.assert_close(output, expected)


@both
@pytest.mark.parametrize("build", [llama, gpt2, qwen])
def test_a_cache_makes_no_difference(zero_start, build):
    model = adapted(build(), zero_start)
    ids = batch(model)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        first = model(input_ids=ids[:, :5], use_cache=True)
        cache, found = first.past_key_values, [first.logits]
        for at in range(5, ids.shape[1]):
            step = model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache, found = step.past_key_values, [*found, step.logits]
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-5)
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    cached, plain = (
        model.generate(ids[:1], use_cache=use_cache, **settings) for use_cache in (True, False)
    )
    assert cached.equal(plain)


@both
def test_padding_of_others_makes_no_difference(zero_start):
    model = adapted(bert(), zero_start)
    ids = batch(model)["input_ids"][:2]
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask).logits
        alone = model(input_ids=ids[1:, :4]).logits
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


def test_the_implementation_comes_back_with_the_last_prefix():
    model = bert()
    before = model.config._attn_implementation
    adapted(model)
    adapt_(model, SparseAdapter(kind="mam", score="random", length=2, width=2), name="more")
    delete_(model, "default")
    assert model.config._attn_implementation == f"sparing_prefix_{before}"
    delete_(model, "more")
    assert model.config._attn_implementation == before


def test_other_implementations_and_layers_are_refused():
    model = vit()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(RequestError, match=r"sdpa, eager.*flex_attention"):
        adapted(model)
    assert model.config._attn_implementation == "flex_attention"
    with pytest.raises(RequestError, match="cannot tell the heads"):
        sizes(torch.nn.Linear(2, 2))


def test_a_prefix_shows_only_where_it_acts():
    model = adapted(llama())
    other = llama()
    assert not logits(model).allclose(logits(other))
    assert logits(other).equal(logits(llama()))
