"""A comparison in lines of text."""

from __future__ import annotations

from typing import Any

from sparing.core.ledger import human
from sparing.run.compare.finished import ArmResult, Comparison


def lines(comparison: Comparison) -> list[str]:
    """Each arm with each seed, its cost, its differences from the baseline and the verdict."""
    better = "higher" if comparison.higher_is_better else "lower"
    head = (
        f"{comparison.metric} ({better} is better), against {comparison.baseline}, "
        f"margin {comparison.margin}"
    )
    said = [head, ""]
    width = max(len(arm.name) for arm in comparison.arms)
    for arm in comparison.arms:
        mean = "-" if arm.mean is None else f"{arm.mean:.4f}"
        flops = arm.costs.get("flops")
        cost = human(round(flops), "flops") if flops is not None else ""
        said.append(f"{arm.name:<{width}}  {mean:>8}  {cost:>10}  {_seeds(arm)}")
    for arm in comparison.arms:
        if arm.name != comparison.baseline:
            said += ["", *_verdict(arm, comparison)]
    for title, texts in (("warning", comparison.warnings), ("missing", comparison.missing)):
        if texts:
            said += ["", *(f"{title}: {text}" for text in texts)]
    return [*said, ""]


def _seeds(arm: ArmResult) -> str:
    return "  ".join(
        f"{run.seed}: {run.value:.4f}" if run.state == "finished" else f"{run.seed}: {run.state}"
        for run in arm.runs
    )


def _verdict(arm: ArmResult, comparison: Comparison) -> list[str]:
    judgement = arm.judgement
    if judgement is None:
        return [f"{arm.name}: no verdict, nothing is finished that could be compared"]
    said = [f"{arm.name}: {(judgement.verdict or 'no verdict').upper()}. {judgement.why}"]
    for title, interval in intervals(judgement):
        said.append(f"  {title:<28} {told_interval(interval)}")
    if judgement.verdict == "undecided":
        needed = judgement.seeds_needed
        said.append(
            f"  {needed} seeds in all would probably decide it" if needed
            else "  no number of seeds that could be run would decide it at this margin"
        )  # fmt: skip
    return said + [f"  note: {note}" for note in judgement.notes]


def intervals(judgement: Any) -> list[tuple[str, Any]]:
    """The intervals that there are, each with its title."""
    named = (
        ("difference, paired", judgement.paired),
        ("difference, unpaired", judgement.unpaired),
        ("bootstrap over seeds", judgement.bootstrap),
        ("over seeds and documents", judgement.documents),
    )
    return [(title, interval) for title, interval in named if interval is not None]


def told_interval(interval: Any) -> str:
    """``+0.012 [-0.003, +0.027] at 95 %``."""
    return (
        f"{interval.estimate:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}] "
        f"at {100 * interval.level:g} %"
    )
