"""The top of the page: what was trained, what it reached, and what that beats."""

from __future__ import annotations

from typing import Any, Final

import yaml

from sparing.run.report import words
from sparing.run.report.read import Run, number

MOST_NAMED: Final = 5
"""More domains than that are counted, not named."""


def mean_references(run: Run) -> dict[str, float]:
    """Each reference's mean over domains, as recorded or computed."""
    found = {}
    for name, values in run.references.items():
        mean = number(values.get("mean"))
        rest = [v for domain, v in values.items() if domain != "mean"]
        if mean is None and rest:
            mean = sum(rest) / len(rest)
        if mean is not None:
            found[name] = mean
    return found


def verdict(run: Run) -> tuple[str, str]:
    """The result, and in words what it beats and what it does not."""
    if run.value is None:
        return "No result yet", "the run ended before its first evaluation"
    sign = -1 if run.higher_is_better else 1
    ahead, behind = [], []
    for name, value in sorted(mean_references(run).items(), key=lambda item: item[1]):
        by = abs(run.value / value - 1) if value else 0.0
        gap = sign * (value - run.value)
        known = f"{_article(name)} ({value:.2f})"
        if gap > 0:
            ahead.append(f"{known} by {words.percent(by)}")
        else:
            behind.append(f"{words.percent(by)} behind {known}")
    parts = ["beats " + words.listing(ahead)] if ahead else []
    if behind:
        parts.append("but is " * bool(ahead) + words.listing(behind))
    reached = f"{run.value:.2f} {words.metric_name(run.metric)}{'' if run.summary else ' so far'}"
    return reached, ", ".join(parts) or "no reference was recorded to compare with"


def lead(run: Run) -> str:
    """One or two sentences: what was trained on what, and how to read the number."""
    recipe = run.summary.get("recipe") or _recipe(run).get("name")
    subject = f"The recipe {recipe}" if recipe else "This run"
    parameters = run.ledger("parameters")
    model = f"a model of {words.count(parameters[0])} parameters" if parameters else "a model"
    if parameters and parameters[0] < parameters[1]:
        trained, whole = (words.count(amount) for amount in parameters)
        model = f"{trained} parameters in a model of {whole}"
    methods = [
        str(name) for name in run.summary.get("methods") or _recipe(run).get("methods") or []
    ]
    how = f", with {words.listing(methods)}" if methods else ", with no method attached"
    names = run.domains
    on = f" on {words.listing(names)}" if names else ""
    if len(names) > MOST_NAMED:
        on = f" on {len(names)} {words.plural(run.domain_name)}"
    text = f"{subject} trained {model}{on}{how}."
    about = run.page.get("about_metric")
    if not about and run.metric == "bits_per_byte":  # runs from before tasks said it themselves
        about = (
            "Bits per byte is how many bits the model needs, on average, to store a byte of text"
            " that it has not seen: lower is better, and a model that knows nothing needs 8."
        )
    return " ".join([text, *(str(more) for more in (about, run.page.get("remark")) if more)])


def status(run: Run) -> list[str]:
    """What is missing, in sentences; empty for a complete run."""
    notes = list(run.notes)
    if not run.summary:
        reached = f" Its last record is step {run.last['step']:,}." if run.last else ""
        notes.append(
            f"This run did not finish (no summary.json): the page shows what it left.{reached}"
            " The same command with --resume continues it."
        )
    if not run.page:
        notes.append("No page.json: references, samples, passages and experts are not shown.")
    return notes


def figures(run: Run) -> list[tuple[str, str, str]]:
    """The row of key figures: (name, value, remark)."""
    found: list[tuple[str, str, str]] = []
    tokens = run.ledger("tokens")
    seen = tokens[0] if tokens else number(run.last.get("tokens"))
    steps = number(run.summary.get("steps")) or number(run.last.get("step"))
    if seen is not None:
        found.append((run.unit, words.count(seen), f"{steps:,.0f} steps" if steps else ""))
    seconds = number(run.summary.get("seconds"))
    if seconds is not None:
        rate = f"{words.count(seen / seconds)} {run.unit}/s" if seen and seconds else ""
        found.append(("time", words.duration(seconds), rate))
    environment = run.summary.get("environment") or {}
    if environment.get("device"):
        device, threads = (
            words.device(str(environment["device"])),
            number(environment.get("threads")),
        )
        used = f"{threads:.0f} thread{'s' * (threads != 1)}" if threads else ""
        # A processor's name is long: it goes below, and the number of threads takes its place.
        short = len(device) <= 14 or not used
        found.append(("device", device, used) if short else ("device", used, device))
    flops = run.ledger("flops")
    if flops:
        remark = f"{words.percent(flops[0] / flops[1])} of dense" if flops[1] else ""
        found.append(("compute", words.amount(flops[0], "flops"), remark))
    elif (spent := number(run.last.get("flops"))) is not None:
        found.append(("compute", words.amount(spent, "flops"), ""))
    return found


def _article(name: str) -> str:
    return f"a {name.replace('-gram', '-gram model')}" if "-gram" in name else name


def _recipe(run: Run) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(run.recipe)
    except yaml.YAMLError:
        return {}
    return recipe if isinstance(recipe, dict) else {}
