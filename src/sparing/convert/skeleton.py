"""A checkpoint's structure: its model without weights, and where its feed-forward blocks are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from sparing.convert.checkpoint import Shards, Source, Whole
from sparing.core.errors import RequestError, RunError
from sparing.core.quiet import quietly
from sparing.experts.families import FAMILIES, Block, Family, feed_forwards, known_families

PARTS = ("gate", "up", "down")


@final
@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """A dense model as conversion sees it.

    source: its tensors; model: its modules on the meta device; config: transformers' own;
    blocks: its feed-forward blocks, in order; names: the source's name of each tensor of the
    model's state dict; aliases: names tied to another, which is kept; families: the kinds of
    block that were known. whole: why the weights are held in memory, or None.
    """

    source: Source
    model: nn.Module
    config: Any
    blocks: tuple[Block, ...]
    names: Mapping[str, str]
    aliases: Mapping[str, str]
    families: tuple[Family, ...]
    whole: str | None = None

    @property
    def class_name(self) -> str:
        """The model's class in transformers."""
        return type(self.model).__name__

    def parts(self, block: Block) -> dict[str, str]:
        """The state-dict names of a block's weights and biases, by part: ``up``, ``up_bias``..."""
        return dict(self._parts[block.path])

    @cached_property
    def _parts(self) -> dict[str, dict[str, str]]:
        by_module = {id(module): name for name, module in self.model.named_modules()}
        every: dict[str, dict[str, str]] = {}
        for own in self.blocks:
            found = every[own.path] = {}
            for part in PARTS:
                module = getattr(own, part)
                if module is None:
                    continue
                name = by_module[id(module)]
                found[part] = f"{name}.weight"
                if getattr(module, "bias", None) is not None:
                    found[f"{part}_bias"] = f"{name}.bias"
        return every

    def read(self, block: Block, part: str) -> Tensor:
        """One dense part of a block: up and gate (f, d), down (d, f), or ``*_bias``."""
        parts = self.parts(block)
        fused = block.kind == "gated" and block.gate is None
        stored = part.replace("gate", "up") if fused else part
        tensor = self.source.read(self.names[parts[stored]])
        if tensor.ndim == 2 and self._transposed(block, part):
            tensor = tensor.t()
        if fused and not part.startswith("down"):
            tensor = tensor.chunk(2)[0 if part.startswith("gate") else 1]
        return tensor

    def dense_parts(self, block: Block) -> list[str]:
        """The parts that ``read`` gives of a block."""
        found = list(self.parts(block))
        if block.kind == "gated" and block.gate is None:
            found = [n for part in found for n in _halves(part)]
        return found

    def dtype(self, block: Block) -> torch.dtype:
        """The type of a block's weights."""
        return self.source.dtype(self.names[self.parts(block)["down"]])

    def _transposed(self, block: Block, part: str) -> bool:
        module = getattr(block, part if getattr(block, part, None) is not None else "up")
        return type(module).__name__ == "Conv1D"


def skeleton(directory: str | Path, family: Family | None = None) -> Skeleton:
    """Read the structure of the checkpoint in ``directory``; no weights are loaded.

    family: a kind of feed-forward block described by hand, known before ``FAMILIES``.

    Raises RequestError if the model is of no class in transformers, has no feed-forward block that
    is known, or a block that experts cannot stand for; RunError if tensors are missing or have the
    wrong shape.
    """
    shards = Shards(directory)
    config, model = _empty(Path(directory), shards.config)
    families = FAMILIES if family is None else (family, *FAMILIES)
    blocks = feed_forwards(model, families)
    if not blocks:
        raise RequestError(_unknown(model, config))
    for block in blocks:
        _ = block.activation  # raises if experts lack it
    state = model.state_dict(keep_vars=True)
    aliases = aliases_of(state)
    names = _names(state, aliases, shards, getattr(model, "base_model_prefix", ""))
    source: Source = shards
    why = None
    if isinstance(names, str):
        missing, why = names, "its files name tensors as an older version of transformers did"
        source = _whole(Path(directory), type(model))
        found = _names(state, aliases, source, "")
        if isinstance(found, str):
            raise RunError(
                f'{directory} lacks "{missing}", which a {type(model).__name__} has; download it '
                f"again, or write it anew with save_pretrained"
            )
        names = found
    made = Skeleton(
        source=source,
        model=model,
        config=config,
        blocks=tuple(blocks),
        names=names,
        aliases=aliases,
        families=families,
        whole=why,
    )
    _check(made, state)
    return made


def _empty(directory: Path, body: Mapping[str, Any]) -> tuple[Any, nn.Module]:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise RequestError(
            'conversion needs the package "transformers"; run: pip install "sparing[hf]"'
        ) from error
    named = body.get("architectures") or []
    model_class = getattr(transformers, str(named[0]), None) if named else None
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        if model_class is None:
            table = transformers.AutoModelForCausalLM._model_mapping
            if type(config) not in table:
                raise RequestError(
                    f"the model at {directory} ({', '.join(map(str, named)) or 'no architecture'}) "
                    f"is of no class in transformers {transformers.__version__}; build it yourself "
                    f"and use sparing.moefy_"
                )
            model_class = table[type(config)]
    except (ValueError, KeyError, OSError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(
            f"the configuration at {directory} does not name a model that transformers "
            f"{transformers.__version__} has ({error})"
        ) from error
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = model_class(config)
    model.tie_weights()
    return config, model.eval()


def aliases_of(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names in a state dict that are tied to an earlier one, by name."""
    kept: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, tensor in state.items():
        first = kept.setdefault(id(tensor), name)
        if first != name:
            found[name] = first
    return found


def _names(
    state: Mapping[str, Tensor], aliases: Mapping[str, str], source: Source, prefix: str
) -> dict[str, str] | str:
    """The source's name of each tensor that is no alias; the first that it lacks, as a str."""
    held = source.shapes()
    tied: dict[str, list[str]] = {}
    for alias, name in aliases.items():
        tied.setdefault(name, []).append(alias)
    found: dict[str, str] = {}
    for name in state:
        if name in aliases:
            continue
        tries = [t for n in (name, *tied.get(name, ())) for t in _spellings(n, prefix)]
        there = next((t for t in tries if t in held), None)
        if there is None:
            return name
        found[name] = there
    return found


def _spellings(name: str, prefix: str) -> list[str]:
    """A checkpoint of the bare model has no prefix, one with a head has."""
    if not prefix:
        return [name]
    bare = name.removeprefix(f"{prefix}.")
    return [name, bare if bare != name else f"{prefix}.{name}"]


def _whole(directory: Path, model_class: Any) -> Whole:
    with quietly():
        model, told = model_class.from_pretrained(
            directory, local_files_only=True, output_loading_info=True, dtype="auto"
        )
    lost = set(told["missing_keys"])
    return Whole(directory, {n: t for n, t in model.state_dict().items() if n not in lost})


def _check(made: Skeleton, state: Mapping[str, Tensor]) -> None:
    shapes = made.source.shapes()
    for name, theirs in made.names.items():
        if shapes[theirs] != tuple(state[name].shape):
            raise RunError(
                f'"{theirs}" has shape {shapes[theirs]}, and config.json asks for '
                f"{tuple(state[name].shape)}; the files do not belong together"
            )
    for block in made.blocks:
        for name in made.parts(block).values():
            if not made.source.dtype(made.names[name]).is_floating_point:
                raise RequestError(
                    f'"{name}" holds {made.source.dtype(made.names[name])}: a quantised '
                    f"checkpoint; convert the model as it was before quantisation"
                )
        bias = made.parts(block).get("gate_bias")
        if bias is not None and bool(made.read(block, "gate_bias").any()):
            raise RequestError(
                f'the gate of "{block.path}" has a bias, which gated experts lack; this model '
                f"cannot be converted"
            )


def _unknown(model: nn.Module, config: Any) -> str:
    """What to say of a model without a known feed-forward: its modules, and how to describe one."""
    seen: dict[str, str] = {}
    for path, module in model.named_modules():
        linear = [n for n, child in module.named_children() if isinstance(child, nn.Linear)]
        if len(linear) >= 2:
            seen.setdefault(type(module).__name__, f"{path} with {', '.join(linear)}")
    listing = "; ".join(f"{kind} ({where})" for kind, where in list(seen.items())[:6]) or "none"
    return (
        f'no feed-forward block was recognised in this {type(model).__name__} ("'
        f'{config.model_type}"). Modules with linear layers: {listing}. Known are the blocks of '
        f"{known_families()}. Describe one by the names of its parts: --block "
        f"gate=NAME,up=NAME,down=NAME,act=NAME (without gate for a plain block)"
    )


def _halves(part: str) -> Sequence[str]:
    return (part.replace("up", "gate"), part) if part.startswith("up") else (part,)


def described(text: str) -> Family:
    """The family that ``gate=w1,up=w3,down=w2,act=act_fn`` describes; RequestError if it cannot.

    ``dropout``, ``inner`` and ``idle`` may be named too (see ``Family``).
    """
    given: dict[str, str] = {}
    for item in text.split(","):
        key, _, value = item.partition("=")
        if (
            key.strip() not in ("gate", "up", "down", "act", "dropout", "inner", "idle")
            or not value
        ):
            raise RequestError(
                f'"{item}" describes no part of a block; write up=NAME,down=NAME,act=NAME, and '
                f"gate=NAME for a gated one"
            )
        given[key.strip()] = value.strip()
    missing = [key for key in ("up", "down", "act") if key not in given]
    if missing:
        raise RequestError(f'the block "{text}" lacks {", ".join(missing)}')
    return Family(
        name="described by hand",
        kind="gated" if "gate" in given else "plain",
        gate=given.get("gate"),
        up=given["up"],
        down=given["down"],
        act=given["act"],
        dropout=given.get("dropout"),
        inner=(given["inner"],) if "inner" in given else (),
        idle=(given["idle"],) if "idle" in given else (),
    )
