"""What the released code of sparse adapters gets wrong, each as a test of what is right."""

from __future__ import annotations

import pytest
import torch
from models import SMALL, batch, bert, llama, logits, mlp, train_, trained
from torch import nn

from sparing.weights import installed
from sparing.weights.adapters import SparseAdapter, adapt_


def factors(model):
    return {
        f"{path}.{name}": factor
        for path, part in installed.parts(model, "default").items()
        for name, factor in part.named_factors()
    }


def adapted(model, **options):
    return adapt_(model, SparseAdapter(**{**SMALL, **options}), data=[batch(model)])


def test_keep_is_the_share_kept():
    model = adapted(bert(), kind="lora", score="random", keep=0.2)
    kept = sum(f.kept for f in factors(model).values())
    assert kept == round(0.2 * sum(f.size for f in factors(model).values()))


@pytest.mark.parametrize("kind", ["lora", "pfeiffer"])
def test_equal_shapes_are_not_mistaken_for_each_other(kind):
    # rank and width equal to the layers' size: A, B and the frozen weight are all (16, 16)
    model = bert()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted(model, kind=kind, rank=16, width=16, keep=0.3, score="snip", scope="tensor")
    shapes = {factor.shape for factor in factors(model).values()}
    assert shapes == {(16, 16)}
    assert all(f.kept == round(0.3 * 256) for f in factors(model).values())
    masks = [f.mask() for f in factors(model).values()]
    assert not all(mask.equal(masks[0]) for mask in masks)
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert parameter.equal(frozen[name])


@pytest.mark.parametrize("score", ["snip", "iterative-snip", "grasp", "fisher", "synflow"])
def test_a_lora_that_starts_at_zero_is_pruned_in_both_factors(score):
    model = adapted(bert(), kind="lora", score=score, keep=0.5)
    kept = dict.fromkeys("ab", 0)
    for name, factor in factors(model).items():
        kept[name[-1]] += factor.kept
    total = sum(f.size for f in factors(model).values())
    assert kept["a"] + kept["b"] == total // 2
    # neither all of one factor nor nothing of the other
    assert all(0.1 * total < count < 0.45 * total for count in kept.values())


def test_magnitude_of_a_zero_factor_says_so_and_keeps_a_part_of_it():
    model = bert()
    with pytest.warns(UserWarning, match=r"all entries are 0"):
        adapted(model, kind="lora", score="magnitude", keep=0.5)
    b = [f for name, f in factors(model).items() if name.endswith(".b")]
    assert 0 < sum(f.kept for f in b) < sum(f.size for f in b)


def test_a_random_mask_is_another_for_another_seed_and_the_same_in_any_precision():
    # the released shuffle changes nothing
    masks = []
    for seed, dtype in ((1, torch.float32), (1, torch.bfloat16), (2, torch.float32)):
        model = adapted(bert().to(dtype), kind="pfeiffer", score="random", keep=0.3, seed=seed)
        masks.append([factor.mask() for factor in factors(model).values()])
    assert all(one.equal(same) for one, same in zip(masks[0], masks[1], strict=True))
    assert not all(one.equal(other) for one, other in zip(masks[0], masks[2], strict=True))


def test_steps_to_a_share_end_there_and_not_at_its_power():
    # the released loop raises the share to a power twice over, and takes dropped entries back
    for steps in (1, 3, 7):
        model = adapted(bert(), kind="lora", score="iterative-snip", iterations=steps, keep=0.3)
        kept = sum(f.kept for f in factors(model).values())
        assert kept == round(0.3 * sum(f.size for f in factors(model).values()))


@pytest.mark.parametrize("kind", ["lora", "houlsby", "pfeiffer", "parallel"])
def test_the_pretrained_function_is_not_disturbed_unless_asked_for(kind):
    expected = logits(bert())
    assert logits(adapted(bert(), kind=kind, score="random")).equal(expected)
    disturbed = logits(adapted(bert(), kind=kind, score="random", zero_start=False))
    assert not disturbed.equal(expected)


def test_each_model_scores_without_changing_anything_of_it():
    model = bert().train()
    model.bert.pooler.eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    adapted(model, kind="pfeiffer", score="snip", keep=0.4)
    own = [m.training for n, m in model.named_modules() if "sparing_adapters" not in n]
    assert own == modes
    assert torch.get_rng_state().equal(generator)
    assert all(p.grad is None for p in model.parameters())
    for name, tensor in model.state_dict().items():
        if name in before:
            assert tensor.equal(before[name])


def test_a_training_set_smaller_than_what_is_asked_for_is_scored_as_it_is():
    x, y = torch.randn(3, 6), torch.arange(3)
    model = adapt_(mlp(), SparseAdapter(kind="lora", rank=2, batches=100), data=[(x, y)])
    assert factors(model)


def test_scores_of_a_half_precision_model_do_not_underflow():
    narrow, wide = bert(), bert()
    for model, dtype in ((narrow, torch.bfloat16), (wide, torch.float32)):
        # the same values, so that only the precision of scoring could differ
        model.to(torch.bfloat16).to(dtype)
        model.classifier.weight.data.mul_(2.0**-20)
        adapted(model, kind="pfeiffer", score="snip", keep=0.4, dtype="float32")
    for name, factor in factors(narrow).items():
        assert factor.mask().equal(factors(wide)[name].mask())


def test_no_wrapper_is_needed_and_only_the_adapter_is_trained():
    model = adapted(llama(), kind="pfeiffer", score="snip")
    assert all("sparing_adapters" in name for name in trained(model))
    masks = {name: factor.mask() for name, factor in factors(model).items()}
    train_(model, 20)
    for name, factor in factors(model).items():
        assert factor.mask().equal(masks[name])
        assert not factor.matrix()[~masks[name]].any()


def test_nothing_of_the_optimizer_or_a_checkpoint_is_dense():
    model = adapted(bert(), kind="lora", score="random", keep=0.2, train_also=[])
    dense = adapted(bert(), kind="lora", score="random", keep=1.0, train_also=[])
    sizes = []
    for each in (model, dense):
        own = [t for n, t in each.state_dict().items() if "sparing_adapters" in n]
        sizes.append(sum(t.numel() * t.element_size() for t in own))
    assert sizes[0] < 0.25 * sizes[1]


def test_a_parallel_adapter_norms_nothing_but_adds_to_the_block():
    # the released function for a norm behind the adapter norms its input instead
    model = nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(3, 4)
    plain = model(x)
    adapt_(model, SparseAdapter(kind="parallel", targets=["0"], score="random", keep=1.0, width=2))
    part = installed.parts(model, "default")["0"]
    part.up.values.data.normal_()
    expected = plain + 4.0 * (torch.relu(x @ part.down().T) @ part.up().T)
    torch.testing.assert_close(model(x), expected)
