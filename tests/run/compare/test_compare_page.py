"""The page of a comparison: self-contained, escaped, right without a script, readable."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from arms_on_disk import MARGIN, arms_on_disk, diverge, edit
from hypothesis import given
from hypothesis import strategies as st

import sparing
from sparing.run.compare.found import find
from sparing.run.report import comparison as page_of
from sparing.run.report.scatter import HEIGHT, LINE, WIDTH, Point, front, scatter, style, window

VOID = {"meta", "br", "path"}


class Page(HTMLParser):
    """Text, tags and attributes; fails on tags that do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = self.script = ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.script += data
        elif "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def write(tmp_path: Path, arms=None, baseline="top-k 2") -> str:
    arms = arms or arms_on_disk(tmp_path)
    found = sparing.compare(arms, baseline=baseline, margin=MARGIN)
    return found.page(tmp_path / "compare.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write(tmp_path_factory.mktemp("page"))


def test_the_page_is_one_file_whose_only_script_is_the_one_it_allows(source):
    found = Page(source)
    assert "://" not in source
    assert "url(" not in source
    assert not any({"src", "href"} & set(attrs) for _, attrs in found.tags)
    digest = base64.b64encode(hashlib.sha256(found.script.encode()).digest()).decode()
    policy = next(a["content"] for a in found.all("meta") if a.get("http-equiv"))
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_runs_below_the_page_are_linked(tmp_path):
    arms = arms_on_disk(tmp_path / "arms of today")
    first = arms["dense"][0]
    (first / "report.html").write_text("a page", encoding="utf-8")
    links = [attrs["href"] for attrs in Page(write(tmp_path, arms)).all("a")]
    assert len(links) == 1
    assert (tmp_path / unquote(links[0])).read_text() == "a page"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert not Page(write(elsewhere, arms)).all("a")


def test_each_axis_has_a_plot_and_the_first_shows_without_a_script(source):
    found = Page(source)
    options = [attrs["value"] for attrs in found.all("option")]
    assert options == ["flops", "seconds"]
    plots = [a for a in found.all("figure") if "data-axis" in a]
    assert [a["data-axis"] for a in plots] == options
    assert ["hidden" in a for a in plots] == [False, True]
    chooser = next(a for a in found.all("p") if a.get("class") == "choose")
    assert "hidden" in chooser  # it does nothing without a script


def test_seeds_stand_in_the_order_of_numbers(tmp_path):
    values = {"top-k 2": [1.9 + seed / 100 for seed in range(11)], "dense": [2.0] * 3}
    text = Page(write(tmp_path, arms_on_disk(tmp_path / "arms", values))).text
    told = re.findall(r"seed (\d+)", text[text.index("Every run") :])
    assert told[:11] == [str(seed) for seed in range(11)]


def test_speed_stands_against_the_baseline(tmp_path):
    arms = arms_on_disk(tmp_path)
    for arm, seconds in (("dense", 50.0), ("top-k 2", 120.0)):
        for run in arms[arm]:
            edit(run, seconds=seconds)
    text = Page(write(tmp_path, arms)).text
    assert "2.40x" in text
    assert "1.00x" in text


def test_the_page_says_what_was_found(source):
    text = Page(source).text
    assert "1 different and 1 equivalent" in text or "1 equivalent and 1 different" in text
    assert "against top-k 2, margin ±0.02 bits per byte, 3 seeds" in text
    for expected in ("2.060", "1.982", "12 TFLOP".replace(" ", "\u202f"), "unpaired", "both one-"):
        assert expected in text, expected
    assert "†" not in text


def test_one_pair_of_arms_is_told_in_a_sentence(tmp_path):
    arms = arms_on_disk(tmp_path, {"dense": [2.0, 2.1, 2.05], "mine": [2.0, 2.101, 2.049]})
    assert "mine is equivalent to dense" in write(tmp_path, arms, "dense")


def test_text_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    arms = arms_on_disk(tmp_path)
    arms[evil] = arms.pop("top-k 4")
    edit(arms[evil][0], environment={"device": evil})
    diverge(arms["dense"][0], evil)
    source = write(tmp_path, arms)
    assert evil not in source
    assert len(Page(source).all("script")) == 1


def test_the_same_comparison_gives_the_same_page(tmp_path):
    arms = arms_on_disk(tmp_path)
    assert write(tmp_path, arms) == write(tmp_path, arms)


def test_headline_without_a_verdict(tmp_path):
    arms = arms_on_disk(tmp_path, {"dense": [2.0], "mine": [2.1]})
    found = sparing.compare(arms, baseline="dense", margin=MARGIN)
    assert page_of.headline(found) == (
        "mine has no verdict", "against dense, margin ±0.02 bits per byte, 1 seed",
    )  # fmt: skip


# ---- the plot ------------------------------------------------------------------------------------


def points(*means: tuple[float, float]) -> list[Point]:
    return [
        Point(number=i, name=f"arm {i}", mean=mean, seeds=[mean])
        for i, mean in enumerate(means, start=1)
    ]


@given(
    st.lists(st.tuples(st.floats(1, 100), st.floats(1, 100)), min_size=1, max_size=12),
    st.booleans(),
)
def test_the_front_is_what_nothing_beats(means, higher):
    sign = -1 if higher else 1
    given_points = points(*means)
    kept = front(given_points, higher)
    for p in kept:
        for q in given_points:
            cheaper, better = q.mean[0] <= p.mean[0], sign * q.mean[1] <= sign * p.mean[1]
            assert not (cheaper and better and q.mean != p.mean)
    values = {p.mean for p in kept}
    for q in given_points:
        beaten = any(m[0] <= q.mean[0] and sign * m[1] <= sign * q.mean[1] for m in values)
        assert beaten  # by one of the front, or by itself


def test_the_window_leaves_out_what_is_far_behind():
    values = [1.973, 1.974, 2.033, 2.042, 2.035, 2.073, 2.735]
    assert window(values, higher_is_better=False) == (1.973, 2.073)
    assert window([-v for v in values], higher_is_better=True) == (-2.073, -1.973)
    assert window([2.0], higher_is_better=False) == (2.0, 2.0)
    assert window([1.9, 2.5], higher_is_better=False) == (1.9, 2.5)


def test_an_arm_beyond_the_window_is_named_with_its_value():
    drawn = scatter("k", "flops", "compute", points((1e12, 2.0), (2e12, 2.1), (3e12, 2.05),
                    (4e12, 9.0)), metric="bits", higher=False)  # fmt: skip
    assert drawn is not None
    assert [tag.outside for tag in drawn.tags] == ["", "", "", "9"]
    assert drawn.tags[-1].y == 0.0
    assert drawn.x_name == "TFLOP"
    assert "Front: arm 1." in drawn.description + "."


def test_labels_do_not_cover_each_other():
    drawn = scatter("k", "flops", "compute",
                    points(*((1e12 + 2e9 * i, 2.0 + 0.001 * (i % 3)) for i in range(6)),
                           (2e12, 2.2)), metric="bits", higher=False)  # fmt: skip
    assert drawn is not None
    places = [
        (t.x * WIDTH / 100 + t.dx, t.y * HEIGHT / 100 + t.dy, 7.0 * (len(t.name) + 2))
        for t in drawn.tags
    ]
    for i, (x, y, width) in enumerate(places):
        for other_x, other_y, other_width in places[:i]:
            apart = abs(y - other_y) >= LINE - 1
            assert apart or x + width <= other_x + 1 or other_x + other_width <= x + 1


def test_no_point_no_plot():
    assert scatter("k", "flops", "compute", [], metric="bits", higher=False) is None


def test_colours_come_again_with_dashes():
    assert [style(n) for n in (1, 6, 7, 12, 13)] == ["c1", "c6", "c1 dash", "c6 dash", "c1"]


def test_curves_have_each_seed_the_mean_and_a_mark_where_one_diverged(tmp_path):
    arms = arms_on_disk(tmp_path)
    diverge(arms["top-k 4"][2])
    source = write(tmp_path, arms)
    assert len(re.findall(r'class="c\d thin"', source)) == 2 * 9
    assert len(re.findall(r'class="mark down"', source)) <= 2


def test_runs_that_were_evaluated_once_show_how_their_training_loss_fell(tmp_path):
    arms = arms_on_disk(tmp_path, steps=60)
    source = write(tmp_path, arms)
    assert "evaluated only once" in source
    assert "training loss against tokens" in source
    assert not re.findall(r'class="c\d thin"', source)


def test_costs_far_apart_have_a_logarithmic_axis():
    near = [Point(number=i, name=str(i), mean=(x, 1.0 + i), seeds=[]) for i, x in ((1, 5), (2, 50))]
    far = [*near, Point(number=3, name="3", mean=(50_000.0, 4.0), seeds=[])]
    flat, warped = (
        scatter("k", "parameters", "trained", points, metric="bits", higher=False)
        for points in (near, far)
    )
    assert "logarithmic" not in flat.x_name
    assert warped.x_name == "parameters, logarithmic"
    assert [tick.text for tick in warped.x_ticks] == ["10", "100", "1 k", "10 k", "100 k"]
    places = [tag.x for tag in warped.tags]
    assert places[1] - places[0] == pytest.approx((places[2] - places[1]) / 3, abs=0.02)


def test_what_a_run_stores_is_what_its_model_takes_on_disk(tmp_path):
    arms = arms_on_disk(tmp_path)
    for size, paths in enumerate(arms.values(), start=1):
        for path in paths:
            (path / "model" / "part").mkdir(parents=True)
            (path / "model" / "part" / "weights").write_bytes(bytes(100 * size))
            (path / "model" / "config").write_bytes(bytes(10))
    assert "files of the trained model" in write(tmp_path, arms)
    assert find(paths[0], "top-k 4").cost("stored") == 310
