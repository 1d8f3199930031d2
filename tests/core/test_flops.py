from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparing.core.errors import RequestError
from sparing.core.flops import Call, Product, Static, count, matmul_flops, register

Made = tuple[Any, Callable[[], Tensor]]
IDS = torch.arange(40).reshape(2, 20)


def llama(**changes: Any) -> Made:
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        **changes,
    )
    model = transformers.LlamaForCausalLM(config)
    return model, lambda: model(input_ids=IDS, labels=IDS).loss


def gpt2() -> Made:
    config = transformers.GPT2Config(
        vocab_size=61,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    return model, lambda: model(input_ids=IDS, labels=IDS).loss


def bert() -> Made:
    config = transformers.BertConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = transformers.BertForMaskedLM(config)
    return model, lambda: model(input_ids=IDS, labels=IDS).loss


def vit() -> Made:
    config = transformers.ViTConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        num_labels=5,
    )
    model = transformers.ViTForImageClassification(config)
    pixels, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 3])
    return model, lambda: model(pixels, labels=labels).loss


FAMILIES = [llama, gpt2, bert, vit]


def measured(loss: Callable[[], Tensor]) -> tuple[int, int]:
    """What torch's own counter sees, forward and backward, with attention as plain products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        value = loss()
    assert forward.get_total_flops() > 0
    with FlopCounterMode(display=False) as backward:
        if value.requires_grad:
            value.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def assert_close(static: Static, loss: Callable[[], Tensor]) -> None:
    forward, backward = measured(loss)
    assert static.forward == pytest.approx(forward, rel=0.01)
    assert static.backward == pytest.approx(backward, rel=0.01)
    assert static.total == static.forward + static.backward
    assert static.forward == sum(f for f, _ in static.by_module.values())
    assert static.backward == sum(b for _, b in static.by_module.values())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_training_agrees_with_torchs_counter(
    family: Callable[[], Made], attention: str
) -> None:
    model, loss = family()
    model.set_attn_implementation(attention)
    static = count(model, loss)
    assert_close(static, loss)
    assert static.backward > 1.9 * static.forward
    assert static.uncounted == ()


def _is_last_block(name: str) -> bool:
    return any(part in name for part in ("layers.1.", "h.1.", "layer.1."))


@pytest.mark.parametrize(
    "trained",
    [
        pytest.param(_is_last_block, id="the last block"),
        pytest.param(lambda name: not _is_last_block(name), id="all but the last block"),
        pytest.param(lambda name: name.endswith("bias"), id="biases"),
        pytest.param(lambda name: "norm" in name or "ln_" in name, id="norms"),
        pytest.param(
            lambda name: "embed" in name or "wte" in name or "wpe" in name, id="embeddings"
        ),
        pytest.param(lambda name: "v_proj" in name or "value" in name, id="values"),
        pytest.param(lambda name: "q_proj" in name or "query" in name, id="queries"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_parts_cost_only_what_backward_needs(
    family: Callable[[], Made], trained: Callable[[str], bool]
) -> None:
    model, loss = family()
    whole = count(model, loss)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
    static = count(model, loss)
    assert_close(static, loss)
    assert static.forward == whole.forward
    assert static.backward < whole.backward


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_trained_has_no_backward(family: Callable[[], Made]) -> None:
    model, loss = family()
    model.requires_grad_(False)
    static = count(model, loss)
    assert static.forward == pytest.approx(measured(loss)[0], rel=0.01)
    assert static.backward == 0


def test_a_tied_head_costs_as_much_as_a_free_one_and_embeddings_nothing() -> None:
    tied, tied_loss = llama(tie_word_embeddings=True)
    free, free_loss = llama(tie_word_embeddings=False)
    static = count(tied, tied_loss)
    assert_close(static, tied_loss)
    assert static == count(free, free_loss)
    assert static.by_module["lm_head"] == (
        matmul_flops(40, 48, 61),
        2 * matmul_flops(40, 48, 61),
    )
    assert "model.embed_tokens" not in static.by_module


def test_keys_of_grouped_heads_count_once_per_query_head() -> None:
    model, loss = llama()
    attention = count(model, loss).by_module["model.layers.0.self_attn"]
    scores_and_values = 2 * 2 * 6 * 2 * 20 * 20 * 8  # products, mul+add, heads, batch, S, S, dim
    assert attention == (scores_and_values, 2 * scores_and_values)


def test_attention_over_a_cache_counts_the_keys_in_it() -> None:
    model, _ = llama()
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
    static = count(
        model,
        lambda: model(input_ids=IDS[:, :1], past_key_values=cache, use_cache=True).logits,
    )
    assert static.by_module["model.layers.0.self_attn"][0] == 2 * 2 * 2 * 48 * 21


def test_what_the_loss_does_not_depend_on_has_no_backward() -> None:
    config = transformers.BertConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = transformers.BertModel(config)

    def loss() -> Tensor:
        output: Tensor = model(input_ids=IDS).last_hidden_state
        return output.square().mean()

    static = count(model, loss)
    assert_close(static, loss)
    assert static.by_module["pooler.dense"] == (matmul_flops(2, 48, 48), 0)


def test_counting_the_loss_of_an_output_or_of_a_tuple() -> None:
    model, loss = llama()
    whole = count(model, loss)
    assert count(model, lambda: model(input_ids=IDS, labels=IDS)) == whole
    assert count(model, lambda: (loss(), "more")) == whole
    assert count(model, lambda: loss().item()) == whole


def test_counting_leaves_no_trace() -> None:
    model, loss = llama(attention_dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()

    def run() -> Tensor:
        torch.rand(3)
        return loss()

    static = count(model, run)
    assert torch.equal(before, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert all(not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert count(model, run) == static
        assert not torch.is_grad_enabled()


def test_a_dense_count_keeps_nothing_for_a_backward_pass() -> None:
    model, loss = llama()
    found: list[Tensor] = []

    def run() -> Tensor:
        found.append(loss())
        return found[0]

    count(model, run, dense=True)
    with pytest.raises((RuntimeError, TypeError)):
        found[0].backward()
    loss().backward()


def test_frozen_parts_stay_frozen_after_a_dense_count_that_fails() -> None:
    model, _ = llama()
    model.requires_grad_(False)

    def fail() -> None:
        assert all(p.requires_grad for p in model.parameters())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        count(model, fail, dense=True)
    assert not any(p.requires_grad for p in model.parameters())


def test_an_error_in_run_leaves_no_trace_either() -> None:
    model, _ = llama()
    model.train()

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        count(model, fail)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_part_under_no_grad_has_no_backward() -> None:
    teacher, student = nn.Linear(8, 8), nn.Linear(8, 8)
    both, x = nn.ModuleList([teacher, student]), torch.randn(4, 8)

    def loss() -> Tensor:
        with torch.no_grad():
            target = teacher(x)
        return nn.functional.mse_loss(student(x), target)

    flops = matmul_flops(4, 8, 8)
    assert count(both, loss).by_module == {"0": (flops, 0), "1": (flops, flops)}


def test_checkpointing_changes_no_count() -> None:
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    x = torch.randn(4, 8)

    def kept() -> Tensor:
        loss: Tensor = model(x).sum()
        loss.backward()
        return loss

    def recomputed() -> Tensor:
        loss: Tensor = checkpoint(model, x, use_reentrant=False).sum()
        loss.backward()
        return loss

    assert count(model, recomputed) == count(model, kept)


def test_the_meta_device_counts_without_computing() -> None:
    model, loss = llama()
    static = count(model, loss)
    model.to("meta")
    ids = IDS.to("meta")
    assert count(model, lambda: model(input_ids=ids, labels=ids).loss) == static


def test_a_shared_module_counts_for_each_call() -> None:
    layer = nn.Linear(8, 8)
    model, x = nn.Sequential(layer, layer, layer), torch.randn(4, 8)
    flops = matmul_flops(4, 8, 8)
    # the first call's input needs no gradient
    assert count(model, lambda: model(x).sum()).by_module == {"0": (3 * flops, 5 * flops)}


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 17)),
        (nn.Conv2d(6, 8, (3, 5), dilation=2), (2, 6, 17, 19)),
        (nn.Conv2d(6, 8, 3), (6, 17, 19)),
        (nn.Conv3d(2, 4, 3), (1, 2, 5, 6, 7)),
        (nn.ConvTranspose2d(6, 8, 3, stride=2), (2, 6, 5, 7)),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_convolutions_agree_with_torchs_counter(
    layer: nn.Module, shape: tuple[int, ...], first: bool
) -> None:
    x = torch.randn(shape, requires_grad=not first)

    def loss() -> Tensor:
        out: Tensor = layer(x)
        return out.square().mean()

    static = count(layer, loss)
    assert_close(static, loss)


def test_a_grouped_convolution_costs_its_share_of_a_full_one() -> None:
    # torch's counter takes the weight gradient of groups for that of a full convolution
    x = torch.randn(2, 8, 9, 9)
    full, grouped = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=4)
    dense = count(full, lambda: full(x).sum())
    sparse = count(grouped, lambda: grouped(x).sum())
    assert (4 * sparse.forward, 4 * sparse.backward) == (dense.forward, dense.backward)
    assert sparse.forward == measured(lambda: grouped(x).sum())[0]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("widths", [(24, 24), (10, 14)])
def test_torchs_own_attention(batch_first: bool, widths: tuple[int, int]) -> None:
    layer = nn.MultiheadAttention(24, 4, kdim=widths[0], vdim=widths[1], batch_first=batch_first)
    query, key, value = (
        torch.randn((2, length, width) if batch_first else (length, 2, width))
        for length, width in ((5, 24), (7, widths[0]), (7, widths[1]))
    )

    def loss() -> Tensor:
        out: Tensor = layer(query, key, value=value, need_weights=False)[0]
        return out.square().mean()

    assert_close(count(layer, loss), loss)


def test_torchs_encoder_layer_takes_no_shortcut_past_the_hooks() -> None:
    layer = nn.TransformerEncoderLayer(24, 4, 32, batch_first=True).requires_grad_(False).eval()
    x = torch.randn(2, 5, 24)
    static = count(layer, lambda: layer(x))
    assert static.by_module["linear1"] == (matmul_flops(10, 24, 32), 0)
    assert static.by_module["self_attn"][0] > 0


class _Owns(nn.Module):
    owns_flops = True

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


def test_a_module_that_accounts_for_itself_is_left_out_with_its_children() -> None:
    x = torch.randn(4, 8)
    model = nn.Sequential(nn.Linear(8, 8), _Owns(), nn.Linear(8, 8))
    static = count(model, lambda: model(x).sum())
    flops = matmul_flops(4, 8, 8)
    assert static.by_module == {"0": (flops, flops), "2": (flops, 2 * flops)}
    alone = _Owns()
    assert count(alone, lambda: alone(x).sum()) == Static(0, 0)


def test_weights_without_a_formula_are_named() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))
            self.position = nn.Parameter(torch.randn(1, 4, 8))

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.position) @ self.weight

    model, x = nn.Sequential(nn.Linear(8, 8), Mixer()), torch.randn(2, 4, 8)
    static = count(model, lambda: model(x).sum())
    assert static.uncounted == ("1",)

    def formula(call: Call) -> list[Product]:
        rows = call.x.numel() // 8
        return [Product(matmul_flops(rows, 8, 8), call.x.requires_grad + 1)]

    register(Mixer, formula)
    static = count(model, lambda: model(x).sum())
    assert static.uncounted == ()
    assert_close(static, lambda: model(x).square().sum())


def test_subclasses_inherit_a_formula() -> None:
    class Wide(nn.Linear):
        pass

    layer = Wide(4, 6)
    assert count(layer, lambda: layer(torch.randn(3, 4))).forward == matmul_flops(3, 4, 6)


def test_a_run_that_calls_another_model_is_refused() -> None:
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    with pytest.raises(RequestError, match="called none of the model's modules"):
        count(model, lambda: other(torch.randn(2, 4)))


def test_counts_stay_exact_past_a_double() -> None:
    width = 3**13
    layer = nn.Linear(width, width, bias=False, device="meta")
    x = torch.empty(3**10, width, device="meta")
    forward = count(layer, lambda: layer(x)).forward
    assert forward == 2 * 3**36
    assert int(float(forward)) != forward, "the case must be one that a double gets wrong"
