"""The result by domain and the ledger, as rows of a table."""

from __future__ import annotations

from typing import Any, Final

from sparing.run.report import words
from sparing.run.report.charts import Line, chart
from sparing.run.report.read import Run, number

UNITS: Final = (
    "flops",
    "samples",
    "tokens",
    "labels",
    "active_parameters",
    "parameters",
    "row_updates",
    "bytes",
)
UNIT_NAMES: Final = {
    "flops": "compute",
    "active_parameters": "parameters at work on a token",
    "parameters": "parameters trained",
    "row_updates": "table rows updated",
    "bytes": "memory",
}


def by_domain(run: Run) -> dict[str, Any] | None:
    """Rows of the result by domain with the references' values beside it, then the mean."""
    if not run.evals or not run.domains:
        return None
    references = run.references
    # An infinity so that a domain that no reference knows is neither ahead nor behind.
    sign = -1 if run.higher_is_better else 1
    rows = []
    for domain in [*run.domains, "mean"]:
        series = (
            run.domain_values(domain)
            if domain != "mean"
            else [(s, v) for s, v in ((r["step"], number(r.get(run.metric))) for r in run.evals)
                  if v is not None]
        )  # fmt: skip
        if not series:
            continue
        value = series[-1][1]
        compared = []
        for name in references:
            reference = number(references[name].get(domain))
            ahead = reference is not None and sign * (reference - value) > 0
            compared.append((reference, ahead, _against(value, reference)))
        first = next(iter(references.values()), {}).get(domain)
        rows.append(
            {
                "domain": domain,
                "value": f"{value:.3f}",
                "references": compared,
                "spark": len(series) > 1
                and chart(
                    f"spark-{domain}",
                    [Line(points=series, style="c1"),
                     Line(points=series[-1:], style="c1", dots=True)],
                    title=f"{domain} over the run",
                    description=f"from {series[0][1]:.2f} to {value:.2f}",
                    rules=[(first, "ref-a", "")] if first is not None else [],
                ),
            }
        )  # fmt: skip
    return {"rows": rows, "names": list(references)} if rows else None


def ledger(run: Run) -> list[dict[str, Any]]:
    """Rows of the account: what was spent, what dense training would have, and their ratio."""
    found = run.summary.get("ledger") or {}
    rows = []
    for unit in sorted(found, key=lambda u: (UNITS.index(u) if u in UNITS else len(UNITS), u)):
        entry = run.ledger(unit)
        if entry is None or not any(entry):
            continue
        if unit == "tokens" and entry == run.ledger("samples"):
            continue  # a sample is one token: the row of samples says it
        spent, dense = entry
        share = spent / dense if dense else 1.0
        rows.append(
            {
                "name": UNIT_NAMES.get(unit, words.metric_name(unit)),
                "spent": words.amount(spent, unit),
                "dense": words.amount(dense, unit),
                "width": round(100 * min(1.0, share), 1),
                "equal": spent == dense,
                "over": spent > dense,
                "share": words.percent(share, 1 if 0.99 < share < 1 else 0),
            }
        )
    return rows


def _against(value: float, reference: float | None) -> str:
    if not reference:
        return ""
    change = value / reference - 1
    return ("+" if change > 0 else "") + words.percent(change)
