"""The rules that every method in the registry keeps."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import forked
from sparing.core import registry, state
from sparing.core.errors import RequestError
from sparing.core.method import Method

sys.path.insert(0, str(Path(__file__).parent))
from loop import CASES, STEPS_PER_EPOCH, Loop, dense, differences, tokens

NAMES = [record.name for record in registry.methods()]
ALL = [
    pytest.param(name, options, id=f"{name}-{number}")
    for name, cases in CASES.items()
    for number, options in enumerate(cases)
]
every_method = pytest.mark.parametrize("name", NAMES)
every_case = pytest.mark.parametrize(("name", "options"), ALL)


def build(name: str, options: dict[str, object]) -> Method:
    return registry.method(name)(**copy.deepcopy(options))


def test_every_method_has_cases_here():
    assert sorted(CASES) == sorted(NAMES)
    assert all({} in cases for cases in CASES.values())


# ---- options -------------------------------------------------------------------------------------


@every_case
def test_options_survive_yaml(name, options):
    method = build(name, options)
    plain = method.to_dict()
    text = yaml.safe_dump(plain)
    back = type(method).from_dict(yaml.safe_load(text))
    assert back.options == method.options
    assert back.to_dict() == plain
    # and what a user would have written in a recipe means the same
    assert type(method).from_dict(yaml.safe_load(yaml.safe_dump(options))).options == method.options


@every_method
def test_options_are_frozen_and_keyword_only(name):
    cls = registry.method(name)
    fields = dataclasses.fields(cls.Options)
    assert fields
    assert all(field.kw_only for field in fields)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cls().options, fields[0].name, None)


@every_method
def test_an_unknown_option_names_the_nearest(name):
    cls = registry.method(name)
    for field in dataclasses.fields(cls.Options):
        with pytest.raises(RequestError, match=f'"{field.name}_".*did you mean "{field.name}"'):
            cls(**{f"{field.name}_": 1})


@every_case
def test_the_repr_names_the_class(name, options):
    method = build(name, options)
    assert repr(method).startswith(f"{type(method).__name__}(")


@every_method
def test_the_class_is_final_and_named_as_registered(name):
    cls = registry.method(name)
    assert cls.name == name
    assert getattr(cls, "__final__", False)


@every_method
def test_it_has_a_card(name):
    record = registry.method_record(name)
    root = Path(__file__).resolve().parents[2]
    card = root / "docs" / "methods" / f"{record.card}.md"
    assert card.is_file(), f"write {card.relative_to(root)}"
    assert record.paper.removeprefix("arXiv ") in card.read_text(encoding="utf-8")


# ---- copies and state ----------------------------------------------------------------------------


@every_case
def test_a_method_can_be_pickled_and_copied(name, options):
    method = build(name, options)
    for clone in (pickle.loads(pickle.dumps(method)), copy.deepcopy(method)):
        assert type(clone) is type(method)
        assert clone.options == method.options


@every_case
def test_a_prepared_model_can_be_pickled_and_copied_in_training(name, options):
    loop = Loop(build(name, options)).run(2)
    ids = tokens(9)[:3]
    expected = loop.model.eval()(input_ids=ids).logits
    for clone in (pickle.loads(pickle.dumps(loop.model)), copy.deepcopy(loop.model)):
        assert clone(input_ids=ids).logits.equal(expected)
        assert not differences(dict(clone.state_dict()), dict(loop.model.state_dict()))
        # and shares nothing with the original
        for parameter in clone.parameters():
            parameter.data.zero_()
    assert loop.model(input_ids=ids).logits.equal(expected)


@every_case
def test_a_copy_of_a_whole_loop_trains_on_as_the_original_does(name, options):
    loop = Loop(build(name, options)).run(3)
    clone = copy.deepcopy(loop)
    loop.run(4)
    clone.run(4)
    assert differences(loop.outcome(), clone.outcome()) == []


@every_case
@pytest.mark.parametrize("split", [1, 3, STEPS_PER_EPOCH])
def test_saved_in_mid_epoch_and_loaded_it_continues_bit_for_bit(name, options, split, tmp_path):
    whole = Loop(build(name, options)).run(split + 3)

    first = Loop(build(name, options)).run(split)
    state.save(tmp_path / "state", first.state_dict())
    second = Loop(build(name, options))
    second.load_state_dict(state.load(tmp_path / "state"))
    second.run(3)
    assert differences(whole.outcome(), second.outcome()) == []
    assert whole.events == first.events + second.events


@every_case
def test_state_loaded_before_the_model_is_known_counts_too(name, options):
    first = Loop(build(name, options)).run(3)
    kept = copy.deepcopy(first.state_dict())
    method = build(name, options)
    method.load_state_dict(kept["methods"][0])
    second = Loop(method)
    second.model.load_state_dict(kept["model"])
    assert differences(method.state_dict(), kept["methods"][0]) == []


# ---- what must make no difference ------------------------------------------------------------


@every_case
def test_training_repeats(name, options):
    first, second = (Loop(build(name, options)).run(5) for _ in range(2))
    assert differences(first.outcome(), second.outcome()) == []


@every_case
def test_doing_nothing_is_doing_nothing(name, options):
    cls = registry.method(name)
    identity = getattr(cls, "identity", None)
    if identity is not None:
        with_it, without = Loop(cls(**identity)).run(5), Loop(None).run(5)
        pair = [dict(loop.model.state_dict()) for loop in (with_it, without)]
        assert differences(*pair) == []
        return
    if getattr(cls, "freezes_base", False):
        # what is added to a frozen base changes nothing before it is trained, if so asked (the
        # default), and nothing of the base ever
        ids = tokens(5)[:4]
        loop = Loop(cls(**{**options, "zero_start": True}))
        assert loop.model.eval()(input_ids=ids).logits.equal(dense().eval()(input_ids=ids).logits)
        before = dict(dense().state_dict())
        state = Loop(build(name, options)).run(5).model.state_dict()
        # PEFT's layers hold what they adapt as their base_layer
        after = {key.replace(".base_layer.", "."): value for key, value in state.items()}
        assert differences(before, {key: after[key] for key in before}) == []
        return
    # experts have no such option; but experts that are all copies of the block compute the block
    ids = tokens(5)[:4]
    expected = dense()(input_ids=ids).logits
    method = cls(**{**options, **CONVEX.get(name, {}), "init": "copy"})
    model = Loop(method).model.eval()
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)


# top-k with k = 1 scales by the softmax score, which is how its router learns; top-p and ReLU
# routing do so always, as published, a ReLU gate may leave a token without any expert, and what a
# null expert gives is not what the block computes
CONVEX = {
    "top-k": {"normalize": True, "null_experts": 0},
    "switch": {"experts": 1},
    "sigmoid-top-k": {"normalize": True, "scale": 1.0},
    "expert-choice": {"experts": 1, "k": 1},
    "top-p": {"normalize": True, "null_experts": 0},
    "relu": {"normalize": True, "fallback": "best"},
}


@every_case
def test_evaluation_makes_no_difference(name, options):
    plain = Loop(build(name, options)).run(6)
    watched = Loop(build(name, options)).run(6, evaluate=True)
    assert differences(plain.outcome(), watched.outcome()) == []


@every_case
def test_activation_checkpointing_makes_no_difference(name, options):
    plain = Loop(build(name, options)).run(6)
    lean = Loop(build(name, options), checkpointing=True).run(6)
    # steps times blocks; a frozen block in front of all that is trained has no backward
    assert lean.recomputed in (
        [6 * 2, 6] if "freezes_base" in vars(type(lean.methods[0])) else [12]
    )
    assert plain.recomputed == 0
    assert differences(plain.outcome(), lean.outcome()) == []


@every_case
def test_global_generators_are_neither_seeded_nor_drawn_from(name, options):
    def generators():
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            pickle.dumps(np.random.get_state()),  # noqa: NPY002 - it is the global one that counts
        )

    before = generators()
    loop = Loop(build(name, options)).run(6, evaluate=True)
    loop.load_state_dict(copy.deepcopy(loop.state_dict()))
    assert generators() == before
    # nor does it depend on them
    with torch.random.fork_rng():
        torch.manual_seed(99)
        other = Loop(build(name, options)).run(6)
    assert differences(loop.outcome(), other.outcome()) == []


@every_case
def test_at_inference_a_row_does_not_depend_on_the_rest_of_the_batch(name, options):
    model = Loop(build(name, options)).run(6).model.eval()
    ids = tokens(7)[:4]
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    mask[3, 2:] = 0
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask).logits
        for row in range(4):
            length = int(mask[row].sum())
            alone = model(input_ids=ids[row : row + 1, :length]).logits[0]
            torch.testing.assert_close(together[row, :length], alone, rtol=0, atol=1e-6)


@every_case
def test_what_is_spent_is_accounted_for(name, options):
    loop = Loop(build(name, options)).run(2)
    kept = loop.ledger.to_dict()
    assert kept
    assert all(entry["spent"] >= 0 for entry in kept.values())
    for part in loop.methods:
        part.account(loop.ledger)  # nothing happened since
    assert loop.ledger.to_dict() == kept


@every_case
def test_signals_are_plain_finite_numbers(name, options):
    loop = Loop(build(name, options)).run(4)
    for value in loop.methods[0].signals().values():
        for number in value if isinstance(value, list) else [value]:
            assert type(number) in (int, float)
            assert np.isfinite(number)


# ---- ranks ---------------------------------------------------------------------------------------


def test_two_ranks_with_different_data_take_identical_decisions(tmp_path):
    output = forked.script(Path(__file__).with_name("rank_worker.py"), tmp_path / "store")
    assert output.count("events") == 2
