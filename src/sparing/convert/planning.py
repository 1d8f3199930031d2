"""What a conversion will do, told before it does anything."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch

from sparing.convert.forms import Asked, Form, refusals
from sparing.convert.native import Native
from sparing.convert.options import METHODS, Conversion
from sparing.convert.pieces import Decision, Pieces
from sparing.convert.skeleton import Skeleton
from sparing.convert.split import sizes, split
from sparing.convert.writing import Entry
from sparing.core.errors import RequestError, RunError
from sparing.experts.families import Block

SLACK = 1 << 20
"""Bytes for configurations, notes and the card."""
UNTRAINED = (
    "one routed expert: its weight is 1 whatever the gate says, so the model's loss does not train "
    "the gate; -s normalize=false weighs as Switch does, which trains it"
)


@final
@dataclass(frozen=True, kw_only=True)
class Planned:
    """A conversion that has not been made.

    chosen: the blocks to convert; data: whether the model reads texts; reading: how the weights
    are read; trains_gate: whether the model's loss trains the gate; parameters: total and active,
    before and after; bytes: that will be written.
    """

    source: str
    model: str
    form: str
    loads_with: str
    why: str
    blocks: int
    dense_blocks: int
    width: int
    expert_width: int
    shared_width: int
    uneven: str
    method: str
    scale: str
    gate: str
    trains_gate: bool
    data: bool
    reading: str
    parameters: Mapping[str, int]
    bytes: int
    options: Mapping[str, Any]

    def lines(self) -> list[str]:
        """In words."""
        o, p = self.options, self.parameters
        always = f", {o['residual']} of them always on" if o["residual"] else ""
        said = [
            f"{self.model} at {self.source}: {self.blocks} feed-forward blocks of {self.width} "
            f"hidden units become {o['experts']} experts, {o['active']} active{always}"
            + (f"; {self.dense_blocks} stay dense" if self.dense_blocks else ""),
            f"experts of {self.expert_width} hidden units by method {self.method} "
            f"({METHODS[self.method]}){self.uneven}",
            f"scale {self.scale}, gate {self.gate}, compensation {o['compensate']}"
            + (", last projections fitted" if o["refit"] else ""),
            f"loads with {self.loads_with} ({self.form}){': ' + self.why if self.why else ''}",
            f"reading: {self.reading}; writes {self.bytes / 1e6:,.1f} MB",
            f"{'parameters':<12}{'total':>16}{'active':>16}",
            f"{'dense':<12}{p['dense']:>16,}{p['dense']:>16,}",
            f"{'experts':<12}{p['total']:>16,}{p['active']:>16,}",
        ]
        if not self.trains_gate:
            said.append(UNTRAINED)
        return said

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def chosen_blocks(skeleton: Skeleton, options: Conversion) -> list[Block]:
    """The blocks to convert; RequestError if first_dense and last_dense leave none."""
    count = len(skeleton.blocks)
    found = list(skeleton.blocks[options.first_dense : count - options.last_dense])
    if options.first_dense + options.last_dense >= count:
        raise RequestError(
            f"the model has {count} feed-forward blocks, and first_dense={options.first_dense} "
            f"with last_dense={options.last_dense} leaves none to convert"
        )
    return found


def choose_form(skeleton: Skeleton, options: Conversion) -> tuple[Form, str]:
    """The layout, and why it is not the exported one if it is not.

    Raises RequestError if the exported one was asked for and cannot be had.
    """
    if options.form == "sparing":
        return Native(), "as asked"
    form, why = refusals(skeleton, options)
    if form is not None:
        return form(), ""
    if options.form == "export":
        raise RequestError(
            f"this model cannot be exported for plain transformers: {why}; take "
            f'form="sparing", which sparing.load reads'
        )
    return Native(), why


def stand_ins(skeleton: Skeleton, chosen: list[Block], options: Conversion) -> dict[str, Decision]:
    """Decisions of the right shapes, for what does not depend on the values."""
    found = {}
    for block in chosen:
        itemsize = skeleton.dtype(block).itemsize
        if options.method == "copy":
            groups = [torch.arange(block.width)] * options.experts
            always = groups[0][:0]
        else:
            parts = torch.split(torch.arange(block.width), sizes(block.width, options.experts))
            groups = list(parts[options.always :])
            always = torch.cat([*parts[: options.always], parts[0][:0]])
            if options.method == "sharing-inner":
                groups = [parts[0]] * options.routed
        gate = torch.zeros(options.routed, block.dim)
        found[block.path] = Decision(split=split(groups, always, itemsize=itemsize), gate=gate)
    return found


def planned(skeleton: Skeleton, options: Conversion, *, data: bool) -> Planned:
    """Tell what ``options`` would make of the model; data: whether texts are at hand."""
    chosen = chosen_blocks(skeleton, options)
    form, why = choose_form(skeleton, options)
    decisions = stand_ins(skeleton, chosen, options)
    asked = Asked(pieces=Pieces(skeleton), decisions=decisions, options=options)
    files = form.files(asked)
    entries = [entry for held in files.values() for entry in held]
    shapes = skeleton.source.shapes()
    dense = sum(_count(shapes[theirs]) for theirs in skeleton.names.values())
    total, active = _counted(form, entries, chosen, options)
    first, decision = chosen[0], decisions[chosen[0].path]
    reads = options.reads or data
    rest = first.width % options.experts
    uneven = ""
    if options.method != "copy":
        filled = decision.split.width - sizes(first.width, options.experts)[0]
        if rest or filled:
            uneven = f": {first.width} / {options.experts}"
            uneven += f", {rest} experts with one more" if rest else ""
            uneven += "; units of zeros fill up to 16 bytes" if filled or rest else ""
    reading = "one tensor at a time"
    if skeleton.whole:
        reading = f"the whole model in memory, since {skeleton.whole}"
    elif reads:
        reading = "the whole model in memory, to see its activations; then one tensor at a time"
    return Planned(
        source=str(skeleton.source.directory),
        model=skeleton.class_name,
        form=form.name,
        loads_with=form.loads_with,
        why=why,
        blocks=len(chosen),
        dense_blocks=len(skeleton.blocks) - len(chosen),
        width=first.width,
        expert_width=decision.split.width,
        shared_width=len(decision.split.shared),
        uneven=uneven,
        method=options.method,
        scale=str(options.resolved_scale(reads)),
        gate=options.resolved_gate(reads),
        trains_gate=not options.routed_by_one,
        data=reads,
        reading=reading,
        parameters={"dense": dense, "total": total, "active": active},
        bytes=sum(entry.size for entry in entries) + SLACK,
        options={**asdict(options), "residual": options.always},
    )


def check_place(out: Path, size: int) -> None:
    """RequestError if ``out`` exists with something in it; RunError if the disk is too small."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out} exists already; give a new directory, or delete it first")
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise RunError(
            f"{out} needs {size / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; free some "
            f"space or give another place"
        )


def _counted(
    form: Form, entries: list[Entry], chosen: list[Block], options: Conversion
) -> tuple[int, int]:
    """All parameters of the result, and those that a token passes."""
    total = sum(_count(entry.shape) for entry in entries if entry.dtype.is_floating_point)
    routed = 0
    for entry in entries:
        if any(form.belongs(entry.name, block.path) for block in chosen):
            routed += _count(entry.shape) if ".experts." in entry.name else 0
    return total, total - round(routed * (1 - options.chosen / options.routed))


def _count(shape: tuple[int, ...]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found
