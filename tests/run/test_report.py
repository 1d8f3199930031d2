"""The page: complete, self-contained, escaped, readable, and honest about what is missing."""

from __future__ import annotations

import json
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sparing.core.errors import RequestError
from sparing.run.report import charts, curves, layers, passages, render, words, write, write_many
from sparing.run.report.clipped import clipped
from sparing.run.report.read import read

make = runpy.run_path(str(Path(__file__).parents[1] / "fixtures" / "fake_run.py"))["make"]
STYLE = Path(sys.modules["sparing.run.report"].__file__ or "").with_name("style.css").read_text()
VOID = {"meta", "br", "path", "link", "img"}


class Page(HTMLParser):
    """Text, tags and attributes; fails on tags that do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def page(path: Path) -> Page:
    return Page(write(path).read_text(encoding="utf-8"))


def edit(path: Path, **changes: Any) -> None:
    held = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(held | changes), encoding="utf-8")


def test_the_page_is_one_file_that_asks_for_nothing(tmp_path: Path) -> None:
    source = write(make(tmp_path / "run")).read_text(encoding="utf-8")
    found = Page(source)
    assert len(source) < 500_000
    assert "://" not in source
    assert "url(" not in source
    assert "@import" not in source
    assert {tag for tag, _ in found.tags} & {"script", "link", "img", "iframe"} == set()
    assert not any("src" in attrs or "href" in attrs for _, attrs in found.tags)
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_page_says_what_the_run_reached(tmp_path: Path) -> None:
    text = page(make(tmp_path / "run")).text
    assert "1.93 bits per byte" in text
    assert re.search(r"beats a 5-gram model \(2\.11\) by 9\W% and xz \(2\.32\) by 17\W%", text)
    for expected in (
        "3 min 41 s".replace(" s", words.THIN + "s").replace("3 ", "3" + words.THIN),
        "every live expert",
        "layer 3",
        "expert removed",
        "masking it changes the loss",
        "target_k: 2.0",
        "2.13.0+cpu",
        "9f2a" * 16,
        "sparing run language-dynmoe --out runs/first",
    ):
        assert expected in text, expected


@pytest.mark.parametrize(
    ("offset", "sentence"),
    [
        (0.25, r"beats xz \(2\.32\) by 6\W%, but is 3\W% behind a 5-gram model \(2\.11\)"),
        (0.5, r"15\W% behind a 5-gram model \(2\.11\) and 5\W% behind xz \(2\.32\)"),
    ],
)
def test_the_verdict_tells_a_defeat(tmp_path: Path, offset: float, sentence: str) -> None:
    assert re.search(sentence, page(make(tmp_path / "run", offset=offset)).text)


def test_the_same_input_gives_the_same_page(tmp_path: Path) -> None:
    first = write(make(tmp_path / "a" / "run")).read_bytes()
    assert write(make(tmp_path / "b" / "run")).read_bytes() == first
    assert write(tmp_path / "a" / "run").read_bytes() == first


def test_text_is_escaped_everywhere(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    evil = "<script>alert('x')</script>"
    (run / "recipe.yaml").write_text(f"name: {evil}\n", encoding="utf-8")
    row = {"kind": "event", "event": evil, "step": 5, "layer": evil, "expert": evil, "why": evil}
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    edit(run / "summary.json", recipe=evil, environment={"device": evil}, code=evil)
    edit(
        run / "page.json",
        samples=[{"domain": evil, "prompt": evil, "text": evil}],
        passages=[{"domain": evil, "bytes": list(evil.encode()), "k": [1.5] * len(evil)}],
        history={evil: {"steps": [1, 2], "alive": [1, 2], "mean_k": [1, 2], "unserved": [0, 0]}},
        load={evil: [[1, 2], [3, 4]]},
        domains=[evil, "b"],
        references={evil: {"mean": 2.0}},
        command=evil,
    )
    found = page(run)
    assert "script" not in {tag for tag, _ in found.tags}
    assert found.text.count(evil) >= 12


def test_a_passage_keeps_its_text_and_shows_what_cannot_be_seen(tmp_path: Path) -> None:
    text = "a é\tb\n".encode() + b"\x00\xff\xe2\x80"
    run = make(tmp_path / "run")
    spans = {"domain": "d", "bytes": list(text), "k": list(range(len(text)))}
    edit(run / "page.json", passages=[spans])
    found = passages.coloured(read(run))
    assert found is not None
    ((_, runs),) = found["passages"]
    pieces = [piece for _, _, run_ in runs for piece in run_]
    assert "".join(t for _, t in pieces) == "a é\tb\n\\x00\\xff\\xe2\\x80"
    assert ("n", "\n") in pieces
    assert ("s", " ") in pieces
    assert ("t", "\t") in pieces
    levels = [level for level, _, _ in runs]
    assert levels == sorted(levels)
    assert levels[0] == 0
    assert levels[-1] == 8
    accent = next(title for _, title, run_ in runs if ("", "é") in run_)
    assert float(accent) == 2.5  # the mean of its two bytes, 2 and 3


def test_a_run_killed_in_the_middle_gets_a_page(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    (run / "summary.json").unlink()
    (run / "page.json").unlink()
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8")
    (run / "metrics.jsonl").write_text(lines[: len(lines) // 2], encoding="utf-8")
    text = page(run).text
    assert "did not finish" in text
    assert "1 unreadable line" in text
    assert "so far" in text
    assert "no reference was recorded" in text
    assert "No ledger" in text
    assert "mean of all layers" in text


def test_a_run_that_barely_began_gets_a_page(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: language-dynmoe\n", encoding="utf-8")
    text = page(tmp_path).text
    for expected in ("No result yet", "No training step", "No evaluation", "did not finish"):
        assert expected in text


def test_a_dense_run_without_domains_gets_a_page(tmp_path: Path) -> None:
    run = make(tmp_path / "run", methods=False)
    edit(run / "page.json", domains=[])
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if "/" not in k} for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = page(run).text
    assert "No method was attached" in text
    assert "no domains" in text


def test_numbers_that_are_none_leave_no_trace(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 428, "tokens": 3506177, "loss": NaN}\n')
        file.write('{"kind": "eval", "step": 428, "bits_per_byte": null}\n')
    broken = {"model.layers.0.mlp": {"steps": [1], "alive": [None]}}
    edit(run / "page.json", history=broken, passages=[], samples=[])
    source = write(run).read_text(encoding="utf-8")
    assert re.findall(r"\bnan\b|\bNone\b|\binf\b", source) == []


def test_a_step_logged_twice_by_a_resumed_run_counts_once(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    once = read(run)
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    (run / "metrics.jsonl").write_text(text + text, encoding="utf-8")
    twice = read(run)
    assert (twice.train, twice.evals, twice.events) == (once.train, once.evals, once.events)


def test_a_wrong_directory_is_a_wrong_request(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="not a directory"):
        write(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="holds no run"):
        write(tmp_path)
    run = make(tmp_path / "run")
    edit(run / "summary.json", format=2)
    with pytest.raises(RequestError, match="upgrade"):
        write(run)
    (run / "summary.json").write_text("{", encoding="utf-8")
    with pytest.raises(RequestError, match="not JSON"):
        write(run)
    with pytest.raises(RequestError, match="no run directory"):
        write_many([])


def test_without_jinja2_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path / "run")
    render._environment.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(RequestError, match=re.escape('pip install "sparing[report]"')):
        write(run)
    assert not (run / "report.html").exists()


def test_runs_on_different_data_are_not_compared(tmp_path: Path) -> None:
    runs = [
        make(tmp_path / "a"),
        make(tmp_path / "b", offset=0.3, seed=1),
        make(tmp_path / "c", corpus="d" * 40),
    ]
    out = write_many(runs)
    assert out == tmp_path / "runs.html"
    found = Page(out.read_text(encoding="utf-8"))
    links = [attrs["href"] for tag, attrs in found.tags if tag == "a"]
    assert links == ["a/report.html", "b/report.html", "c/report.html"]
    assert all((tmp_path / str(link)).is_file() for link in links)
    assert "must not be compared" in found.text
    assert sum(tag == "section" for tag, _ in found.tags) == 2
    alone = Page(write_many(runs[:2]).read_text(encoding="utf-8"))
    assert "must not be compared" not in alone.text


def test_a_metric_in_another_unit_than_the_loss_has_its_own_chart(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    edit(
        run / "summary.json",
        metric={"name": "accuracy", "value": 0.93, "higher_is_better": True},
    )
    rows = (run / "metrics.jsonl").read_text(encoding="utf-8").replace("bits_per_byte", "accuracy")
    (run / "metrics.jsonl").write_text(rows, encoding="utf-8")
    edit(run / "page.json", references={"dense": {"mean": 0.95}, "random": {"mean": 0.5}})
    text = page(run).text
    assert re.search(r"0\.93 accuracy\s*beats random \(0\.50\) by 86\W%, but is 2\W% behind", text)
    assert "training loss against tokens" in text
    assert "Bits per byte is" not in text


def test_evaluations_without_a_training_curve_are_seen_from_early_on(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    edit(
        run / "summary.json",
        metric={"name": "nats_per_token", "value": 1.6, "higher_is_better": False},
    )
    edit(run / "page.json", references={"before": {"mean": 1.3}})
    rows = [
        {"kind": "eval", "step": i, "tokens": 100 * i, "flops": 1e6 * i, "nats_per_token": y}
        for i, y in enumerate([9.0] + [1.6 + 1.6 / (1 + i / 3) for i in range(20)])
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    drawn = curves.loss_charts(read(run))[0]
    (dots,) = (path for path, style in drawn.paths if "dots" in style)
    heights = [float(y) for y in re.findall(r"M\S+ (\S+)h", dots)]
    assert len(heights) == 21
    inside = [y for y in heights if 0 <= y <= 1000]
    assert len(inside) == 19, "all but the first tenth"
    assert min(inside) < 100
    assert max(inside) > 600


# ---- charts and words --------------------------------------------------------------------------


def test_ticks_are_round_and_inside() -> None:
    assert charts.ticks(0, 3.5) == [0, 1, 2, 3]
    assert charts.ticks(1.8, 3.3) == [2.0, 2.5, 3.0]
    assert charts.ticks(2, 2) == [2]


def test_labels_are_spread_no_further_than_needed() -> None:
    assert charts.spread([10, 50], [6, 6]) == [10, 50]
    assert charts.spread([50, 50], [6, 6]) == [47, 53]
    assert charts.spread([50, 49], [6, 6]) == [52.5, 46.5]
    crowded = charts.spread([99, 99, 100, 98, 90], [6] * 5)
    assert max(crowded) <= 100
    assert charts.spread([50, 50], [6, 12]) == [44, 53]
    assert all(b - a >= 5.98 for a, b in zip(sorted(crowded), sorted(crowded)[1:], strict=False))


def test_smoothing_keeps_a_constant_and_length() -> None:
    series = [(float(i), 3.0) for i in range(50)]
    assert charts.smooth(series, 0.2) == series
    assert charts.smooth([], 0.2) == []
    ramp = [(float(i), float(i)) for i in range(101)]
    assert charts.smooth(ramp, 0.1)[50] == (50.0, 50.0)


def test_thinning_keeps_the_mean_and_the_end() -> None:
    series = [(float(i), float(i % 2)) for i in range(1000)]
    thinned = charts.thin(series, 100)
    assert len(thinned) == 100
    assert thinned[-1][0] == 999.0
    assert all(abs(y - 0.5) < 1e-9 for _, y in thinned)


def test_a_chart_maps_its_ranges_to_the_box() -> None:
    line = charts.Line(points=[(0, 0), (5, 10), (10, 5)], style="c1", label="end")
    drawn = charts.chart("k", [line], title="t", description="d", rules=[(10, "ref-a", "top")])
    assert drawn is not None
    assert drawn.paths == [("M0 0H1000", "rule ref-a"), ("M0 1000L500 0 1000 500", "c1")]
    assert [(label.text, label.at) for label in drawn.labels] == [("top", 0.0), ("end", 50.0)]
    empty = charts.Line(points=[], style="c1")
    assert charts.chart("k", [empty], title="t", description="d") is None


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (3_511_296, "tokens", "3.51_M"),
        (8192, "tokens", "8,192"),
        (1.234e12, "flops", "1.23_TFLOP"),
        (512, "bytes", "512_B"),
        (0, "labels", "0"),
    ],
)
def test_amounts_in_human_units(value: float, unit: str, text: str) -> None:
    assert words.amount(value, unit) == text.replace("_", words.THIN)


def test_words() -> None:
    assert words.duration(221.4) == f"3{words.THIN}min 41{words.THIN}s"
    assert words.duration(3.21) == f"3.2{words.THIN}s"
    assert words.duration(7384) == f"2{words.THIN}h 3{words.THIN}min"
    assert words.percent(0.0004) == f"<{words.THIN}1{words.THIN}%"
    assert words.percent(-0.081) == f"{words.MINUS}8{words.THIN}%"
    assert words.layer_name("model.layers.11.mlp") == "layer 11"
    assert words.layer_name("encoder.mlp") == "encoder.mlp"
    assert words.listing(["a", "b", "c"]) == "a, b and c"
    assert words.visible("a\r\n\x1b[0m\u202eb") == "a\n\\x1b[0m\\u202eb"
    assert words.device("Intel(R) Xeon(R) CPU @ 2.20GHz") == "Intel Xeon"


# ---- colours -------------------------------------------------------------------------------------


def _colours(block: str) -> dict[str, str]:
    found = dict(re.findall(r"--([\w-]+):(#[0-9a-f]{3,6})", block))
    return {k: v if len(v) == 7 else "#" + "".join(2 * c for c in v[1:]) for k, v in found.items()}


def _contrast(a: str, b: str) -> float:
    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(scheme: str) -> None:
    light, dark = STYLE.split("@media (prefers-color-scheme:dark)")
    colours = _colours(light if scheme == "light" else dark.split("}}")[0])
    words_on_paper = [
        "ink", "soft", "good", "bad", "c1", "c2", "c3", "c4", "c5", "c6", "ref-a", "ref-b", "ref-c"
    ]  # fmt: skip
    for name in words_on_paper:
        for ground in ("paper", "card"):
            assert _contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for i in range(passages.LEVELS):
        assert _contrast(colours["ink"], colours[f"r{i}"]) >= 4.5, i
    steps = [_contrast(colours[f"r{i}"], colours["card"]) for i in range(passages.LEVELS)]
    assert steps == sorted(steps)


def test_experts_change_at_the_step_of_their_event(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    name = "model.layers.0.mlp"
    history = {"steps": [4, 24, 28], "alive": [3, 3, 2], "mean_k": [2, 2, 1], "unserved": [0, 0, 0]}
    edit(run / "page.json", history={name: history})
    event = {"kind": "event", "event": "expert removed", "step": 24, "layer": name, "expert": 0}
    (run / "metrics.jsonl").write_text(json.dumps(event) + "\n", encoding="utf-8")
    (card,) = [card for card in layers.cards(read(run)) if card["path"] == name]
    path, style = card["experts"].paths[0]
    # 24 of 28 steps across; 3 and 2 experts of an axis that ends at 3.36
    assert (path, style) == ("M142.9 107H857.1V107H857.1V405H1000V405", "c1")
    ((x, y, shape, text),) = card["experts"].marks
    assert (x, y, shape) == (85.71, 40.48, "down")
    assert text == "step 24: expert removed (expert 0)"


def test_matrices_are_shown_with_the_part_of_them_that_exists(tmp_path: Path) -> None:
    path = make(tmp_path / "run")
    assert "Which parameters it trained" not in page(path).text
    kept = {
        "base.layers.0.fc.down": {"shape": [2, 4], "kept": 3, "grid": [[1, 0], [0.5, 0.0]]},
        "base.layers.1.fc.<up>": {"shape": [4, 2], "kept": 5, "grid": []},
        "broken": "not a matrix",
    }
    edit(path / "page.json", kept=kept)
    found = page(path)
    assert "Of 16 entries of the adapter's matrices 8 exist and were trained (50" in found.text
    assert "base.layers.1.fc.<up>" in found.text  # names with nothing in common stay whole
    del kept["broken"]
    edit(path / "page.json", kept=kept)
    found = page(path)
    assert "1.fc.<up>" in found.text
    assert "base.layers" not in found.text
    cells = [attrs["class"] for tag, attrs in found.tags if tag == "i" and "class" in attrs]
    assert [c for c in cells if c in ("r0", "r4", "r8")][-4:] == ["r8", "r0", "r4", "r0"]


def test_clipped_rows_are_told_by_how_often_their_ids_came(tmp_path: Path) -> None:
    path = make(tmp_path / "run")
    assert "Which updates it clipped" not in page(path).text
    told = {
        "frequencies": [1, 2, 4],
        "present": [10, 40, 0],
        "clipped": [1, 30, 0],
        "share": 0.62,
        "tables": {"users": {"rows": [7, 5, 0], "norms": [0.5, 0.25, 0.0]}, "<broken>": None},
    }
    edit(path / "page.json", rows_clipped=told)
    with (path / "metrics.jsonl").open("a") as file:
        for step in (1, 2):
            signals = {"cowclip": {"clipped": step / 4}, "other": {"alive": 3}}
            file.write(json.dumps({"kind": "train", "step": step, "signals": signals}) + "\n")
    found = page(path)
    assert re.search(r"62.% had a gradient that was clipped", found.text)
    assert "rows clipped, percent of those in a step" in found.text
    assert "rows of <broken>" in found.text
    shown = clipped(read(path))
    assert shown is not None
    assert [(r["frequency"], r["present"]) for r in shown["rows"]] == [
        ("1", "10"),
        ("2 to 3", "40"),
    ]
    assert shown["rows"][1]["cells"] == ["5", "0.25", "-", "-"]
    assert shown["rows"][1]["clipped"].startswith("75")
