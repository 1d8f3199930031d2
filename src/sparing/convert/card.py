"""The model card that lies beside a converted model."""

from __future__ import annotations

from sparing.convert.checking import Checked
from sparing.convert.planning import UNTRAINED, Planned


def card(planned: Planned, checked: Checked, scales: list[float]) -> str:
    """Markdown: what the model is, how it was made, how to load it, and what to expect."""
    o, p = planned.options, planned.parameters
    if planned.loads_with.startswith("transformers"):
        load = (
            "from transformers import AutoModelForCausalLM\n\n"
            "model = AutoModelForCausalLM.from_pretrained(PATH)"
        )
    else:
        load = "import sparing\n\nmodel = sparing.load(PATH)"
    spread = f"{min(scales):.4g}"
    if max(scales) != min(scales):
        spread += f" to {max(scales):.4g}, by layer"
    always = f", {o['residual']} of them always on," if o["residual"] else ""
    parity = "\n".join(f"- {line}" for line in checked.lines())
    return f"""# {planned.model} as experts

{planned.blocks} feed-forward blocks of {planned.width} hidden units were cut into {o["experts"]} \
experts, of which a token passes {o["active"]}{always} by `sparing convert`\
{f"; {planned.dense_blocks} blocks stay dense" if planned.dense_blocks else ""}.

| parameters | total | active |
|---|---|---|
| dense | {p["dense"]:,} | {p["dense"]:,} |
| experts | {p["total"]:,} | {p["active"]:,} |

```python
{load}
```

## How it was made
- method `{planned.method}`, seed {o["seed"]}; experts of {planned.expert_width} hidden \
units{planned.uneven}
- scale `{planned.scale}`: {spread}, folded into the last projection of the routed experts
- gate `{planned.gate}`, compensation `{o["compensate"]}`\
{"; last projections fitted to the dense output" if o["refit"] else ""}

{_weights(planned)}

## What was checked
{parity}

## What to expect
A converted model is worse than the dense one until it is trained again: cutting a token's hidden
units to a part of them loses what the others computed. `sparing convert --to-dense` puts the
experts together again.
"""


def _weights(planned: Planned) -> str:
    """How a token's routed experts are weighed."""
    if not planned.trains_gate:
        return f"A token's weights: {UNTRAINED}."
    if planned.options["router"] == "top-k" and not planned.options["router_options"]:
        return (
            "A routed expert's weight is the softmax over the experts that a token chose: they sum "
            "to 1."
        )
    return f"The router is `{planned.options['router']}` with its own weights."
