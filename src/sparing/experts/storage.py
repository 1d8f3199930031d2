"""Models with expert layers on disk, in a directory that Hugging Face's tools can read too.

``config.json`` and ``generation_config.json`` are transformers' own; ``model.safetensors`` holds
the weights, the inactive slots, the thresholds and the sets of active experts; ``sparing.json``
says which blocks are experts. No file is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparing.core import registry
from sparing.core.errors import RequestError, RunError
from sparing.core.state import complete, replacing
from sparing.experts.families import FAMILIES, Family
from sparing.experts.layer import expert_layers
from sparing.experts.method import RoutedExperts
from sparing.experts.moefy import place_

FORMAT = 3
"""Format 1 named a class of transformers always; without one (2), the base has to be given. A
surgery may name biases and a kind of block described by hand (3), which conversion makes."""
NOTE = "sparing.json"
WEIGHTS = "model.safetensors"
CONFIGS = ("config.json", "generation_config.json")
BUFFER = "buffer:"
"""Begins the names of tensors that are in no state dict, such as rotary frequencies in bfloat16."""


def save(model: nn.Module, path: str | Path) -> None:
    """Write a model that ``moefy_`` changed to the directory ``path``, for ``load``.

    All or nothing: an older model at ``path`` is replaced only by a complete new one, and files
    beside it that are not its own (a tokenizer's) stay. With several processes, call it on one.

    A model of a class in transformers is written with its configuration; any other one without,
    and ``load`` is then given a model to put experts and weights into.

    Raises RequestError if the model has no expert layers or ``path`` holds something else;
    RunError if it could not be written.
    """
    path = Path(path)
    note = _describe(model)
    if path.is_dir() and any(path.iterdir()) and not (path / NOTE).is_file():
        raise RequestError(f"{path} holds other files and no {NOTE}; give a new directory")
    if path.exists() and not path.is_dir():
        raise RequestError(f"{path} is a file; give a directory")
    tensors, note["aliases"] = _tensors(model)
    with replacing(path) as aside:
        aside.mkdir(parents=True, exist_ok=True)
        if note["class"] is not None:
            _write_configs(model, aside)
        save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        note["weights"] = _fingerprint(aside / WEIGHTS)
        (aside / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        own = {NOTE, WEIGHTS, *CONFIGS}
        for entry in path.iterdir() if path.is_dir() else ():
            if entry.is_dir():
                shutil.copytree(entry, aside / entry.name)
            elif entry.name not in own:
                shutil.copy2(entry, aside / entry.name)


def load(path: str | Path, base: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The model that ``save`` wrote to ``path``: in evaluation, with its own dtypes.

    ``base()`` makes a model as it was before ``moefy_``, of which the weights do not matter; it is
    asked for where the model's class is not one of transformers, and changed in place.

    Raises RequestError if there is no such model at ``path``, or no base where one is needed;
    RunError if it is damaged or cut short, was written by a newer version, or does not fit the
    installed transformers or the base.
    """
    path = complete(path)
    note = _read_note(path)
    try:
        if _fingerprint(path / WEIGHTS) != note["weights"]:
            raise _damaged(path, f"{WEIGHTS} does not match its size and checksum")
        tensors = load_file(path / WEIGHTS)
        for name, kept in note["aliases"].items():
            tensors[name] = tensors[kept]
        model = _empty(path, note, base)
        for surgery in note["surgeries"]:
            method = registry.method(surgery["method"]).from_dict(surgery["options"])
            if not isinstance(method, RoutedExperts):
                raise _damaged(path, f'"{surgery["method"]}" routes to no experts')
            place_(
                model,
                method,
                surgery["blocks"],
                experts="empty",
                seed=surgery["seed"],
                bias=surgery.get("bias", False),
                families=described(surgery.get("family")),
            )
    except (KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    _fill_(model, tensors, path)
    if (path / CONFIGS[1]).is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(path)
    loaded: nn.Module = model.eval()
    return loaded


def described(family: Mapping[str, Any] | None) -> tuple[Family, ...]:
    """The families to know, one that was described by hand before the others."""
    if family is None:
        return FAMILIES
    kept: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in family.items()
    }
    return (Family(**kept), *FAMILIES)


def _empty(path: Path, note: Mapping[str, Any], base: Callable[[], nn.Module] | None) -> Any:
    """The model as it was before ``moefy_``, its weights still to come."""
    if note["class"] is None:
        if base is None:
            raise RequestError(
                f"the model at {path} is of no class in transformers, so that only its weights "
                "were saved; give a model as it was before moefy_: sparing.load(path, model=...)"
            )
        return base()
    import transformers

    model_class = getattr(transformers, note["class"], None)
    if model_class is None:
        raise RunError(
            f"the model at {path} is a {note['class']}, which transformers "
            f"{transformers.__version__} does not have; it was saved with version "
            f"{note['transformers']}: install that"
        )
    config = model_class.config_class.from_pretrained(path)
    config._attn_implementation = note["attention"]
    with torch.random.fork_rng(devices=[]):
        return model_class(config)


def _describe(model: nn.Module) -> dict[str, Any]:
    """All of ``sparing.json`` that is known before the weights are written."""
    import transformers

    surgeries = vars(model).get("sparing", {}).get("surgeries", [])
    if not surgeries:
        has = "the experts are in a part of it" if expert_layers(model) else "it has no experts"
        raise RequestError(
            f"this model was not changed by sparing.moefy_ ({has}); call moefy_ on what you save"
        )
    name = type(model).__name__
    known = getattr(transformers, name, None) is type(model)
    for surgery in surgeries:
        registry.method_record(surgery["method"])
    return {
        "format": _format(known, surgeries),
        "class": name if known else None,
        "transformers": transformers.__version__,
        "attention": model.config._attn_implementation if known else None,  # type: ignore[union-attr]
        "surgeries": surgeries,
    }


def _format(known: bool, surgeries: list[dict[str, Any]]) -> int:
    """The oldest that holds this, so that earlier versions read what they can."""
    if any("bias" in surgery or "family" in surgery for surgery in surgeries):
        return FORMAT
    return 1 if known else 2


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to write, by name, and the names that are tied to one of them."""
    state: dict[str, Tensor] = model.state_dict()
    for name, buffer in model.named_buffers():
        # integers are made from the configuration; floats may have been rounded with the model
        if name not in state and buffer.is_floating_point():
            state[BUFFER + name] = buffer
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            aliases[name] = seen[place]
            continue
        seen[place] = name
        copy = tensor.detach().cpu().contiguous()
        whole = copy.untyped_storage().nbytes() == copy.numel() * copy.element_size()
        tensors[name] = copy if whole else copy.clone()
    return tensors, aliases


def _write_configs(model: Any, directory: Path) -> None:
    model.config.save_pretrained(directory)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(directory)


@torch.no_grad()
def _fill_(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give the model the saved tensors, and their dtypes, which need not be those of its config."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if BUFFER + name in tensors:
            state[BUFFER + name] = buffer
    missing, unexpected = sorted(state.keys() - tensors), sorted(tensors.keys() - state)
    if missing or unexpected:
        raise RunError(
            f"the weights at {path} do not fit the model: missing {_some(missing)}, unexpected "
            f"{_some(unexpected)}; install the version of transformers that it was saved with"
        )
    for name, place in state.items():
        if place.shape != tensors[name].shape:
            raise RunError(
                f'"{name}" at {path} has shape {tuple(tensors[name].shape)}, and the model '
                f"expects {tuple(place.shape)}"
            )
        if place.dtype != tensors[name].dtype:
            place.data = tensors[name].clone()
        else:
            place.copy_(tensors[name])


def _read_note(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise RequestError(f"there is no directory {path}; load takes what save wrote")
    if not (path / NOTE).is_file():
        if (path / CONFIGS[0]).is_file():
            raise RequestError(
                f"{path} holds a Hugging Face model without {NOTE}; load it with "
                f"transformers.AutoModel.from_pretrained"
            )
        raise RequestError(f"{path} holds no saved model: {NOTE} is missing")
    try:
        note = json.loads((path / NOTE).read_text(encoding="utf-8"))
        version = int(note["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"{NOTE}: {type(error).__name__}: {error}") from error
    if version > FORMAT:
        raise RunError(
            f"the model at {path} has format {version}, and this version reads up to {FORMAT}; "
            f'upgrade with "pip install --upgrade sparing"'
        )
    found: dict[str, Any] = note
    return found


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _damaged(path: Path, how: str) -> RunError:
    return RunError(f"the model at {path} is damaged or cut short ({how}); save it again")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more or "none"
