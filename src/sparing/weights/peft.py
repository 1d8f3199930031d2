"""LoRA in the files of Hugging Face's PEFT, written and read without importing it.

``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT 0.21 writes and reads them. Its
matrices are whole: what a mask dropped is zero there.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparing.core.errors import RequestError, RunError
from sparing.core.state import replacing
from sparing.weights.adapter import adapters, attach_, places
from sparing.weights.installed import merged, parts, require
from sparing.weights.installing import installing
from sparing.weights.lora import LoRA, sizes, transposed
from sparing.weights.options import Options
from sparing.weights.own import Own
from sparing.weights.places import linear_layers
from sparing.weights.stored import decode, encode

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MASKS = "sparing_masks"
"""The entry of the file's header that holds the masks; PEFT does not look at it."""
UNSUPPORTED = {
    "use_dora": "weight-decomposed LoRA",
    "lora_bias": "a bias on B",
    "layer_replication": "replicated layers",
    "target_parameters": "adapted parameters that are no layers",
    "trainable_token_indices": "trained tokens",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "quantisation-aware LoRA",
    "arrow_config": "routing among adapters",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}


def to_peft(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Write the adapter ``name``, a LoRA, for ``PeftModel.from_pretrained(base, path)``.

    Raises RequestError for another kind, which PEFT has no format for, and for an unknown name;
    RunError if it could not be written.
    """
    path, about = Path(path), require(model, name)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / CONFIG).exists()):
        raise RequestError(f"{path} holds something else; give a new directory")
    mine: dict[str, LoRA] = {}
    for place, part in parts(model, name).items():
        if not isinstance(part, LoRA):
            raise RequestError(
                f'PEFT has no format for adapters of kind "{about["options"]["kind"]}", only LoRA '
                f"can be exported; use save_adapter"
            )
        if part.a.shape[0]:  # whole units: nothing may be left at a place
            mine[place] = part
    if not mine:
        raise RequestError(f'the adapter "{name}" has no rank left at any place')
    tensors: dict[str, Tensor] = {}
    flags = []
    for place, part in sorted(mine.items()):
        for letter, factor in (("A", part.a), ("B", part.b)):
            matrix = factor.matrix().detach().cpu().contiguous().clone()
            tensors[f"{PREFIX}{place}.lora_{letter}.weight"] = matrix
            flags.append(factor.mask().reshape(-1).cpu())
    for place, part in adapters(model, name).items():
        if isinstance(part, Own):
            module, where = places(model)[place]
            for own, value in part.values(module, name in where.active).items():
                tensors[f"{PREFIX}{place}.{own}"] = value.cpu().clone()
    record = base64.b64encode(encode(torch.cat(flags)).numpy().tobytes()).decode()
    with replacing(path) as aside:
        save_file(tensors, aside / WEIGHTS, metadata={"format": "pt", MASKS: record})
        text = json.dumps(_config(model, mine, about), indent=2, sort_keys=True)
        (aside / CONFIG).write_text(text + "\n", encoding="utf-8")


def from_peft_(model: nn.Module, path: str | Path, name: str = "default") -> nn.Module:
    """Put a LoRA that PEFT, or ``to_peft``, wrote on a model, in place; it acts from now on.

    What is masked is known from the file's header if ``to_peft`` wrote it and nothing was trained
    beside its masks since; else a matrix that is zero in some places, not all, is masked there.
    PEFT's files know no fingerprint: whether the base is the right one is not checked beyond
    names and shapes. Raises RequestError for files that are missing, no LoRA, or use what this
    library does not have, and for names or shapes that the model does not have; RunError for
    damaged files. The model is as before then.
    """
    path = Path(path)
    config = _read_config(path)
    tensors, record = _read_weights(path)
    own = [str(n) for n in config.get("modules_to_save") or []]
    heads = _heads(model, own)
    grouped = _grouped(tensors, heads, model)
    if merged(model):
        raise RequestError("adapters are merged into the base; unmerge_ them first")
    flags = _masks(grouped, record)
    about = Options(
        kind="lora", rank=int(config["r"]), alpha=float(config["lora_alpha"]), name=name
    )
    kept = sum(int(flag.sum()) for flag in flags.values())
    share = kept / sum(flag.numel() for flag in flags.values())
    noted = {**vars(about), "targets": list(grouped), "keep": share, "score": "random"}
    with installing(model, name, noted, heads), torch.no_grad():
        for place, (a, b) in grouped.items():
            module = model.get_submodule(place)
            scaling = _scaling(config, place, a.shape[0])
            part = LoRA(a, b, scaling=scaling, dropout=float(config.get("lora_dropout", 0.0)))
            for letter, factor in (("A", part.a), ("B", part.b)):
                flag = flags[f"{place}.{letter}"]
                if not bool(flag.all()):
                    factor.keep_(flag)
            weight = module.weight
            assert isinstance(weight, Tensor)
            attach_(module, place, name, part.to(weight.device))
        for place, part_ in adapters(model, name).items():
            if isinstance(part_, Own):
                values = {
                    n: tensors[f"{place}.{n}"] for n in part_.names if f"{place}.{n}" in tensors
                }
                if len(values) < len(part_.names):
                    raise RequestError(f'{path} has no values for all of "{place}"')
                part_.put_(model.get_submodule(place), False, values)
    return model


def _config(model: nn.Module, mine: Mapping[str, LoRA], about: Mapping[str, Any]) -> dict[str, Any]:
    common, _ = Counter(part.a.shape[0] for part in mine.values()).most_common(1)[0]
    scaling = next(iter(mine.values())).scaling
    others = [name for name in linear_layers(model) if name not in mine]
    # PEFT takes a name for whatever ends with it, which may be more than was adapted
    exact = not any(other.endswith(f".{name}") for other in others for name in mine)
    alone = "|".join(re.escape(name) for name in mine)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None),
        "inference_mode": True,
        "r": common,
        "lora_alpha": scaling * common,
        "lora_dropout": next(iter(mine.values())).dropout,
        "target_modules": sorted(mine) if exact else f"(?:{alone})",
        "rank_pattern": {
            f"^{re.escape(name)}": part.a.shape[0]
            for name, part in mine.items()
            if part.a.shape[0] != common
        },
        "alpha_pattern": {
            f"^{re.escape(name)}": part.scaling * part.a.shape[0]
            for name, part in mine.items()
            if part.scaling * part.a.shape[0] != scaling * common
        },
        "modules_to_save": list(about["heads"]) or None,
        "fan_in_fan_out": all(transposed(model.get_submodule(name)) for name in mine),
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG).is_file():
        raise RequestError(f"{path} holds no {CONFIG}; give a directory that PEFT or to_peft wrote")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        kind = config["peft_type"]
        config["r"], config["lora_alpha"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path / CONFIG} is damaged ({error}); export it again") from error
    if kind != "LORA":
        raise RequestError(f"{path} holds an adapter of PEFT's type {kind}; only LORA can be read")
    for key, what in UNSUPPORTED.items():
        if config.get(key):
            raise RequestError(f"{path} has {what} ({key}), which cannot be read")
    if config.get("bias", "none") != "none":
        raise RequestError(f'{path} trained biases (bias="{config["bias"]}"), which cannot be read')
    found: dict[str, Any] = config
    return found


def _read_weights(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors by their name in the base, and the masks' record if there is one."""
    if not (path / WEIGHTS).is_file():
        other = path / "adapter_model.bin"
        why = "; adapter_model.bin is a pickle, which is not read" if other.exists() else ""
        raise RequestError(f"{path} holds no {WEIGHTS}{why}: save it with safe_serialization=True")
    try:
        with safe_open(path / WEIGHTS, framework="pt") as file:
            tensors = {name.removeprefix(PREFIX): file.get_tensor(name) for name in [*file.keys()]}
            return tensors, (file.metadata() or {}).get(MASKS)
    except SafetensorError as error:
        raise RunError(f"{path / WEIGHTS} is damaged ({error}); export it again") from error


def _heads(model: nn.Module, own: list[str]) -> list[str]:
    names = dict(model.named_modules())
    heads = [n for n in names if any(n == o or n.endswith(f".{o}") for o in own)]
    if own and not heads:
        raise RequestError(f"the adapter trained {', '.join(own)}, which this model does not have")
    return heads


def _grouped(
    tensors: Mapping[str, Tensor], heads: list[str], model: nn.Module
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the name of the module, checked against the model."""
    grouped: dict[str, tuple[Tensor, Tensor]] = {}
    linear = linear_layers(model)
    for name in tensors:
        if any(name.startswith(f"{head}.") for head in heads):
            continue
        if not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise RequestError(
                f'the file has "{name}", which is no LoRA of a linear layer; only those can be read'
            )
        place = name[: -len(".lora_A.weight")]
        if place in grouped:
            continue
        if place not in linear:
            raise RequestError(
                f'the adapter belongs to another base: this one has no linear layer "{place}"'
            )
        try:
            a, b = (tensors[f"{place}.lora_{letter}.weight"] for letter in "AB")
        except KeyError as error:
            raise RunError(f"the file has only one of A and B for {place}") from error
        into, out = sizes(linear[place]) or (0, 0)
        if a.shape[1:] != (into,) or b.shape[:1] != (out,) or a.shape[:1] != b.shape[1:]:
            raise RequestError(
                f'the adapter belongs to another base: "{place}" is ({out}, {into}) here, and the '
                f"file has A {tuple(a.shape)} and B {tuple(b.shape)}"
            )
        grouped[place] = (a, b)
    if not grouped:
        raise RequestError("the file has no LoRA in it")
    return grouped


def _masks(grouped: Mapping[str, tuple[Tensor, Tensor]], record: str | None) -> dict[str, Tensor]:
    matrices = {
        f"{place}.{letter}": matrix
        for place, pair in sorted(grouped.items())
        for letter, matrix in zip("AB", pair, strict=True)
    }
    zeros = {
        name: matrix != 0 if bool(matrix.any()) else torch.ones_like(matrix, dtype=torch.bool)
        for name, matrix in matrices.items()
    }
    if record is None:
        return zeros
    raw = torch.frombuffer(bytearray(base64.b64decode(record)), dtype=torch.uint8)
    try:
        flat = decode(raw, (sum(matrix.numel() for matrix in matrices.values()),))
    except (RunError, RequestError):  # other matrices than those it was written for
        return zeros
    pieces = torch.split(flat, [matrix.numel() for matrix in matrices.values()])
    noted = {
        name: piece.view(matrix.shape)
        for (name, matrix), piece in zip(matrices.items(), pieces, strict=True)
    }
    fit = all(not bool(matrices[name][~mask].any()) for name, mask in noted.items())
    return noted if fit else zeros


def _scaling(config: Mapping[str, Any], place: str, rank: int) -> float:
    """As PEFT computes it: alpha, of the layer's pattern if one matches, over r or its root."""
    alpha = float(config["lora_alpha"])
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", place):
            alpha = float(value)
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
