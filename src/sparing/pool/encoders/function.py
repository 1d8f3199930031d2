"""Any callable on a batch becomes an encoder: a function or a module from tensors to features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparing.core.errors import RequestError
from sparing.pool.encoders import in_batches
from sparing.pool.encoders.images import pictures, squares
from sparing.pool.items import Item, Vectors


@final
class Function:
    """``function(batch) -> (n, d)``, on what the items hold.

    Tensors arrive stacked, (n, ...); images, where ``side`` is given, as (n, 3, side, side) from 0
    to 1; texts as a list. ``text``, another such callable, makes the second vectors of image-text
    pairs from their texts. A module, or a method of one, is run in evaluation mode without
    gradients, on the device of its parameters, and left as it was. ``dim`` may be left out until
    the first batch; ``version`` is by default a hash of the code and the module's weights.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        *,
        text: Callable[[list[str]], Any] | None = None,
        side: int | None = None,
        dim: int | None = None,
        version: str | None = None,
        batch: int = 256,
    ) -> None:
        self.function, self.text, self.side, self.batch = function, text, side, batch
        self._dim = dim
        self._version = version

    @property
    def dim(self) -> int:
        if self._dim is None:
            raise RequestError(
                "the size of this encoder's vectors is known after its first batch only; "
                "give it: encoder(function, dim=...)"
            )
        return self._dim

    @property
    def version(self) -> str:
        if self._version is None:
            parts = [digest(f) for f in (self.function, self.text) if f is not None]
            self._version = "-".join(parts)
        return self._version

    def __call__(self, items: Sequence[Item]) -> Vectors:
        """(n, d). Raises RequestError for items of several kinds or shapes in one batch."""
        main = self._all(self._given, self.function, items)
        second = None
        if self.text is not None and items and all(item.text is not None for item in items):
            second = self._all(lambda part: [item.text or "" for item in part], self.text, items)
        if self._dim is None and len(items):
            self._dim = main.shape[1]
        return Vectors(main=main, second=second)

    def _all(
        self, given: Callable[[Sequence[Item]], Any], function: Any, items: Sequence[Item]
    ) -> NDArray[np.float32]:
        def one(part: Sequence[Item]) -> NDArray[np.float32]:
            made = applied(function, given(part))
            if len(made) != len(part):
                raise RequestError(
                    f"the encoder's callable gave {len(made)} rows for {len(part)} items; "
                    "expected one a row: a result of shape (n, d)"
                )
            return made

        return in_batches(items, self.batch, one, self._dim or 0)

    def _given(self, items: Sequence[Item]) -> Any:
        kinds = {item.kind for item in items}
        if kinds == {"tensor"}:
            return stacked(items)
        if kinds == {"text"}:
            return [item.text or "" for item in items]
        if kinds <= {"image", "image-text"}:
            if self.side is None:
                raise RequestError(
                    "this encoder is a callable on tensors and the items are image files; say to "
                    "what size they are to be scaled: encoder(function, side=224)"
                )
            return torch.from_numpy(squares(pictures(items, near=self.side), self.side)) / 255
        raise RequestError(
            f"a callable takes items of one kind in a batch, these are {', '.join(sorted(kinds))}; "
            "add them apart"
        )


def stacked(items: Sequence[Item]) -> Tensor:
    """(n, ...) of items that are tensors. Raises RequestError where their shapes differ."""
    arrays = [item.tensor for item in items if item.tensor is not None]
    shapes = {array.shape: item.key for array, item in zip(arrays, items, strict=True)}
    if len(shapes) > 1:
        listed = ", ".join(f"{key}: {shape}" for shape, key in list(shapes.items())[:3])
        raise RequestError(f"the tensors of a batch need one shape, these differ ({listed})")
    return torch.from_numpy(np.stack(arrays))


@torch.no_grad()
def applied(function: Callable[[Any], Any], given: Any) -> NDArray[np.float32]:
    """``function(given)`` as (n, d) float32; further dimensions are laid flat."""
    module = _module(function)
    if module is None:
        return _array(function(given))
    training = {part: part.training for part in module.modules()}
    held = next((p for p in module.parameters() if p.is_floating_point()), None)
    if isinstance(given, Tensor) and held is not None:
        given = given.to(held.device, held.dtype if given.is_floating_point() else None)
    module.eval()
    try:
        return _array(function(given))
    finally:
        for part, before in training.items():
            part.training = before


def digest(function: Callable[..., Any]) -> str:
    """A name for what a callable computes: its own, and a hash of its weights and its code.

    Modules that a method belongs to or a function encloses are part of it; what it reads from
    elsewhere, globals and files, is not.
    """
    made = hashlib.blake2b(digest_size=8)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    made.update(f"{getattr(function, '__module__', '')}.{name}".encode())
    enclosed = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    for part in (_module(function), *enclosed):
        if isinstance(part, nn.Module):
            made.update(repr(part).encode())
            for key, tensor in sorted(part.state_dict().items()):
                held = tensor.detach().cpu().contiguous()
                made.update(f"{key}{held.dtype}{tuple(held.shape)}".encode())
                made.update(held.flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(part, int | float | str | bytes | tuple):
            made.update(repr(part).encode())
    code = getattr(function, "__code__", None)
    if isinstance(code, CodeType):
        _add_code(made, code)
    return f"{name}-{made.hexdigest()}"


def _module(function: Callable[..., Any]) -> nn.Module | None:
    """The module that a callable is, or that it is a method of."""
    if isinstance(function, nn.Module):
        return function
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _add_code(made: Any, code: CodeType) -> None:
    made.update(code.co_code + repr((code.co_names, code.co_varnames)).encode())
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _add_code(made, constant)  # its repr would hold an address
        elif not isinstance(constant, frozenset):  # whose order is another in each process
            made.update(repr(constant).encode())


def _array(result: Any) -> NDArray[np.float32]:
    if isinstance(result, Tensor):
        result = result.detach().float().cpu().numpy()
    try:
        found = np.asarray(result, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"the encoder's callable gave {type(result).__name__}, which is no array of numbers "
            f"({error}); expected (n, d)"
        ) from error
    if found.ndim < 2:
        raise RequestError(
            f"the encoder's callable gave a result of shape {found.shape}; expected (n, d)"
        )
    return found.reshape(len(found), -1)
