"""The clicks task: the shipped sample, files of one's own, a metric that adds up, a way out."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sparing.core.errors import DivergedError, RequestError
from sparing.core.random_state import random_state
from sparing.core.task import Task
from sparing.run import recipe
from sparing.run.compare.arms import as_overrides
from sparing.tasks.clicks import Clicks, prior, saved
from sparing.tasks.clicks.auc import auc
from sparing.tasks.clicks.dataset import Rows, drawn
from sparing.tasks.clicks.encoded import Encoded
from sparing.tasks.clicks.models import ClickModel
from sparing.tasks.clicks.read import label_of


@pytest.fixture(scope="module")
def task() -> Clicks:
    made = Clicks(rows=5000, dim=4, widths=(8,))
    made.prepare(0)
    return made


def write(path: Path, rows: int = 400, seed: int = 0, *, positive: float = 0.3) -> str:
    """A log with an item that decides, a number that matters and a day."""
    rng = np.random.default_rng(seed)
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["item", "place", "price", "day", "clicked"])
        for number in range(rows):
            item, price = int(rng.integers(8)), float(rng.normal())
            clicked = int(rng.random() < positive * (0.5 + (item < 4)))
            out.writerow([f"i{item}", "abc"[number % 3], f"{price:.3f}", number // 40, clicked])
    return str(path)


FILES = {"label": "clicked", "dim": 3, "widths": (5,)}


# ---- the sample ----------------------------------------------------------------------------------


def test_it_is_a_task_on_the_shipped_sample(task):
    assert isinstance(task, Task)
    rows, held_out, vocabulary = task._ready()
    assert len(rows) == 5000
    assert (len(held_out), int(held_out.labels.sum())) == (23_562, 2_052)
    assert set(held_out.time.tolist()) == {49, 50, 51, 52, 53}
    assert rows.data.time.min() >= 2
    assert rows.data.time.max() <= 44
    assert [field.name for field in vocabulary.fields][:2] == ["product_id", "store_id"]
    assert task.domain_of(torch.arange(3)).tolist() == [0, 0, 0]
    order = task.order(0, torch.Generator().manual_seed(1))
    assert sorted(order.tolist()) == list(range(5000))
    assert "weeks 2 to 44" in task.remark


def test_batches_losses_and_a_start_at_the_base_rate(task):
    model = task.model(0)
    batch = task.train.batch(torch.tensor([5, 2, 5]))
    assert batch["ids"].dtype == torch.int64
    assert batch["ids"].shape == (3, 10)
    assert torch.equal(batch["ids"][0], batch["ids"][2])
    assert batch["numeric"].shape == (3, 0)
    losses, outputs = task.losses(model, batch)
    assert losses.dtype == batch["labels"].dtype == torch.float32
    chance = outputs.sigmoid()
    wanted = -(batch["labels"] * chance.log() + (1 - batch["labels"]) * (1 - chance).log())
    assert torch.allclose(losses, wanted, atol=1e-6)
    rate = task._ready()[0].data.labels.mean()
    assert abs(float(model.bias.detach().sigmoid()) - rate) < 1e-3


def test_models_are_by_seed_and_the_global_generators_stay(task):
    before = random_state()["torch"]
    one, same, another = task.model(1), task.model(1), task.model(2)
    assert torch.equal(random_state()["torch"], before)
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(one.tables.vectors.weight, another.tables.vectors.weight)


def test_the_metric_is_the_mean_over_its_documents(task):
    model = task.model(3)
    found, documents = task.evaluate(model), task.documents(model)
    values, labels = task._scored(model)
    assert found["auc"] == found["auc/all rows"] == pytest.approx(100 * auc(values, labels))
    assert found["auc"] == pytest.approx(float(documents["all rows"].mean()))
    assert documents["all rows"].dtype == torch.float64
    assert len(documents["all rows"]) == 2_052
    assert found["log_loss"] == pytest.approx(
        float(torch.nn.functional.binary_cross_entropy_with_logits(values, labels.float())), 1e-5
    )
    assert all(np.isfinite(value) for value in found.values())


def test_what_the_page_shows(task):
    shown = task.page(task.model(0), 0)
    calibration, by_week = shown["tables"]
    assert sum(int(row[0].replace(",", "")) for row in calibration["rows"]) == 23_562
    assert [row[0] for row in by_week["rows"]] == ["49", "50", "51", "52", "53"]
    assert sum(int(row[2].replace(",", "")) for row in by_week["rows"]) == 2_052
    assert set(shown["also"]) <= set(task.evaluate(task.model(0)))
    json.dumps(shown, allow_nan=False)
    (row,) = task.show(task.model(0), [4])
    assert row["text"].startswith("product_id ")
    assert task.show(task.model(0), []) == []


class Scaled(torch.nn.Module):
    """A click model times a plain number, which no state dict has; it counts rows."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.by, self.rows = inner, 1.0, 0

    def forward(self, ids, numeric):
        self.rows += len(ids)
        return self.inner(ids, numeric) * self.by


def test_held_out_rows_are_scored_once_for_metrics_documents_and_page(task):
    model = Scaled(task.model(7))
    size, part = len(task._held_out), task.options.eval_batch
    part = min(part, size)
    found = task.evaluate(model)
    assert model.rows == size + part
    task.documents(model)
    task.page(model, 0)
    assert task.evaluate(model) == found
    assert model.rows == size + 4 * part
    weights = model.inner.tables.linear.weight
    weights.data += torch.randn(weights.shape)  # past autograd's count of changes
    other = task.evaluate(model)
    assert other != found
    assert model.rows == 2 * size + 5 * part
    model.by = -1.0
    assert task.evaluate(model)["auc"] == pytest.approx(100 - other["auc"])
    assert model.rows == 3 * size + 6 * part


def test_scores_that_are_not_finite_are_a_diverged_run(task):
    model = task.model(0)
    with torch.no_grad():
        model.bias.fill_(torch.nan)
    with pytest.raises(DivergedError, match="log-odds of held-out rows are not finite"):
        task.evaluate(model)


def test_a_part_of_the_rows_is_the_same_for_every_seed_and_another_part_of_data(task):
    other = Clicks(rows=5000, split="development")
    other.prepare(9)
    assert np.array_equal(other._ready()[0].data.ids, task._ready()[0].data.ids)
    assert other.fingerprint != task.fingerprint
    assert set(other._ready()[1].time.tolist()) == {45, 46, 47, 48}


# ---- files of one's own --------------------------------------------------------------------------


def test_files_split_by_time_with_columns_found(tmp_path):
    task = Clicks(path=write(tmp_path / "log.csv"), time="day", development=6, test=8, **FILES)
    task.prepare(0)
    rows, held_out, vocabulary = task._ready()
    assert (len(rows), len(held_out)) == (240, 80)
    assert [field.name for field in vocabulary.fields] == ["item", "place"]
    assert [scale.name for scale in vocabulary.scales] == ["price"]
    model = task.model(0)
    assert (model.tables.sizes, model.numeric) == (vocabulary.sizes, 1)
    assert task.losses(model, task.train.batch(torch.arange(4)))[0].shape == (4,)
    assert [table["title"] for table in task.page(model, 0)["tables"]][1] == "AUC by day"
    assert set(task.references()["smoothed rates"]) == {"all rows", "mean"}


def test_files_split_by_hash_with_columns_named(tmp_path):
    path = write(tmp_path / "log.csv")
    task = Clicks(path=path, categorical=["item"], test=0.25, development=0, **FILES)
    task.prepare(0)
    rows, held_out, vocabulary = task._ready()
    assert len(rows) + len(held_out) == 400
    assert 60 < len(held_out) < 140
    assert (len(vocabulary.fields), len(vocabulary.scales)) == (1, 0)
    with pytest.raises(RequestError, match="no development rows"):
        Clicks(
            path=path, categorical=["item"], test=0.25, development=0, split="development", **FILES
        ).prepare(0)


def test_one_class_held_out_has_no_auc_and_says_so(tmp_path):
    path = tmp_path / "log.csv"
    write(path)
    lines = path.read_text().splitlines()
    lines[321:] = [line[:-1] + "0" for line in lines[321:]]  # day 8 on
    path.write_text("\n".join(lines) + "\n")
    task = Clicks(path=str(path), time="day", development=6, test=8, **FILES)
    task.prepare(0)
    assert (task.metric, task.higher_is_better) == ("log_loss", False)
    assert task.remark.startswith("All 80 held-out rows are negative: AUC is undefined.")
    model = task.model(0)
    found = task.evaluate(model)
    assert set(found) == {"log_loss", "log_loss/all rows", "calibration_error"}
    assert found["log_loss"] == pytest.approx(float(task.documents(model)["all rows"].mean()))
    assert task.references() == {}
    assert task.page(model, 0)["tables"][1]["rows"][0][3] == "undefined"
    json.dumps(task.page(model, 0), allow_nan=False)
    assert Clicks.metric == "auc"


# ---- out of here ---------------------------------------------------------------------------------


def test_a_trained_model_leaves_with_its_vocabulary(tmp_path):
    path = write(tmp_path / "log.csv")
    task = Clicks(path=path, time="day", development=6, test=8, **FILES)
    task.prepare(0)
    model = task.model(0)
    model.train()
    task.export(model, tmp_path / "model")
    assert model.training
    found = saved.read(tmp_path / "model")
    assert found.label == "clicked"
    columns = {"item": ["i1", "i7", "never seen", None], "place": ["a", "b", "c", "a"],
               "price": [0.5, -1.0, None, 2.0]}  # fmt: skip
    odds = found.log_odds(columns)
    ids = torch.from_numpy(found.vocabulary.encode(columns))
    assert (int(ids[2, 0]), int(ids[3, 0])) == (1, 0)
    numeric = torch.from_numpy(found.vocabulary.numeric(columns))
    assert torch.equal(odds, model.eval()(ids, numeric).detach())
    assert np.allclose(found.predict(columns), odds.double().sigmoid())
    program = torch.export.load(tmp_path / "model" / "program.pt2").module()
    for some in (slice(0, 4), slice(1, 2)):
        assert torch.allclose(program(ids[some], numeric[some]), odds[some], atol=1e-6)


def test_rates_are_where_the_model_begins_and_leave_with_it(tmp_path):
    path = write(tmp_path / "log.csv", rows=2000)
    task = Clicks(path=path, label="clicked", model="wide-deep", rates=True, dim=4, widths=(8,))
    task.prepare(0)
    plain = Clicks(path=path, label="clicked", model="wide-deep", dim=4, widths=(8,))
    plain.prepare(0)
    assert task.fingerprint == plain.fingerprint
    model = task.model(0)
    batch = task.train.batch(torch.arange(2000 // 2))
    assert batch["numeric"].shape[1] == plain.train.batch(torch.arange(2))["numeric"].shape[1] + 1
    # at its beginning it says about what the rates say
    torch.nn.init.zeros_(model.numeric_linear.weight[:, :-1])
    said = model.eval()(batch["ids"], batch["numeric"]).detach()
    assert torch.corrcoef(torch.stack([said, batch["numeric"][:, -1]]))[0, 1] > 0.9
    task.export(model, tmp_path / "out")
    held = task._held_out
    read = saved.read(tmp_path / "out")
    with open(path, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = {
        "item": [row["item"] for row in rows],
        "place": [row["place"] for row in rows],
        "price": [float(row["price"]) for row in rows],
        "day": [int(row["day"]) for row in rows],
    }
    every = read.log_odds(columns)
    with torch.no_grad():
        ours = model(
            torch.from_numpy(held.ids.astype(np.int64)), torch.from_numpy(held.numeric)
        ).float()
    # held-out rows are among the file's, each with the log-odds that the task gives it
    assert torch.isclose(ours[:, None], every[None]).any(1).all()


def test_no_training_row_sees_a_rate_that_its_own_label_went_into():
    ids = np.zeros((100, 1), dtype=np.int32)
    ids[:, 0] = np.arange(100) // 2 + 2
    labels = np.zeros(100, dtype=np.uint8)
    labels[::4] = 1
    none = np.zeros((100, 0), dtype=np.float32)
    data = Encoded(ids, none, labels, np.zeros(100, dtype=np.int64), np.array([0, 100]))
    rates = prior.fit(data, (52,))
    before = prior.out_of_fold(data, (52,), rates)
    for row in range(0, 100, 9):
        changed = labels.copy()
        changed[row] = 1 - changed[row]
        again = dataclasses.replace(data, labels=changed)
        assert prior.out_of_fold(again, (52,), rates)[row] == before[row]


def test_what_is_no_saved_model_is_refused(tmp_path, task):
    with pytest.raises(RequestError, match="no whole click model"):
        saved.read(tmp_path)
    with pytest.raises(RequestError, match="only a ClickModel can be written here, got Linear"):
        saved.write(torch.nn.Linear(2, 1), tmp_path / "m", task._ready()[2], "bought")
    (tmp_path / "config.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(RequestError, match="has format 2, this version reads up to 1"):
        saved.read(tmp_path)


# ---- rows ----------------------------------------------------------------------------------------


def encoded(rows: int, block: int) -> Encoded:
    number = np.arange(rows)
    bounds = np.append(np.arange(0, rows, block), rows)
    ids = np.stack([number, number], 1).astype(np.int32)
    return Encoded(
        ids, np.zeros((rows, 0), np.float32), (number % 2).astype(np.uint8), number, bounds
    )


def test_rows_on_the_disk_are_mixed_a_few_blocks_at_a_time():
    rows = Rows(encoded(1000, 10), mapped=True)
    order = rows.order(torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(1000))
    for part in order.split(80):
        assert len({number // 10 for number in part.tolist()}) == len(part) // 10
    assert torch.equal(order, rows.order(torch.Generator().manual_seed(0)))
    assert not torch.equal(order, rows.order(torch.Generator().manual_seed(1)))


def test_drawn_rows():
    whole = encoded(100, 100)
    some = drawn(whole, 30)
    assert (len(some), len(set(some.time.tolist()))) == (30, 30)
    assert (np.diff(some.time) > 0).all()
    assert np.array_equal(some.time, drawn(whole, 30).time)
    assert drawn(whole, 100) is whole


# ---- the label -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "label"),
    [(["a", "Click"], "Click"), (["label", "labelled"], "label"), (["y", "x"], "y")],
)
def test_the_label_is_found_by_its_name(columns, label):
    assert label_of(columns) == label


@pytest.mark.parametrize(
    ("columns", "why"),
    [(["a", "b"], "a, b none is called label"), (["y", "click"], "y and click may be it")],
)
def test_a_label_that_is_not_plain_has_to_be_named(columns, why):
    with pytest.raises(RequestError, match=f"label must name the column .*{why}"):
        label_of(columns)


def test_files_need_no_more_than_their_path(tmp_path):
    rows = ["click,shop,price"] + [f"{i % 3 == 0:d},{i % 5},{i}.5" for i in range(400)]
    (tmp_path / "log.csv").write_text("\n".join(rows))
    task = Clicks(path=str(tmp_path / "log.csv"), widths=(4,))
    task.prepare(0)
    assert task.evaluate(task.model(0))["auc"] > 0
    (tmp_path / "log.csv").write_text("a,b\n1,2\n")
    task = Clicks(path=str(tmp_path / "log.csv"))
    with pytest.raises(RequestError, match="none is called label"):
        task.prepare(0)


# ---- wrong requests ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"datset": "retail"}, 'no option "datset"; did you mean "dataset"'),
        ({"dataset": "retial"}, 'unknown dataset "retial"; did you mean "retail"'),
        ({"split": "train"}, "split must be test or development"),
        ({"hold": "ram"}, "hold must be auto, memory or disk"),
        ({"model": "deepmf"}, 'unknown model "deepmf"; did you mean "deepfm"'),
        ({"label": "clicked"}, "label is for files of your own: give their path"),
        ({"test": 0.1}, "test is for files of your own"),
        ({"path": "x.csv", "label": "y", "time": "day"}, "development must say from which value"),
        (
            {"path": "x", "label": "y", "time": "d", "development": 1.5, "test": 2},
            "development must be a whole number, a time",
        ),
        ({"path": "x", "label": "y", "test": 7}, r"share of the rows: must be in \[0, 1\], got 7"),
        ({"dataset": "retail", "buckets": 100}, "leave buckets out"),
        ({"rows": 1}, "rows must be at least 2"),
        ({"cut_off": 0}, "cut_off must be at least 1"),
        ({"widths": ()}, "widths must name"),
        ({"dim": 0}, "dim must be at least 1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(RequestError, match=message):
        Clicks(**options)


def test_before_prepare_it_says_so():
    for use in (len, lambda train: train.batch(torch.tensor([0]))):
        with pytest.raises(RequestError, match="call prepare"):
            use(Clicks().train)
    with pytest.raises(RequestError, match="call prepare"):
        Clicks().model(0)
    with pytest.raises(RequestError, match="no passages"):
        Clicks().read(ClickModel("lr", (2,)), {})


# ---- recipes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clicks-cowclip", "clicks-journey"])
def test_arms_differ_from_the_small_batch_by_their_rule(name):
    whole = recipe.load(name, smoke=False)
    small = whole.arms["small batch"].set
    base, rate = small["train.batch_size"], small["train.learning_rate"]
    table = whole.methods["cowclip"]["table_lr"]
    powers = {"cowclip": (0.5, 0), "clip off": (0.5, 0), "linear": (1, 1), "sqrt": (0.5, 0.5),
              "none": (0, 0)}  # fmt: skip
    checked = 0
    for arm, about in whole.arms.items():
        rule, _, size = arm.partition(" 65536") if "65536" in arm else arm.partition(" 131072")
        if rule not in powers:
            continue
        batch = about.set.get("train.batch_size", whole.train.batch_size)
        factor = batch * about.set.get("train.accumulate", whole.train.accumulate) / base
        assert batch <= 8192, arm  # larger ones leave the caches
        assert factor == {"": 8, "65536": 64, "131072": 128}[arm.removeprefix(rule).strip()], arm
        dense, tables = (factor**power for power in powers[rule])
        lr = about.set.get("train.learning_rate", whole.train.learning_rate)
        assert lr == pytest.approx(rate * dense, rel=1e-3), (arm, size)
        assert about.set.get("methods.cowclip.table_lr", table) == pytest.approx(
            table * tables, rel=1e-3
        ), arm
        off = float(about.set.get("methods.cowclip.ratio", 1.0)) == float("inf")
        assert off == (rule != "cowclip"), arm
        checked += 1
    assert checked >= 5


@pytest.mark.parametrize("name", ["clicks-cowclip", "clicks-journey"])
def test_a_comparison_of_its_arms_can_be_written_down(name):
    whole = recipe.load(name, smoke=False)
    json.dumps({n: arm.set for n, arm in whole.arms.items()}, allow_nan=False)
    off = recipe.load(name, as_overrides(whole.arms["clip off"].set), smoke=False)
    assert off.methods["cowclip"]["ratio"] == float("inf")


def test_a_smoke_run_of_the_recipe_writes_its_page(smoke_run):
    run = smoke_run("clicks-cowclip")
    summary = json.loads(run.stdout)
    assert summary["metric"]["name"] == "auc"
    assert summary["metric"]["higher_is_better"] is True
    page = (run.path / "report.html").read_text(encoding="utf-8")
    shown_there = [
        "Predicted and observed rates",
        "AUC by week",
        "log loss on held-out rows",
        "predicted over observed positives, against steps",
        "smoothed rates",
    ]
    for shown in shown_there:
        assert shown in page
    assert "What it writes" not in page
    assert (run.path / "model" / "program.pt2").is_file()
