"""Dense to sparse: decide, write aside, read back, rename."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from sparing.convert.card import card
from sparing.convert.checking import Checked, check
from sparing.convert.checkpoint import INDEX, Shards
from sparing.convert.deciding import decide
from sparing.convert.forms import Asked, Form
from sparing.convert.options import Conversion
from sparing.convert.pieces import Decision, Pieces
from sparing.convert.planning import Planned, check_place, choose_form, chosen_blocks, planned
from sparing.convert.reading import Batches
from sparing.convert.skeleton import Skeleton, skeleton
from sparing.convert.writing import Told, write_all
from sparing.core.state import atomic_save, atomic_write_json, atomic_write_text, replacing
from sparing.experts.families import Family

NOTE: Final = "conversion.json"
INDICES: Final = "conversion.safetensors"
FORMAT: Final = 1


@final
@dataclass(frozen=True, kw_only=True)
class Converted:
    """A finished conversion: what was planned, what reading it back found, and the scales."""

    planned: Planned
    checked: Checked
    scales: Mapping[str, float]

    def lines(self) -> list[str]:
        """In words."""
        return [*self.planned.lines(), *self.checked.lines()]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "plan": self.planned.to_dict(),
            "checked": self.checked.to_dict(),
            "scales": dict(self.scales),
        }


def plan(
    path: str | Path,
    options: Conversion | None = None,
    *,
    data: bool = False,
    family: Family | None = None,
) -> Planned:
    """What ``convert`` would do; data: whether it would be given batches or texts."""
    return planned(skeleton(path, family), options or Conversion(), data=data)


def convert(
    path: str | Path,
    out: str | Path,
    options: Conversion | None = None,
    *,
    texts: Sequence[str | Path] = (),
    batches: Batches | None = None,
    family: Family | None = None,
    told: Told | None = None,
) -> Converted:
    """Make experts of the dense checkpoint in ``path`` and write them to the new directory ``out``.

    texts: files (plain text, or JSON lines with "text") that calibration reads; without any, and
    without ``batches`` (mappings of the model's inputs, ``labels`` among them if a loss is
    needed), it reads what the model itself writes. family: a kind of block described by hand.

    ``out`` appears complete or not at all. Raises RequestError for a request that cannot be met,
    RunError for damaged files, a full disk, or a result that does not check.
    """
    options = options or Conversion()
    out = Path(out)
    dense = skeleton(path, family)
    wanted = planned(dense, options, data=bool(texts) or batches is not None)
    check_place(out, wanted.bytes)
    chosen = chosen_blocks(dense, options)
    form, _ = choose_form(dense, options)
    say = told or (lambda stage, done, total: None)
    decisions = decide(dense, chosen, options, texts=texts, batches=batches, told=say)
    pieces = Pieces(dense, noise=options.noise, seed=options.seed)
    return made(out, pieces, form, decisions, options, wanted, say)


def made(
    out: Path,
    pieces: Pieces,
    form: Form,
    decisions: Mapping[str, Decision],
    options: Conversion,
    wanted: Planned,
    told: Told,
    more: Mapping[str, Any] | None = None,
) -> Converted:
    """Write what was decided aside, read it back, and rename it; more: for the note."""
    dense = pieces.skeleton
    asked = Asked(pieces=pieces, decisions=decisions, options=options)
    files = form.files(asked)
    with replacing(out) as aside:
        written = write_all(aside, files, told)
        form.finish(asked, aside, files, written)
        beside(dense.source.directory, aside)
        scales = {path: decision.scale for path, decision in decisions.items()}
        _note(dense, aside, form.name, options, decisions, wanted, more or {})
        told("checking", 0, 1)
        checked = check(pieces, Shards(aside), form, decisions, options)
        told("checking", 1, 1)
        atomic_write_text(aside / "README.md", card(wanted, checked, list(scales.values())))
    return Converted(planned=wanted, checked=checked, scales=scales)


def beside(source: Path, aside: Path, leave: Sequence[str] = ()) -> None:
    """Copy the tokenizer and whatever else small stands beside the weights, without ``leave``."""
    own = {NOTE, "README.md", "sparing.json", INDEX, *leave}
    for entry in sorted(source.iterdir()):
        weights = entry.suffix in (".safetensors", ".bin", ".gguf", ".pt", ".pth")
        hidden = entry.name in own or entry.name.startswith(".")
        if entry.is_file() and not weights and not hidden and not (aside / entry.name).exists():
            shutil.copy2(entry, aside / entry.name)


def _note(
    dense: Skeleton,
    aside: Path,
    form: str,
    options: Conversion,
    decisions: Mapping[str, Decision],
    wanted: Planned,
    more: Mapping[str, Any],
) -> None:
    """What going back to the dense model takes."""
    from sparing import __version__

    tensors: dict[str, Tensor] = {}
    blocks: dict[str, Any] = {}
    for block in dense.blocks:
        if block.path not in decisions:
            continue
        decision = decisions[block.path]
        tensors[f"{block.path}.index"] = decision.split.index.to(torch.int32)
        tensors[f"{block.path}.shared"] = decision.split.shared.to(torch.int32)
        if decision.bias is not None:
            tensors[f"{block.path}.bias"] = decision.bias
        blocks[block.path] = {
            "scale": decision.scale,
            "parts": {part: dense.parts(block)[part] for part in dense.parts(block)},
            "transposed": type(block.up).__name__ == "Conv1D",
            "fused": block.kind == "gated" and block.gate is None,
            "width": block.width,
        }
    atomic_save(aside / INDICES, tensors)
    note = {
        "format": FORMAT,
        "sparing": __version__,
        "form": form,
        "model": dense.class_name,
        "options": asdict(options),
        "blocks": blocks,
        "config": dense.config.to_dict() | {"transformers_version": None},
        "parameters": dict(wanted.parameters),
        **more,
    }
    atomic_write_json(aside / NOTE, note)
