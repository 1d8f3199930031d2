"""Adapters of Hugging Face's PEFT as a method, so that a comparison can train them beside others.

PEFT computes, this file only places its modules, frees the head, and accounts: LoRA (Hu et al.,
arXiv 2106.09685) and SHiRA, trained values at random places of the weights themselves (Bhardwaj
et al., arXiv 2406.13175). github.com/huggingface/peft.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from safetensors.torch import save_file
from torch import nn

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError, unknown
from sparing.core.flops import Call, Product, matmul_flops, register
from sparing.core.ledger import Ledger
from sparing.core.method import Method, ParamGroups, Setup, Signal
from sparing.core.state import replacing
from sparing.weights.adapter import places
from sparing.weights.frozen import enter, trained_only
from sparing.weights.peft import CONFIG, PREFIX, WEIGHTS
from sparing.weights.places import heads, lora_targets

KINDS = ("lora", "shira")
NAME = "default"
"""What PEFT calls an adapter that nobody named."""


@final
@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``Peft``.

    kind: "lora" or "shira". r: LoRA's rank; SHiRA trains as many values as a LoRA of that rank,
    r * (in + out) of each matrix. alpha: LoRA is scaled by alpha / r; SHiRA takes none.
    dropout: on LoRA's input. targets, train_also: as of ``SparseAdapter``: names, a regular
    expression, "all-linear", None for query and value; modules of the base that are trained too,
    None for a new head. zero_start: nothing changes before training. seed: of first values and
    places; None is that of the run.
    """

    kind: str = "lora"
    r: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    targets: Any = None
    train_also: Any = None
    zero_start: bool = True
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of PEFT's adapters", self.kind, KINDS)
        require_whole("r", self.r, 1)
        require_number("alpha", self.alpha, 0)
        require_number("dropout", self.dropout, 0, 1)
        if self.dropout == 1:
            raise RequestError("dropout must be below 1; at 1 nothing passes")
        if self.kind == "shira" and self.dropout:
            raise RequestError("SHiRA has no dropout; set dropout=0 or kind=lora")
        if self.seed is not None:
            require_whole("seed", self.seed, 0)
        for field in ("targets", "train_also"):
            value = getattr(self, field)
            if isinstance(value, tuple | set):
                object.__setattr__(self, field, list(value))
            elif value is not None and not isinstance(value, str | list):
                raise RequestError(f"{field} must be names or an expression, got {value!r}")
        if isinstance(self.train_also, str):
            object.__setattr__(self, "train_also", [self.train_also])


@final
class Peft(Method):
    """Trains PEFT's own LoRA or SHiRA on a frozen base; see ``Options`` for its keywords."""

    name: ClassVar[str] = "peft"
    freezes: ClassVar[bool] = True
    Options = Options
    conflicts: ClassVar[Mapping[str, str]] = {
        "sparse-adapter": "each of them freezes the other's values"
    }
    freezes_base: ClassVar[bool] = True
    """The base stays as it was, under names to which PEFT adds ``.base_layer``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._heads: list[str] = []
        self._sizes: dict[str, int] = {}
        self._written = (0, 0)

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        if not hasattr(model, "peft_config"):
            seed = setup.seed if self.options.seed is None else self.options.seed
            self._inject_(model, seed)
        self._own(model)
        return model

    def bind(self, *, model: nn.Module | None = None, **known: Any) -> None:
        if model is not None and hasattr(model, "peft_config"):
            self._own(model)

    def _inject_(self, model: nn.Module, seed: int) -> None:
        """Raises RequestError without PEFT, without a place, and for what PEFT refuses."""
        peft = _peft()
        if places(model):
            raise RequestError("the model has adapters of this library; delete_ them first")
        own = heads(model, self.options.train_also)
        inside = tuple(f"{name}." for name in own)
        where = [
            path
            for path in lora_targets(model, self.options.targets)
            if path not in own and not path.startswith(inside or "\0")
        ]
        if not where:
            raise RequestError(
                f"there is nothing to adapt beside {', '.join(own)}, which is trained as a whole"
            )
        named = {"r": self.options.r, "target_modules": "|".join(map(re.escape, where))}
        if self.options.kind == "lora":
            config = peft.LoraConfig(
                **named,
                lora_alpha=self.options.alpha,
                lora_dropout=self.options.dropout,
                init_lora_weights=self.options.zero_start,
            )
        else:
            config = peft.ShiraConfig(
                **named, random_seed=seed, init_weights=self.options.zero_start
            )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # which PEFT draws first values from
            try:
                peft.inject_adapter_in_model(config, model, adapter_name=NAME)
            except (ValueError, TypeError) as error:
                raise RequestError(f"PEFT cannot adapt this model: {error}") from error
        for parameter in _values(model, self.options.kind):
            # half precision loses small updates; PEFT's own entry point does so too
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
        for path in where:
            layer = model.get_submodule(path)
            # SHiRA reads the weight and never calls its layer: nothing there is to be counted
            if self.options.kind == "shira":
                vars(layer.get_submodule("base_layer"))["owns_flops"] = True
            for part in ("lora_A", "lora_B"):
                if hasattr(layer, part):
                    vars(getattr(layer, part)[NAME])["beside_dense"] = True
        for path in own:
            model.get_submodule(path).requires_grad_(True)

    def _own(self, model: nn.Module) -> None:
        self._heads = heads(model, self.options.train_also)
        values = list(_values(model, self.options.kind))
        own = [p for path in self._heads for p in model.get_submodule(path).parameters()]
        base = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in values)
        stored = sum(p.numel() * p.element_size() for p in [*values, *own])
        indices = [
            index for m in model.modules() for index in getattr(m, "shira_indices", {}).values()
        ]
        self._sizes = {
            "base": base,
            "values": sum(p.numel() for p in values),
            "trained": sum(p.numel() for p in [*values, *own]),
            "stored": stored + sum(index.numel() * index.element_size() for index in indices),
        }

    def optimizer(self, model: nn.Module, groups: ParamGroups) -> ParamGroups:
        return trained_only(groups)

    def touches(self) -> list[str]:
        if not self._sizes:
            return []
        return [
            f"trains {self._sizes['trained']:,} values beside a frozen base of "
            f"{self._sizes['base']:,}, by PEFT"
        ]

    def account(self, ledger: Ledger) -> None:
        enter(ledger, self._sizes, self._written)
        self._written = (0, 0)

    def signals(self) -> dict[str, Signal]:
        if not self._sizes:
            return {}
        return {
            "trained_parameters": self._sizes["trained"],
            "adapter_parameters": self._sizes["values"],
            "stored_bytes": self._sizes["stored"],
        }

    def state_dict(self) -> dict[str, Any]:
        # values are the model's, in its own state; SHiRA's places follow from the seed
        return {"options": self.to_dict()}

    def export(self, model: nn.Module, path: Path) -> None:
        """Write what ``PeftModel.from_pretrained(base, path)`` reads, whole or not at all."""
        tensors = dict(_peft().get_peft_model_state_dict(model, adapter_name=NAME))
        for head in self._heads:
            for name, parameter in model.get_submodule(head).named_parameters():
                tensors[f"{head}.{name}"] = parameter
        config = model.peft_config[NAME].to_dict()  # type: ignore[union-attr, index]
        config |= {"modules_to_save": self._heads or None, "inference_mode": True}
        with replacing(path) as aside:
            ready = {f"{PREFIX}{n}": t.detach().cpu().contiguous() for n, t in tensors.items()}
            save_file(ready, aside / WEIGHTS, metadata={"format": "pt"})
            text = json.dumps(config, indent=2, sort_keys=True, default=_plain)
            (aside / CONFIG).write_text(text + "\n", encoding="utf-8")
        whole = sum(p.numel() * p.element_size() for p in model.parameters())
        whole -= sum(p.numel() * p.element_size() for p in _values(model, self.options.kind))
        self._written = sum(file.stat().st_size for file in path.iterdir()), whole

    @classmethod
    def imported(cls, path: Path, base: Callable[[], nn.Module]) -> nn.Module:
        """The base under PEFT's own ``PeftModel``."""
        model: nn.Module = _peft().PeftModel.from_pretrained(base(), str(path))
        return model


def _peft() -> Any:
    """The package. Raises RequestError if it is not installed."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise RequestError(
            f'"{Peft.name}" needs the package "{error.name}", which is not installed; '
            f'run: pip install "sparing[peft]"'
        ) from error
    return peft


def _values(model: nn.Module, kind: str) -> Iterator[nn.Parameter]:
    """The parameters that PEFT added."""
    for name, parameter in model.named_parameters():
        if any(part.startswith(f"{kind}_") for part in name.split(".")):
            yield parameter


def _plain(value: Any) -> Any:
    """What JSON has no form for in PEFT's configuration: sets and functions."""
    return sorted(value) if isinstance(value, set) else str(value)


def _shira(call: Call) -> list[Product]:
    """Its weight, base and values together, is made anew and multiplied by in one product."""
    module, x = call.module, call.x
    width, out = module.in_features, module.out_features
    trained = any(values.requires_grad for values in module.shira_weight.values())
    return [Product(matmul_flops(x.numel() // width, width, out), x.requires_grad + trained)]


register("peft.tuners.shira.layer.Linear", _shira)
