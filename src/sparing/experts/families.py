"""Where the feed-forward blocks of a model are: one map, for surgery and for conversion alike.

Blocks are recognised by their structure (the names and types of their parts), so that a model
which no list names still works if it is built of blocks that one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.core.errors import RequestError
from sparing.experts.backends.activations import ACTIVATIONS

Kind = Literal["gated", "plain"]


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How one family names the parts of a block.

    A gated block is ``down(act(gate(x)) * up(x))``, a plain one ``down(act(up(x)))``. Without a
    ``gate``, a gated block is fused: ``up`` has 2f outputs, the gate's first. ``dropout`` follows
    ``down``; ``inner`` lies before ``down``, ``idle`` parts must do nothing.
    """

    name: str
    kind: Kind
    up: str
    down: str
    act: str
    gate: str | None = None
    dropout: str | None = None
    inner: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()

    @property
    def linear(self) -> tuple[str, ...]:
        """The names of the block's linear layers."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)


FAMILIES = (
    Family(
        name="LLaMA, Mistral, Qwen, Gemma, OLMo, SmolLM",
        kind="gated",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
        act="act_fn",
    ),
    Family(
        name="Phi-3, GLM", kind="gated", up="gate_up_proj", down="down_proj", act="activation_fn"
    ),
    Family(name="ModernBERT", kind="gated", up="Wi", down="Wo", act="act", inner=("drop",)),
    Family(
        name="GPT-2, GPT-Neo", kind="plain", up="c_fc", down="c_proj", act="act", dropout="dropout"
    ),
    Family(
        name="StarCoder2",
        kind="plain",
        up="c_fc",
        down="c_proj",
        act="act",
        dropout="residual_dropout",
    ),
    Family(name="GPT-J", kind="plain", up="fc_in", down="fc_out", act="act", dropout="dropout"),
    Family(
        name="GPT-NeoX, Falcon",
        kind="plain",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        act="act",
    ),
    Family(name="Nemotron", kind="plain", up="up_proj", down="down_proj", act="act_fn"),
    Family(
        name="ViT, DeiT, DINOv2, SigLIP, Phi",
        kind="plain",
        up="fc1",
        down="fc2",
        act="activation_fn",
    ),
    Family(
        name="timm",
        kind="plain",
        up="fc1",
        down="fc2",
        act="act",
        dropout="drop2",
        inner=("drop1",),
        idle=("norm",),
    ),
    Family(
        name="DistilBERT", kind="plain", up="lin1", down="lin2", act="activation", dropout="dropout"
    ),
)
SPLIT = "BERT, RoBERTa, ELECTRA"
"""These split the block over two modules of a layer, ``intermediate`` and ``output``."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One feed-forward block of a model.

    path: where its replacement will stand in the model; family: the name of its family; kind:
    gated or plain; dim, width: its input and hidden size; act: its activation; dropout: the
    probability after the block, which belongs to it; inner: that of its hidden units.
    """

    path: str
    family: str
    kind: Kind
    dim: int
    width: int
    act: Callable[[Tensor], Tensor]
    dropout: float
    inner: float
    body: nn.Module
    rest: nn.Module | None
    gate: nn.Module | None
    up: nn.Module
    down: nn.Module
    places: tuple[tuple[nn.Module, str], ...]

    @property
    def weight(self) -> Tensor:
        """A weight of the block, which tells its device and type."""
        return _matrix(self.down)

    @torch.no_grad()
    def read(self) -> dict[str, Tensor]:
        """The dense tensors, detached: up and gate (f, d), down (d, f), and ``*_bias`` if any.

        They may be views of the model's own weights: copy them before writing.
        """
        parts = {"up": self.up, "down": self.down}
        if self.gate is not None:
            parts["gate"] = self.gate
        found: dict[str, Tensor] = {}
        for name, part in parts.items():
            found[name] = _matrix(part)
            bias = getattr(part, "bias", None)
            if isinstance(bias, Tensor):
                found[f"{name}_bias"] = bias.detach()
        if self.kind == "gated" and self.gate is None:
            for name in [name for name in ("up", "up_bias") if name in found]:
                found[name.replace("up", "gate")], found[name] = found[name].chunk(2)
        return found

    @property
    def activation(self) -> str:
        """The name of ``act`` among the activations that experts have, found by its values.

        Raises RequestError if they do not have it.
        """
        if isinstance(self.act, nn.Module) and next(self.act.parameters(), None) is not None:
            # its values would be learned
            raise self._no_activation()
        grid = torch.linspace(-6.0, 6.0, 97, device="cpu")
        with torch.no_grad():
            values = self.act(grid)
        for name, known in ACTIVATIONS.items():
            if torch.allclose(values, known.plain(grid), rtol=1e-5, atol=1e-5):
                return name
        raise self._no_activation()

    def _no_activation(self) -> RequestError:
        name = getattr(self.act, "__name__", type(self.act).__name__)
        return RequestError(
            f'the activation of "{self.path}" is {name}, which experts do not have; they have '
            f"{', '.join(sorted(ACTIVATIONS))}"
        )

    def dense(self, x: Tensor) -> Tensor:
        """What the block computes in evaluation, from ``read``; (T, d) -> (T, d)."""
        w = self.read()
        up = F.linear(x, w["up"], w.get("up_bias"))
        if self.kind == "gated":
            hidden = self.act(F.linear(x, w["gate"], w.get("gate_bias"))) * up
        else:
            hidden = self.act(up)
        return F.linear(hidden, w["down"], w.get("down_bias"))

    @torch.no_grad()
    def check(self) -> None:
        """Run the block on a few numbers; RequestError if it is not what it looks like.

        This finds what names cannot tell: quantised weights, sparse activations, extra scales.
        """
        weight = self.weight
        if weight.is_meta:
            return
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 3, self.dim, generator=generator).to(weight.device, weight.dtype)
        modes = {m: m.training for part in (self.body, self.rest) if part for m in part.modules()}
        for module in modes:
            module.training = False
        try:
            y = self.body(x) if self.rest is None else self.down(self.body(x))
        finally:
            for module, mode in modes.items():
                module.training = mode
        expected = self.dense(x.flatten(0, 1)).view_as(x)
        close = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 5e-2
        if not torch.allclose(y, expected, rtol=close, atol=close * float(y.abs().max())):
            raise RequestError(
                f'"{self.path}" ({type(self.body).__name__}) has the parts of a {self.kind} '
                f"feed-forward block but computes something else, so it cannot be replaced; leave "
                f"it out with where=..."
            )

    def replace_(self, module: nn.Module) -> None:
        """Put ``module``, (..., d) -> (..., d), where the block stood."""
        for parent, name in self.places:
            setattr(parent, name, module)
            if self.rest is not None:
                # the second half keeps its dropout, residual and norm, and applies them to what
                # the first half now gives
                self.rest.dense = nn.Identity()
                if hasattr(parent, "chunk_size_feed_forward"):
                    # pieces of a sequence would be routed as batches of their own
                    vars(parent)["chunk_size_feed_forward"] = 0


def feed_forwards(model: nn.Module, families: Sequence[Family] = FAMILIES) -> list[Block]:
    """The feed-forward blocks of ``model`` that are recognised, in the order of its modules.

    families: the kinds of block to know; one described by hand goes before ``FAMILIES``.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent.named_children():
            places.setdefault(id(child), []).append((parent, name))
    return list(_blocks(model, places, families))


def _blocks(
    model: nn.Module,
    places: dict[int, list[tuple[nn.Module, str]]],
    families: Sequence[Family],
) -> Iterator[Block]:
    for path, module in model.named_modules():
        here = tuple(places.get(id(module), ()))
        if not here:
            continue
        for family in families:
            if _matches(module, family):
                yield _block(path, module, family, here)
                break
        else:
            if path.rpartition(".")[2] == "intermediate":
                found = _split(path, module, here)
                if found is not None:
                    yield found


def known_families() -> str:
    """The names of all families, for messages."""
    return "; ".join([*(family.name for family in FAMILIES), SPLIT])


def _matches(module: nn.Module, family: Family) -> bool:
    children = dict(module.named_children())
    if not all(_is_linear(children.get(name)) for name in family.linear):
        return False
    if not callable(getattr(module, family.act, None)):
        return False
    if family.dropout is not None and not hasattr(module, family.dropout):
        return False
    if not all(isinstance(children.get(name), nn.Identity) for name in family.idle):
        return False
    # a part that the map does not know would be lost
    known = {*family.linear, family.act, family.dropout, *family.inner, *family.idle}
    if not known.issuperset(children) or next(module.parameters(recurse=False), None) is not None:
        return False
    up, down = _matrix(children[family.up]), _matrix(children[family.down])
    fused = 2 if family.kind == "gated" and family.gate is None else 1
    return up.shape[0] == fused * down.shape[1] and up.shape[1] == down.shape[0]


def _block(
    path: str, module: nn.Module, family: Family, places: tuple[tuple[nn.Module, str], ...]
) -> Block:
    part: dict[str, Any] = dict(module.named_children())
    dim, width = _matrix(part[family.down]).shape
    return Block(
        path=path,
        family=family.name,
        kind=family.kind,
        dim=dim,
        width=width,
        act=getattr(module, family.act),
        dropout=_probability(getattr(module, family.dropout) if family.dropout else None),
        inner=max([0.0, *(_probability(part.get(name)) for name in family.inner)]),
        body=module,
        rest=None,
        gate=part[family.gate] if family.gate else None,
        up=part[family.up],
        down=part[family.down],
        places=places,
    )


def _split(path: str, module: nn.Module, places: tuple[tuple[nn.Module, str], ...]) -> Block | None:
    """The block whose first half is ``module``, a layer's ``intermediate``."""
    act = getattr(module, "intermediate_act_fn", None)
    up = getattr(module, "dense", None)
    output = getattr(places[0][0], "output", None)
    down = getattr(output, "dense", None)
    if not (isinstance(up, nn.Module) and isinstance(down, nn.Module) and callable(act)):
        return None
    if not (_is_linear(up) and _is_linear(down) and isinstance(output, nn.Module)):
        return None
    (width, dim), out = _matrix(up).shape, _matrix(down).shape
    if out != (dim, width) or not {"dense", "intermediate_act_fn"}.issuperset(module._modules):
        return None
    return Block(
        path=path,
        family=SPLIT,
        kind="plain",
        dim=dim,
        width=width,
        act=act,
        dropout=0.0,
        inner=0.0,
        body=module,
        rest=output,
        gate=None,
        up=up,
        down=down,
        places=places,
    )


def _is_linear(module: nn.Module | None) -> bool:
    if not (isinstance(module, nn.Linear) or _is_transposed(module)):
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point()


def _is_transposed(module: nn.Module | None) -> bool:
    """Whether it is the linear layer of GPT-2, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _matrix(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (out, in)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().t() if _is_transposed(module) else weight.detach()


def _probability(dropout: Any) -> float:
    return float(getattr(dropout, "p", dropout) or 0.0)
