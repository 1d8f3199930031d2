"""Comparing runs that are there: what is paired, what is refused, what is said."""

from __future__ import annotations

import json

import pytest
from arms_on_disk import MARGIN, VALUES, arms_on_disk, diverge, documents, edit, edit_recipe

import sparing
from sparing.core.errors import RequestError, RunError
from sparing.run.compare.record import write
from sparing.run.compare.told import lines


def compared(runs, baseline="dense", margin=MARGIN, **options):
    return sparing.compare(runs, baseline=baseline, margin=margin, **options)


def test_differences_are_paired_by_seed_and_judged(tmp_path):
    found = compared(arms_on_disk(tmp_path), baseline="top-k 2")
    arm = found.arm("top-k 4")
    assert arm.values == {0: 1.962, 1: 1.981, 2: 1.975}
    assert arm.judgement.paired.estimate == pytest.approx((0 - 0.001 - 0.001) / 3)
    assert arm.judgement.verdict == "equivalent"
    assert found.arm("dense").judgement.verdict == "different"
    assert found.arm("top-k 2").judgement is None  # the baseline
    assert arm.costs == {"flops": pytest.approx(12e12 * 1.6), "seconds": 102.0}
    assert found.warnings == []
    assert found.missing == []
    with pytest.raises(RequestError, match='unknown arm "top-k 3"; did you mean "top-k'):
        found.arm("top-k 3")


def test_runs_by_directory_are_the_same_arms(tmp_path):
    arms = arms_on_disk(tmp_path)
    by_name = compared(arms).to_dict()
    paths = [path for each in arms.values() for path in each]
    by_folder = compared(paths).to_dict()
    for name, arm in by_name["arms"].items():
        assert by_folder["arms"][name.replace(" ", "-")] == arm


def test_runs_of_equal_settings_are_one_arm(tmp_path):
    arms = arms_on_disk(tmp_path / "made")
    paths = []
    for arm in ("dense", "top-k 2"):
        for seed, path in enumerate(arms[arm]):
            if arm == "top-k 2":
                edit_recipe(path, "max_experts: 8", "max_experts: 9")
            paths.append(path.rename(tmp_path / f"{arm.replace(' ', '')}-{seed}"))
    found = compared(paths, baseline="dense-0")
    assert {arm.name: len(arm.runs) for arm in found.arms} == {"dense-0": 3, "top-k2-0": 3}


def test_to_dict_is_json_and_complete(tmp_path):
    found = compared(arms_on_disk(tmp_path)).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [run["value"] for run in found["arms"]["dense"]["runs"]] == VALUES["dense"]
    judged = found["arms"]["top-k 2"]["judgement"]
    assert judged["paired"]["level"] == 0.95
    assert judged["verdict"] == "different"


def test_lines_show_seeds_intervals_and_verdicts(tmp_path):
    text = "\n".join(lines(compared(arms_on_disk(tmp_path), baseline="top-k 2")))
    assert "bits_per_byte (lower is better), against top-k 2, margin ±0.02 bits_per_byte" in text
    assert "0: 2.0600  1: 2.0900  2: 2.0680" in text
    assert "top-k 4: EQUIVALENT. " in text
    assert "dense: DIFFERENT. " in text
    assert "difference, unpaired" in text
    assert str(compared(arms_on_disk(tmp_path), baseline="top-k 2")) == text


def test_undecided_says_how_many_seeds(tmp_path):
    values = {"dense": [2.00, 2.05, 2.02], "wide": [2.02, 2.03, 2.03]}
    found = compared(arms_on_disk(tmp_path, values))
    needed = found.arm("wide").judgement.seeds_needed
    assert found.arm("wide").judgement.verdict == "undecided"
    assert needed > 3
    assert f"  {needed} seeds in all would probably decide it" in lines(found)


def test_one_seed_has_no_interval_and_says_so(tmp_path):
    values = {"dense": [2.06], "top-k 2": [1.96]}
    found = compared(arms_on_disk(tmp_path, values))
    judgement = found.arm("top-k 2").judgement
    assert (judgement.verdict, judgement.paired, judgement.unpaired) == (None, None, None)
    assert "one" in judgement.why
    assert any(line.startswith("top-k 2: NO VERDICT. ") for line in lines(found))


def test_diverged_and_missing_runs_stay_in_sight(tmp_path):
    arms = arms_on_disk(tmp_path)
    diverge(arms["top-k 2"][1])
    (arms["top-k 4"][2] / "summary.json").unlink()
    found = compared(arms)
    assert [run.state for run in found.arm("top-k 2").runs] == ["finished", "diverged", "finished"]
    assert found.arm("top-k 2").judgement.n == 2
    assert found.missing == [
        "top-k 2, seed 1: diverged, the loss is not finite at step 20",
        "top-k 4, seed 2: unfinished, it was not run to its end",
    ]
    assert "missing: top-k 2, seed 1: diverged, the loss is not finite at step 20" in lines(found)
    assert "diverged" in found.page(tmp_path / "page.html").read_text()
    for path in arms["top-k 2"][::2]:
        diverge(path)
    whole = compared(arms)
    assert whole.arm("top-k 2").judgement is None
    assert whole.arm("top-k 2").mean is None


def test_an_infinite_metric_counts_as_diverged(tmp_path):
    arms = arms_on_disk(tmp_path)
    edit(arms["top-k 2"][0], metric={"name": "bits_per_byte", "value": 1e400,
                                     "higher_is_better": False})  # fmt: skip
    assert compared(arms).arm("top-k 2").runs[0].state == "diverged"


def test_other_code_is_a_warning_and_a_mark(tmp_path):
    arms = arms_on_disk(tmp_path)
    edit(arms["top-k 4"][1], code="ab" * 32)
    found = compared(arms)
    assert found.code == "9f2a" * 16
    assert found.warnings == [
        "runs were made by different code: most by 9f2a9f2a9f2a, of top-k 4 some by abababababab; "
        "what changed between them may be a difference"
    ]
    page = found.page(tmp_path / "page.html").read_text()
    assert "1.981†" in page
    assert page.count("†") == 2  # the run, and what the sign means


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus": "be" * 32}, r"differ in data \(the hash of the corpus\): c0ffeec0ffee in "),
        ({"task": "clicks"}, r"differ in task: language in "),
        (
            {"metric": {"name": "accuracy", "value": 0.5, "higher_is_better": False}},
            r"differ in metric \(name\): bits_per_byte in ",
        ),
        (
            {"metric": {"name": "bits_per_byte", "value": 0.5, "higher_is_better": True}},
            r"differ in metric \(higher_is_better\): False in ",
        ),
    ],
)
def test_arms_on_other_data_are_refused(tmp_path, change, message):
    arms = arms_on_disk(tmp_path)
    edit(arms["top-k 2"][1], **change)
    with pytest.raises(RequestError, match=f'the arms "dense" and "top-k 2" {message}'):
        compared(arms)


def test_other_evaluation_or_budget_is_refused(tmp_path):
    arms = arms_on_disk(tmp_path)
    for path in arms["top-k 2"]:
        edit_recipe(path, "  dim: 128", "  dim: 128\n  eval_windows: 4")
    with pytest.raises(RequestError, match=r"differ in evaluation \(task.eval_windows\): None in"):
        compared(arms)
    for path in arms["top-k 2"]:
        edit_recipe(path, "\n  eval_windows: 4", "")
        edit_recipe(path, "batch: 32", "train: {tokens: 99}")
    with pytest.raises(RequestError, match=r"differ in budget \(train.tokens\): None in .*, 99 in"):
        compared(arms)


def test_a_declared_budget_may_differ_and_other_training_is_told(tmp_path):
    from sparing.run.compare.finished import judged
    from sparing.run.compare.found import find

    arms = arms_on_disk(tmp_path)
    for name, tokens in (("dense", 5), ("top-k 2", 9), ("top-k 4", 5)):
        for path in arms[name]:
            batch = 16 if name == "top-k 4" else 8
            train = f"train: {{tokens: {tokens}, batch_size: {batch}}}"
            edit_recipe(path, "batch: 32", train)
    found = judged(
        {name: [find(path, name) for path in paths] for name, paths in arms.items()},
        baseline="dense",
        margin=MARGIN,
        declared={"top-k 2": {"set": {"train.tokens": 9}}},
    )
    assert found.warnings == ['"dense" and "top-k 4" also differ in train.batch_size: 8 and 16']


def test_runs_of_one_arm_must_be_alike(tmp_path):
    arms = arms_on_disk(tmp_path)
    edit_recipe(arms["dense"][1], "  dim: 128", "  dim: 64")
    with pytest.raises(RequestError, match=r'runs of the arm "dense" are not alike: .* task.dim'):
        compared(arms)
    arms = arms_on_disk(tmp_path)
    edit(arms["dense"][1], seed=0)
    with pytest.raises(RequestError, match='the arm "dense" has seed 0 twice, in '):
        compared(arms)


@pytest.mark.parametrize("margin", ["0.02 bits_per_byte", "+-0.02", "+-0.02 accuracy"])
def test_a_margin_without_sign_or_unit_is_refused(tmp_path, margin):
    with pytest.raises(RequestError, match="margin"):
        compared(arms_on_disk(tmp_path), margin=margin)


def test_what_is_not_given_or_not_there(tmp_path):
    arms = arms_on_disk(tmp_path)
    with pytest.raises(RequestError, match="name the baseline, one of the arms: dense, top-k 2"):
        compared(arms, baseline=None)
    with pytest.raises(RequestError, match='unknown arm as baseline "dens"; did you mean "dense"'):
        compared(arms, baseline="dens")
    with pytest.raises(RequestError, match=r'by margin: "\+-0.02 bits_per_byte"'):
        compared(arms, margin=None)
    with pytest.raises(RequestError, match="holds no run"):
        compared({"dense": arms["dense"], "none": tmp_path})
    with pytest.raises(RequestError, match="no run directory was given"):
        compared([])
    for paths in arms.values():
        for path in paths:
            diverge(path)
    with pytest.raises(RunError, match="no run is finished, so there is nothing to compare"):
        compared(arms)


def test_damaged_files_are_named(tmp_path):
    arms = arms_on_disk(tmp_path)
    file = arms["dense"][0] / "summary.json"
    for text, message in (
        ("{", r"summary.json is not JSON"),
        ("[]", "must hold a JSON object, found list"),
        ('{"format": 9}', "has format 9, this version reads up to 1"),
    ):
        file.write_text(text)
        with pytest.raises(RequestError, match=message):
            compared(arms)


def test_documents_are_resampled_where_every_run_has_them(tmp_path):
    values = {"dense": [2.0, 2.2], "top-k 2": [1.9, 2.1]}
    arms = arms_on_disk(tmp_path, values)
    for name, paths in arms.items():
        for path, value in zip(paths, values[name], strict=True):
            # domains of different sizes: the metric is the mean over domains, not documents
            documents(path, b=[value + 0.1], a=[value - 0.2, value + 0.1, value - 0.2])
    found = compared(arms).arm("top-k 2").judgement
    assert found.documents.estimate == pytest.approx(-0.1)
    assert found.documents.method == "bootstrap over seeds and documents"
    documents(arms["dense"][0], a=[1.0])
    assert compared(arms).arm("top-k 2").judgement.documents is None
    (arms["dense"][0] / "documents.safetensors").write_bytes(b"\x10" * 9)
    with pytest.raises(RequestError, match=r"documents.safetensors cannot be read"):
        compared(arms)


def test_a_record_has_every_run_and_no_path(tmp_path):
    arms = arms_on_disk(tmp_path)
    diverge(arms["top-k 4"][0])
    record = json.loads(write(tmp_path / "records" / "mine.json", compared(arms)).read_text())
    assert (record["name"], record["kind"]) == ("mine", "comparison")
    assert record["code"] == "9f2a" * 16
    assert record["machine"]["torch"]
    runs = record["results"]["arms"]["top-k 4"]["runs"]
    assert [run["state"] for run in runs] == ["diverged", "finished", "finished"]
    assert str(tmp_path) not in json.dumps(record)
