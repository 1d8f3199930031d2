"""Experts put together again as the dense model they came from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import load_file
from torch import Tensor

from sparing.convert.checkpoint import INDEX, SINGLE, Shards, Source
from sparing.convert.forms import EXPORTS, Form
from sparing.convert.native import Native
from sparing.convert.options import OVERLAPPING
from sparing.convert.pieces import unfold
from sparing.convert.planning import SLACK, check_place
from sparing.convert.running import FORMAT, INDICES, NOTE, beside
from sparing.convert.writing import Entry, Told, index_of, write_all
from sparing.core.errors import RequestError, RunError
from sparing.core.state import atomic_write_json, replacing


@final
@dataclass(frozen=True, kw_only=True)
class Densified:
    """A model put together: its class, its parameters, and whether it is exact.

    exact: whether every number is what the experts hold, bit for bit; a scale that is no power of
    two is divided out with one rounding. lost: what the dense model has no place for.
    """

    model: str
    parameters: int
    exact: bool
    lost: tuple[str, ...]

    def lines(self) -> list[str]:
        """In words."""
        how = "bit for bit" if self.exact else "within one rounding of the last projections"
        lost = f"; left out: {', '.join(self.lost)}" if self.lost else ""
        return [f"{self.model}, {self.parameters:,} parameters: the experts' {how}{lost}"]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "exact": self.exact,
            "lost": list(self.lost),
        }


def to_dense(path: str | Path, out: str | Path, *, told: Told | None = None) -> Densified:
    """Write the dense model that the converted one in ``path`` came from, or was trained to be.

    Every hidden unit goes back to its place, with the scale divided out; the gate has no place in
    a dense model, nor have biases from compensation.

    Raises RequestError if ``path`` holds no conversion of sparing, its experts overlap, or ``out``
    exists; RunError if files are damaged or the disk is full.
    """
    path, out = Path(path), Path(out)
    note, indices = _note(path)
    method = note["options"]["method"]
    if method in OVERLAPPING or "models" in note:
        raise RequestError(
            f'the model at {path} was made by "{note.get("made", method)}", where experts overlap '
            f"and add up to no dense model; go back to the checkpoint that it was made of"
        )
    source, form = Shards(path), _form(note["form"])
    own = {name for b in note["blocks"].values() for name in b["parts"].values()}
    entries: list[Entry] = []
    for name, shape in source.shapes().items():
        if not any(form.belongs(name, block) for block in note["blocks"]):
            entries.append(_copied(source, name, shape))
    for block, about in note["blocks"].items():
        entries += _block(source, form, block, about, indices)
    assert own <= {entry.name for entry in entries}
    total = sum(entry.size for entry in entries)
    check_place(out, total + SLACK)
    say = told or (lambda stage, done, of: None)
    with replacing(out) as aside:
        files = _files(source, entries)
        write_all(aside, files, say)
        if len(files) > 1:
            atomic_write_json(aside / INDEX, index_of(files))
        atomic_write_json(aside / "config.json", note["config"])
        beside(path, aside, leave=(INDICES, "sparing.json"))
    scales = [b["scale"] for b in note["blocks"].values()]
    options = note["options"]
    refitted = bool(options.get("refit"))  # conversions of before that option say nothing of it
    lost: list[str] = []
    if options["compensate"] != "none":
        lost.append("compensation biases")
    if refitted:
        lost.append("the dense last projections, in whose place fitted ones stand")
    return Densified(
        model=note["model"],
        parameters=sum(_count(e.shape) for e in entries if e.dtype.is_floating_point),
        exact=not refitted
        and all(torch.frexp(torch.tensor(float(s)).double()).mantissa == 0.5 for s in scales),
        lost=tuple(lost),
    )


def _note(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (path / NOTE).is_file() or not (path / INDICES).is_file():
        raise RequestError(
            f"{path} holds no model that sparing converted ({NOTE} and {INDICES} are missing); "
            f"only such a model can be put together again"
        )
    try:
        note = json.loads((path / NOTE).read_text(encoding="utf-8"))
        version = int(note["format"])
        if version > FORMAT:
            raise RunError(
                f"the conversion at {path} has format {version}, and this version reads up to "
                f'{FORMAT}; upgrade with "pip install --upgrade sparing"'
            )
        found: dict[str, Any] = note
        return found, load_file(path / INDICES)
    except RunError:
        raise
    except Exception as error:  # a damaged file fails in whatever way its reader does
        raise RunError(f"{path / NOTE} or {INDICES} is damaged ({error}); convert again") from error


def _form(name: str) -> Form:
    forms: tuple[type[Form], ...] = (*EXPORTS, Native)
    return next(form() for form in forms if form.name == name)


def _copied(source: Source, name: str, shape: tuple[int, ...]) -> Entry:
    return Entry(name=name, dtype=source.dtype(name), shape=shape, make=lambda: source.read(name))


def _block(
    source: Source,
    form: Form,
    path: str,
    about: Mapping[str, Any],
    indices: Mapping[str, Tensor],
) -> list[Entry]:
    """The dense tensors of one block, under their own names."""
    index, shared = indices[f"{path}.index"].long(), indices[f"{path}.shared"].long()
    bias = indices.get(f"{path}.bias")
    probe = form.stored(source, path, "up")
    dtype, dim, width = probe.dtype, probe.shape[2], about["width"]

    def dense(part: str) -> Tensor:
        if part == "down_bias":
            held = form.stored(source, path, part)
            return held[0] if bias is None else (held.float() - bias).mean(0).to(held.dtype)
        held = form.stored(source, path, part)
        axis = int(part == "down")
        always = form.always(source, path, part) if len(shared) else None
        if axis:
            held = unfold(held, about["scale"])
        shape = (dim, width) if axis else (width, dim) if held.ndim == 3 else (width,)
        found = torch.empty(shape, dtype=dtype)
        pieces = [*zip(index, held, strict=True)]
        pieces += [(shared, always)] if always is not None else []
        for units, piece in pieces:
            real = (units >= 0).nonzero().flatten()
            found.index_copy_(axis, units[real], piece.index_select(axis, real))
        return found

    def make(part: str) -> Callable[[], Tensor]:
        def made() -> Tensor:
            if about["fused"] and part in ("up", "up_bias"):
                # the gate's half has no bias that is not zero
                gate = dense("gate") if part == "up" else torch.zeros(width, dtype=dtype)
                found = torch.cat([gate, dense(part)])
            elif part == "gate_bias":
                found = torch.zeros(width, dtype=dtype)
            else:
                found = dense(part)
            return found.t() if about["transposed"] and found.ndim == 2 else found

        return made

    entries = []
    for part, name in about["parts"].items():
        rows = width * (2 if about["fused"] and not part.startswith("down") else 1)
        shape: tuple[int, ...] = (rows, dim)
        if part.endswith("bias"):
            shape = (dim,) if part == "down_bias" else (rows,)
        elif part == "down":
            shape = (dim, width)
        shape = shape[::-1] if about["transposed"] else shape
        entries.append(Entry(name=name, dtype=dtype, shape=shape, make=make(part)))
    return entries


def _files(source: Source, entries: list[Entry]) -> dict[str, list[Entry]]:
    """As many files as the source has, of about equal size."""
    count = len(source.files())
    if count == 1:
        return {SINGLE: entries}
    total, size, number = sum(entry.size for entry in entries), 0, 1
    files: dict[str, list[Entry]] = {}
    for entry in entries:
        files.setdefault(f"model-{number:05d}-of-{count:05d}.safetensors", []).append(entry)
        size += entry.size
        number = min(count, 1 + size * count // max(total, 1))
    return files


def _count(shape: tuple[int, ...]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found
