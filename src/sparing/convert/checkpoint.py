"""Checkpoints on disk, read one tensor at a time: what is in them is known from headers alone."""

from __future__ import annotations

import abc
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from sparing.core.errors import RequestError, RunError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
LONGEST_HEADER = 100_000_000
"""The safetensors format limits its header to this many bytes."""

DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES: Final[dict[torch.dtype, str]] = {dtype: name for name, dtype in DTYPES.items()}


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one tensor lies: the bytes [begin, end) of ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Source(abc.ABC):
    """Abstract: named tensors of a dense model, and its configuration."""

    directory: Path

    @abc.abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor by name."""

    @abc.abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """A tensor's type."""

    @abc.abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, that the caller may change."""

    @abc.abstractmethod
    def files(self) -> list[list[str]]:
        """The names of the tensors of each file, in its order: how the result is cut too."""


@final
class Shards(Source):
    """A directory of one or several safetensors files; holds no tensor in memory."""

    def __init__(self, directory: str | Path) -> None:
        """Read the headers of all files.

        Raises RequestError if there is no such directory, or no weights in it that can be read;
        RunError if a file is missing, cut short or damaged.
        """
        self.directory = Path(directory)
        self.config = _config(self.directory)
        self.places: dict[str, Place] = {}
        self._files: list[list[str]] = []
        for file, wanted in _listed(self.directory):
            found = _header(file)
            missing = [name for name in wanted or () if name not in found]
            if missing:
                raise RunError(
                    f'{file} lacks "{missing[0]}"'
                    f"{f' and {len(missing) - 1} more tensors' if len(missing) > 1 else ''}, which "
                    f"{INDEX} says it holds; download the checkpoint again"
                )
            kept = {name: found[name] for name in wanted} if wanted is not None else found
            self.places |= kept
            self._files.append(list(kept))

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: place.shape for name, place in self.places.items()}

    def dtype(self, name: str) -> torch.dtype:
        place = self.places[name]
        if place.dtype not in DTYPES:
            raise RequestError(
                f'"{name}" has the type {place.dtype}: a quantised checkpoint; convert the '
                f"model as it was before quantisation"
            )
        return DTYPES[place.dtype]

    def read(self, name: str) -> Tensor:
        place, dtype = self.places[name], self.dtype(name)
        buffer = bytearray(place.end - place.begin)
        try:
            with open(place.file, "rb") as file:
                file.seek(place.begin)
                got = file.readinto(buffer)
        except OSError as error:
            raise RunError(f"could not read {place.file} ({error})") from error
        if got != len(buffer):
            raise RunError(f"{place.file} was cut short while it was read; convert again")
        if not buffer:
            return torch.empty(place.shape, dtype=dtype)
        return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).view(place.shape)

    def files(self) -> list[list[str]]:
        return self._files


@final
class Whole(Source):
    """All tensors of a model in memory: for checkpoints whose names only transformers can map."""

    def __init__(self, directory: str | Path, tensors: Mapping[str, Tensor]) -> None:
        self.directory = Path(directory)
        self.tensors = dict(tensors)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self.tensors[name].detach().clone()

    def files(self) -> list[list[str]]:
        return [list(self.tensors)]


def _config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise RequestError(
            f"there is no directory {directory}; give one with a Hugging Face model: {CONFIG} and "
            f"{SINGLE} or its shards"
        )
    file = directory / CONFIG
    if not file.is_file():
        raise RequestError(f"{directory} has no {CONFIG}; give a Hugging Face model's directory")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read ({error}); download it again") from error
    if not isinstance(config, dict):
        raise RunError(f"{file} holds no mapping; download it again")
    if config.get("quantization_config"):
        kind = config["quantization_config"].get("quant_method", "some way")
        raise RequestError(
            f"the checkpoint at {directory} is quantised ({kind}); convert the model as it was "
            f"before, and quantise the result"
        )
    return config


def _listed(directory: Path) -> list[tuple[Path, list[str] | None]]:
    """The files to read, and the tensors that the index says each of them holds."""
    index = directory / INDEX
    if index.is_file():
        try:
            body = json.loads(index.read_text(encoding="utf-8"))
            by_file: dict[str, list[str]] = {}
            for name, file in body["weight_map"].items():
                by_file.setdefault(file, []).append(name)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise RunError(f"{index} cannot be read ({error}); download it again") from error
        missing = sorted(name for name in by_file if not (directory / name).is_file())
        if missing:
            raise RunError(
                f"{directory} lacks {len(missing)} of its {len(by_file)} weight files: "
                f"{', '.join(missing[:3])}; download them again"
            )
        return [(directory / file, names) for file, names in sorted(by_file.items())]
    if (directory / SINGLE).is_file():
        return [(directory / SINGLE, None)]
    others = sorted(f.name for f in directory.iterdir() if f.suffix in (".bin", ".gguf", ".pt"))
    if others:
        raise RequestError(
            f"{directory} has its weights in {others[0]}, which is no safetensors file; load it "
            f"with transformers and write it with save_pretrained first (a model from GGUF: copy "
            f"its state dict into a fresh model of its class before)"
        )
    raise RequestError(f"{directory} holds no weights: neither {SINGLE} nor {INDEX}")


def _header(file: Path) -> dict[str, Place]:
    """What a safetensors file holds, checked against its size."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= min(LONGEST_HEADER, size - 8):
                raise ValueError("its header is cut short")
            header = json.loads(handle.read(length))
        found = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            dtype = DTYPES.get(entry["dtype"])
            if dtype is not None and math.prod(shape) * dtype.itemsize != end - begin:
                raise ValueError(f'"{name}" has the wrong number of bytes')
            place = Place(
                file=file,
                dtype=entry["dtype"],
                shape=shape,
                begin=begin + 8 + length,
                end=end + 8 + length,
            )
            if place.end > size:
                raise ValueError(f"it has {size:,} bytes and needs {place.end:,} or more")
            found[name] = place
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file} is damaged or cut short ({error}); download it again") from error
    return found
