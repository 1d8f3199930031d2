"""Adapters on models of all families: where they go, what they keep, what they leave alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import FAMILIES, KINDS, SMALL, batch, bert, gpt2, llama, logits, mlp, train_, trained
from torch import nn

import sparing
from sparing.core.errors import RequestError, RunError
from sparing.core.flops import count
from sparing.core.ledger import Ledger
from sparing.core.method import Setup, arrange
from sparing.weights import installed
from sparing.weights.adapter import places
from sparing.weights.adapters import SparseAdapter, adapt_
from sparing.weights.switching import delete_, disabled, merge_, switch_, unmerge_

every_kind = pytest.mark.parametrize("kind", KINDS)
every_family = pytest.mark.parametrize("family", FAMILIES)


def entries(model: nn.Module, name: str = "default") -> tuple[int, int]:
    factors = [f for p in installed.parts(model, name).values() for _, f in p.named_factors()]
    return sum(f.kept for f in factors), sum(f.size for f in factors)


def adapted(model: nn.Module, name: str = "default", **options: object) -> nn.Module:
    chosen = {"score": "random", **SMALL, **options}
    return adapt_(model, SparseAdapter(**chosen), data=[batch(model)], name=name)


# ---- every kind on every family ------------------------------------------------------------------


@every_kind
@every_family
def test_it_starts_from_the_base_trains_what_it_keeps_and_can_go(family, kind):
    model = FAMILIES[family]()
    before, expected = copy.deepcopy(dict(model.state_dict())), logits(model)
    adapted(model, kind=kind)
    assert logits(model).equal(expected)  # zero delta at the start
    kept, total = entries(model)
    assert kept == round(0.6 * total)
    train_(model, 3)
    assert not logits(model).allclose(expected, atol=1e-4)
    heads = installed.require(model, "default")["heads"]
    after = model.state_dict()
    for name, tensor in before.items():
        if not name.startswith(tuple(heads) or ("-",)):
            assert after[name].equal(tensor), name
    with disabled(model):
        assert logits(model).equal(expected)
    delete_(model, "default")
    assert not places(model)
    assert list(model.state_dict()) == list(before)
    assert all(p.requires_grad for p in model.parameters())
    assert logits(model).equal(expected)


@every_kind
def test_copies_and_pickles_of_a_trained_adapter_compute_the_same(kind):
    model = train_(adapted(bert(), kind=kind), 2).eval()
    expected = logits(model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert logits(clone).equal(expected)
        switch_(clone)
    assert logits(model).equal(expected)
    other = adapted(bert(), kind=kind, seed=8)
    other.load_state_dict(model.state_dict())
    assert logits(other).equal(expected)


@every_kind
@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_gradients_agree_with_finite_differences(kind, family):
    model = FAMILIES[family]().double()
    # values are drawn below: it matters only for which softmax a prefix shares
    adapted(model, kind=kind, keep=0.4, zero_start=family != "bert", train_also=[])
    base = model.base_model  # losses and heads of some families go through float32
    parameters = list(trained(model).values())
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.data.normal_(std=0.3, generator=generator)
    inputs = batch(model, rows=1)
    del inputs["labels"]
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}

    def loss() -> torch.Tensor:
        return base(**inputs).last_hidden_state.pow(3).sum()

    gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        for place in range(0, parameter.numel(), max(1, parameter.numel() // 2)):
            ends = []
            for step in (1e-6, -2e-6):
                with torch.no_grad():
                    parameter.view(-1)[place] += step
                ends.append(float(loss().detach()))
            with torch.no_grad():
                parameter.view(-1)[place] += 1e-6
            slope = (ends[0] - ends[1]) / 2e-6
            assert slope == pytest.approx(float(gradient.view(-1)[place]), rel=1e-4, abs=1e-5)


@every_kind
@pytest.mark.parametrize("pattern", ["unit", "block:2x2", "1:2"])
def test_patterns_keep_whole_choices(kind, pattern):
    model = adapted(bert(), kind=kind, keep=0.5, pattern=pattern, width=4, rank=4, length=4)
    for part in installed.parts(model, "default").values():
        for _, factor in part.named_factors():
            if pattern == "unit":
                assert factor.index is None  # smaller and dense: it is faster, not only sparse
            elif pattern == "1:2":
                assert (factor.mask().view(-1, 2).sum(1) == 1).all()
    total = entries(adapted(bert(), kind=kind, keep=1.0, width=4, rank=4, length=4))[1]
    assert entries(model)[0] == total // 2
    train_(model, 1)


# ---- several adapters on one base ----------------------------------------------------------------


def test_several_adapters_are_switched_with_their_heads():
    model = bert()
    base = logits(model)
    adapted(model, "first", kind="lora")
    train_(model, 3)
    first = logits(model)
    adapted(model, "second", kind="pfeiffer")
    assert logits(model).equal(base)  # a further adapter begins with the base, head and all
    train_(model, 3)
    second = logits(model)
    for name, expected in (("first", first), ("second", second), ("first", first)):
        switch_(model, name)
        assert logits(model).equal(expected)
        assert all(
            name in key or (key.startswith("classifier.") and childless(key))
            for key in trained(model)
        )
    switch_(model)
    assert logits(model).equal(base)
    assert trained(model) == {}
    state = copy.deepcopy(model.state_dict())
    delete_(model, "first")
    assert installed.names(model) == ["second"]
    switch_(model, "second")
    assert logits(model).equal(second)
    other = bert(seed=4)
    for name, kind in (("first", "lora"), ("second", "pfeiffer")):
        adapted(other, name, kind=kind, seed=6)
    switch_(other)
    other.load_state_dict(state)  # values of adapters that wait are part of the state
    switch_(other, "first")
    assert logits(other).equal(first)


def childless(key: str) -> bool:
    return "sparing_adapters" not in key


def test_two_acting_adapters_add_up_but_not_two_heads():
    model = llama()
    adapted(model, "a", kind="lora")
    train_(model, 2)
    adapted(model, "b", kind="lora", seed=3)
    train_(model, 2)
    switch_(model, "a", "b")
    both = logits(model)
    merged = merge_(copy.deepcopy(model), unload=True)
    torch.testing.assert_close(logits(merged), both)
    with pytest.raises(RequestError, match=r"named twice"):
        switch_(model, "a", "a")
    with pytest.raises(RequestError, match=r'no adapter "c"'):
        switch_(model, "c")
    heads = bert()
    for name in "ab":
        adapted(heads, name, kind="lora")
    with pytest.raises(RequestError, match=r"only one of them can act"):
        switch_(heads, "a", "b")


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_merging_changes_nothing_and_unmerging_is_exact(family):
    model = train_(adapted(FAMILIES[family](), kind="lora", targets="all-linear"), 3).eval()
    weights = copy.deepcopy(dict(model.state_dict()))
    expected = logits(model)
    merge_(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert logits(merge_(model)).equal(logits(model))  # twice is once
    unmerge_(model)
    assert logits(model).equal(expected)
    for name, tensor in model.state_dict().items():
        assert tensor.equal(weights[name])
    plain = merge_(model, unload=True)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-6)
    assert list(plain.state_dict()) == list(FAMILIES[family]().state_dict())


def test_a_merged_model_is_not_adapted_or_merged_wrongly():
    model = adapted(bert(), kind="lora")
    merge_(model)
    with pytest.raises(RequestError, match=r"unmerge_ them first"):
        adapted(model, "more")
    switch_(model)
    with pytest.raises(RequestError, match=r"nothing to merge"):
        merge_(model)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora"])
def test_what_is_not_linear_cannot_be_merged(kind):
    model = train_(adapted(bert(), kind=kind), 1).eval()
    expected = logits(model)
    with pytest.raises(RequestError, match=r"cannot be merged"):
        merge_(model)
    assert logits(model).equal(expected)


def test_a_tied_or_overflowing_weight_is_not_merged():
    model = adapted(gpt2(), kind="lora", targets=["lm_head"])
    with pytest.raises(RequestError, match=r"tied"):
        merge_(model)
    model = adapted(mlp(), kind="lora")
    part = installed.parts(model, "default")["0"]
    part.b.values.data.fill_(1e38)
    part.a.values.data.fill_(1e38)
    before = model[0].weight.clone()
    with pytest.raises(RunError, match=r"infinite or NaN"):
        merge_(model)
    assert model[0].weight.equal(before)


# ---- what is kept, and why -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "score",
    ["random", "er", "erk", "magnitude", "snip", "iterative-snip", "grasp", "fisher", "synflow"],
)
@pytest.mark.parametrize("kind", ["lora", "pfeiffer", "prefix"])
@pytest.mark.filterwarnings("ignore:magnitude says nothing:UserWarning")
def test_counts_are_exact_for_every_score(score, kind):
    for keep in (0.55,) if score == "synflow" else (0.2, 0.55, 1.0):  # it takes 100 steps
        model = adapted(bert(), kind=kind, score=score, keep=keep)
        kept, total = entries(model)
        assert kept == round(keep * total)


@pytest.mark.parametrize("scope", ["global", "layer", "tensor"])
def test_scopes_are_budgets(scope):
    model = adapted(bert(), kind="lora", scope=scope, keep=0.3)
    for part in installed.parts(model, "default").values():
        pairs = [(f.kept, f.size) for _, f in part.named_factors()]
        if scope == "tensor":
            assert all(kept == round(0.3 * size) for kept, size in pairs)
        if scope == "layer":
            assert sum(k for k, _ in pairs) == round(0.3 * sum(s for _, s in pairs))
    if scope == "global":
        assert entries(model)[0] == round(0.3 * entries(model)[1])


@pytest.mark.parametrize("kind", ["lora", "houlsby", "pfeiffer", "prefix", "mam"])
@pytest.mark.parametrize("keep", [1.0, 0.5, 0.25])
def test_a_budget_buys_a_larger_and_sparser_adapter(kind, keep):
    budget = 1200
    model = adapted(bert(), kind=kind, keep=keep, budget=budget, train_also=[])
    spent = sum(p.numel() for p in trained(model).values())
    assert spent <= budget
    if keep < 1:
        assert spent == budget
        dense = adapted(bert(), kind=kind, keep=1.0, budget=budget, train_also=[])
        assert entries(model)[1] > 1.5 * entries(dense)[1]


def test_a_budget_that_pays_for_nothing_says_what_would():
    with pytest.raises(RequestError, match=r"give at least"):
        adapted(bert(), kind="pfeiffer", budget=3)


def test_optimizer_state_is_as_small_as_the_kept_values():
    model = train_(adapted(bert(), kind="lora", keep=0.2, train_also=[]), 1)
    optimizer = torch.optim.AdamW(trained(model).values())
    model(**batch(model)).loss.backward()
    optimizer.step()
    state = [v for s in optimizer.state.values() for v in s.values() if v.numel() > 1]
    assert sum(v.numel() for v in state) == 2 * entries(model)[0]


def test_the_same_seed_gives_the_same_adapter_and_the_generators_stay():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, third = (
        adapted(bert(), kind="lora", score="snip", seed=seed) for seed in (3, 3, 4)
    )
    assert torch.get_rng_state().equal(before)
    one, two, three = (
        torch.cat([p.flatten() for p in trained(model).values()])
        for model in (first, second, third)
    )
    assert one.equal(two)
    assert not one.equal(three)


def test_a_shuffled_loader_is_looked_at_without_moving_its_generator():
    model = mlp()
    x, y = torch.randn(12, 6), torch.arange(12) % 3
    generator = torch.Generator().manual_seed(2)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=4, shuffle=True, generator=generator
    )
    before, ours = generator.get_state(), torch.get_rng_state()
    adapt_(model, SparseAdapter(kind="lora", rank=2, batches=2), data=loader)
    assert generator.get_state().equal(before)
    assert torch.get_rng_state().equal(ours)


# ---- plain modules -------------------------------------------------------------------------------


def test_a_plain_model_is_adapted_head_and_all():
    model = mlp()
    adapted(model, kind="lora")
    assert sorted(installed.parts(model, "default")) == ["0", "2"]
    alone = nn.Linear(4, 2)
    x = torch.randn(3, 4)
    expected = alone(x)
    adapt_(alone, SparseAdapter(kind="lora", score="random"))
    assert alone(x).equal(expected)


def test_bottlenecks_go_where_targets_say():
    model = mlp()
    x = torch.randn(3, 6)
    expected = model(x)
    adapted(model, kind="pfeiffer", targets=["0"])
    assert model(x).equal(expected)
    part = installed.parts(model, "default")["0"]
    part.up.values.data.fill_(0.5)
    hidden = model[0].bias + x @ model[0].weight.T
    down, up = part.down(), part.up()
    after = hidden + torch.relu(hidden @ down.T) @ up.T
    torch.testing.assert_close(model(x), model[2](torch.tanh(after)))


def test_targets_are_names_expressions_or_all_linear():
    def where(model, **options):
        return sorted(installed.parts(adapted(model, kind="lora", **options), "default"))

    assert where(llama(), targets=["k_proj"]) == [
        f"model.layers.{n}.self_attn.k_proj" for n in range(2)
    ]
    assert where(llama(), targets=r".*layers\.1\..*_proj", exclude=["mlp.up_proj"]) == sorted(
        f"model.layers.1.{n}"
        for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                  "mlp.gate_proj", "mlp.down_proj")
    )  # fmt: skip
    everything = where(llama(), targets="all-linear")
    assert len(everything) == 14
    assert "lm_head" not in everything


def test_a_head_can_be_named_and_is_then_not_adapted_too():
    model = mlp()
    adapted(model, kind="lora", train_also=["2"])
    assert sorted(installed.parts(model, "default")) == ["0"]
    assert {"2.weight", "2.bias"} <= set(trained(model))


# ---- FLOPs and half precision --------------------------------------------------------------------


@every_kind
def test_flops_are_those_of_torchs_counter(kind):
    from torch.utils.flop_counter import FlopCounterMode

    model = adapted(bert(attn_implementation="eager"), kind=kind)
    # the fused attention of a processor is one operation, for which the counter reads 0
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with math, FlopCounterMode(display=False) as counter:
        model(**batch(model)).loss.backward()
    static = count(model, lambda: model(**batch(model)))
    assert static.uncounted == ()
    assert static.total == pytest.approx(counter.get_total_flops(), rel=0.01)


@every_kind
def test_dense_flops_are_those_of_training_the_whole_base(kind):
    model, base = adapted(bert(), kind=kind), bert()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    dense = count(model, lambda: model(**batch(model)), dense=True)
    assert dense.total == count(base, lambda: base(**batch(base))).total
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == frozen
    assert dense.total > count(model, lambda: model(**batch(model))).total


@every_kind
def test_a_base_in_half_precision_gets_an_adapter_in_float32(kind):
    model = bert().to(torch.bfloat16)
    expected = logits(model)
    adapted(model, kind=kind, score="snip")
    adapter = [p for n, p in model.named_parameters() if "sparing_adapters" in n]
    assert {p.dtype for p in adapter} == {torch.float32}
    assert logits(model).equal(expected)
    train_(model, 2)
    assert logits(model).dtype == torch.bfloat16
    narrow = adapted(bert().to(torch.bfloat16), kind=kind, dtype="bfloat16")
    adapter = [p for n, p in narrow.named_parameters() if "sparing_adapters" in n]
    assert {p.dtype for p in adapter} == {torch.bfloat16}


# ---- where models run ----------------------------------------------------------------------------


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_compiled_model_computes_the_same(kind, family):
    torch._dynamo.reset()
    model = train_(adapted(FAMILIES[family](), kind=kind), 1)
    expected = logits(model)
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(whole(**batch(model, 5)).logits, expected)


@every_kind
def test_autocast_trains_it(kind):
    model = adapted(bert(), kind=kind)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01)
    for step in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch(model, step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.dtype == torch.float32 for p in trained(model).values())
    assert any(not p.equal(before[name]) for name, p in trained(model).items())


def test_the_fused_encoder_of_torch_does_not_pass_adapters_by():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x = torch.randn(2, 3, 8)
    adapt_(model, SparseAdapter(kind="lora", score="random", rank=2))
    assert sorted(installed.parts(model, "default")) == ["layers.0.linear1", "layers.0.linear2"]
    for part in installed.parts(model, "default").values():
        part.b.values.data.normal_()
    with torch.no_grad():
        quick = model(x)  # evaluation without gradient is where torch takes the fused way
    torch.testing.assert_close(quick, model(x).detach())
    with disabled(model), torch.no_grad():
        assert not model(x).allclose(quick)


# ---- the method ----------------------------------------------------------------------------------


def test_the_method_tells_what_it_keeps_and_costs(tmp_path):
    method = SparseAdapter(kind="lora", keep=0.25, score="random", rank=4)
    model = bert()
    everything = sum(p.numel() for p in model.parameters())
    method.prepare(model, Setup(seed=1))
    signals, ledger = method.signals(), Ledger()
    method.account(ledger)
    assert signals["kept_entries"] == round(0.25 * signals["entries"])
    assert ledger.spent("parameters") == sum(p.numel() for p in trained(model).values())
    assert ledger.dense("parameters") == everything
    assert ledger.spent("active_parameters") == everything + signals["kept_entries"]
    assert signals["stored_bytes"] < 0.5 * signals["dense_stored_bytes"]
    method.export(model, tmp_path / "out")
    for _ in range(2):  # what was written is entered once
        method.account(ledger)
    written = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert ledger.spent("bytes") == written
    assert ledger.dense("bytes") == 4 * everything
    lines = method.touches()
    assert "keeps" in lines[0]
    assert f"trains {ledger.spent('parameters'):,} values" in lines[-1]
    page = method.page(model, [], lambda passage: None)
    assert sum(entry["kept"] for entry in page["kept"].values()) == signals["kept_entries"]
    everyone = [{"params": list(model.named_parameters())}]
    (group,) = method.optimizer(model, everyone)
    assert dict(group["params"]) == trained(model)


def test_its_control_keeps_as_much_at_random():
    assert SparseAdapter.at_random({"keep": 0.3, "kind": "lora"}, {}) == {
        "sparse-adapter": {"keep": 0.3, "kind": "lora", "score": "random"}
    }
    assert SparseAdapter.at_random({"score": "random"}, {}) is None
    assert SparseAdapter.at_random({"keep": 1}, {}) is None


def test_it_does_not_stand_beside_methods_that_build_anew():
    from sparing.experts.top_k import TopK

    with pytest.raises(RequestError, match="freeze the base"):
        arrange([SparseAdapter(), TopK()])


def test_data_given_by_on_are_scored_and_copies_of_the_method_keep_them():
    model = bert()
    method = SparseAdapter(kind="lora", rank=2).on([batch(model)])
    copy.deepcopy(method).prepare(model, Setup())
    assert entries(model)[0] == round(0.6 * entries(model)[1])
    with pytest.raises(RequestError, match="no data was given"):
        pickle.loads(pickle.dumps(method)).prepare(bert(), Setup())


# ---- requests that cannot be met -----------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, -0.1, 1.1, float("nan"), "0.5", None])
def test_keep_is_a_share_above_zero(keep):
    with pytest.raises(RequestError, match=r"keep"):
        SparseAdapter(keep=keep)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "lorra"}, 'did you mean "lora"'),
        ({"score": "snipp"}, 'did you mean "snip"'),
        ({"scope": "all"}, "scope"),
        ({"pattern": "blocks"}, "unknown pattern"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"dropout": 1.0}, "below 1"),
        ({"dtype": "int8"}, "dtype"),
        ({"activation": "reluu"}, 'did you mean "relu"'),
        ({"score": "er", "pattern": "unit"}, "single entries"),
        ({"name": "a.b"}, "without dots"),
        ({"name": "train"}, "torch's own"),
        ({"targets": 3}, "targets must be names"),
        ({"kepe": 0.5}, 'did you mean "keep"'),
    ],
)
def test_options_say_what_is_wrong(options, says):
    with pytest.raises(RequestError, match=says):
        SparseAdapter(**options)


def plain_transformer() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 4, 2), nn.Flatten(), nn.LayerNorm(8))


@pytest.mark.parametrize(
    ("build", "options", "says"),
    [
        (plain_transformer, {"kind": "lora"}, "looked for query.*the model has 1 Conv1d"),
        (plain_transformer, {"kind": "pfeiffer"}, "looked for transformer layers.*1 Conv1d"),
        (mlp, {"kind": "prefix"}, "looked for attention layers.*2 Linear"),
        (mlp, {"kind": "lora", "targets": ["3"]}, 'targets "3" matches none of the 2'),
        (bert, {"targets": ["quary"], "kind": "lora"}, 'did you mean "query"'),
        (bert, {"targets": "[", "kind": "lora"}, "no regular expression"),
        (bert, {"train_also": ["clasifier"]}, 'did you mean "classifier"'),
        (bert, {"kind": "lora", "exclude": ["query", "value"]}, "leaves no place"),
        (nn.Identity, {}, "no parameters"),
    ],
)
def test_names_and_models_with_nothing_to_adapt_are_refused(build, options, says):
    model = build()
    modes = [p.requires_grad for p in model.parameters()]
    with pytest.raises(RequestError, match=says):
        adapt_(model, SparseAdapter(**{"score": "random", **options}))
    assert [p.requires_grad for p in model.parameters()] == modes
    assert not places(model)
    assert installed.names(model) == []


def test_a_base_from_a_gguf_file_has_plain_weights_and_is_adapted():
    class GgufConfig:
        """As transformers leaves it on what it read from such a file."""

    model = bert()
    model.config.quantization_config = GgufConfig()
    adapt_(model, SparseAdapter(kind="lora", score="random", rank=2))
    assert installed.names(model) == ["default"]


def test_a_quantised_base_is_refused():
    quantised = nn.Sequential(nn.Linear(4, 4))
    quantised[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(RequestError, match=r'quantised \("0.weight" is torch.int8'):
        adapt_(quantised, SparseAdapter(kind="lora", score="random"))
    small = nn.Sequential(nn.Linear(4, 4))
    small[0].weight = nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(RequestError, match=r"float8"):
        adapt_(small, SparseAdapter(kind="lora", score="random"))
    told = bert()  # weights of other libraries may look like any others
    told.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(RequestError, match=r'quantised \("the configuration"'):
        adapt_(told, SparseAdapter(kind="lora", score="random"))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "no data was given"),
        ([], "is empty"),
        (iter(()), "is empty"),
        ([{"input_ids": torch.ones(2, 4, dtype=torch.int64)}], "no labels"),
        ([torch.ones(2, 4, dtype=torch.int64)], r"a pair \(x, y\)"),
    ],
)
def test_data_that_cannot_be_scored_is_refused_and_nothing_stays(data, says):
    model = bert()
    before = copy.deepcopy(dict(model.state_dict()))
    with pytest.raises(RequestError, match=says):
        adapt_(model, SparseAdapter(kind="lora", score="snip"), data=data)
    assert not places(model)
    assert all(p.requires_grad for p in model.parameters())
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert list(model.state_dict()) == list(before)


def test_a_failed_second_adapter_leaves_the_first_acting():
    model = train_(adapted(bert(), "first", kind="lora"), 2)
    expected = logits(model)
    with pytest.raises(RequestError, match=r"no data"):
        adapt_(model, SparseAdapter(kind="lora", score="snip"), name="second")
    assert installed.active(model) == ["first"]
    assert logits(model).equal(expected)
    with pytest.raises(RequestError, match=r"already"):
        adapted(model, "first")


def test_scores_that_are_not_finite_name_where_they_come_from():
    x, y = torch.randn(4, 6), torch.arange(4) % 3
    for score in ("snip", "iterative-snip", "grasp", "fisher"):
        model = mlp()
        model[2].weight.data[0, 0] = float("inf")
        with pytest.raises(RunError, match=r'first layer whose output is not finite is "2"'):
            adapt_(model, SparseAdapter(kind="lora", score=score), data=[(x, y)])
        assert not places(model)
    model = mlp()
    x[0, 0] = float("nan")
    with pytest.raises(RunError, match=r'first layer whose output is not finite is "0"'):
        adapt_(model, SparseAdapter(kind="lora", score="snip"), data=[(x, y)])


def test_containers_and_layers_that_are_only_read_are_no_targets():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = nn.ModuleDict({"attention": attention, "out": nn.Linear(8, 8)})
    adapt_(model, SparseAdapter(kind="lora", score="random", targets="all-linear"))
    assert sorted(installed.parts(model, "default")) == ["out"]  # out_proj is read, not called


def test_a_part_of_an_adapted_model_is_no_model():
    model = adapted(bert(), kind="lora")
    with pytest.raises(RequestError, match=r"part of an adapted model"):
        adapted(model.bert, "more")
    with pytest.raises(RequestError, match=r"part of an adapted model"):
        switch_(model.bert, "default")


def test_the_top_level_names_are_these():
    assert sparing.adapt_ is adapt_
    assert sparing.SparseAdapter is SparseAdapter


@pytest.mark.parametrize("experts", [sparing.TopAny, sparing.TopK, sparing.ReLURouter])
def test_experts_beside_a_frozen_base_are_refused(experts):
    with pytest.raises(RequestError, match='cannot work beside "sparse-adapter"'):
        arrange([SparseAdapter(), experts()])
