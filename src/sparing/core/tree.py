"""A state tree as JSON plus named tensors, and back.

A tree is made of dict, list, tuple, str, int, float, bool, None and Tensor; keys of a dict are
str, int, float, bool, None or tuples of these. What JSON has no word for is an object with one
key that begins with ``$``: ``{"$tensor": name}``, ``{"$tuple": [...]}``, ``{"$float": "nan"}``
and ``{"$dict": [[key, value], ...]}`` for a dict whose keys are not all plain strings.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparing.core.errors import RequestError

# what safetensors can store under its own dtype; any other travels as bytes, dtype and shape
_NATIVE = frozenset(
    {
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool,
    }
)  # fmt: skip


def encode(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split a tree into JSON-able data and its tensors by name, each contiguous and on the CPU.

    Tensors that share memory become independent copies. Raises RequestError for anything that is
    not part of a tree, naming where it stands.
    """
    tensors: dict[str, Tensor] = {}
    return _encode(tree, "", tensors, set()), tensors


def decode(data: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree that ``encode`` took apart; KeyError or ValueError for data of another kind."""
    if isinstance(data, list):
        return [decode(item, tensors) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) == 1:
        (tag, body), *_ = data.items()
        if tag == "$tensor":
            return tensors[body]
        if tag == "$bytes":
            return _from_bytes(tensors[body["name"]], body["dtype"], body["shape"])
        if tag == "$tuple":
            return tuple(decode(item, tensors) for item in body)
        if tag == "$float":
            return float(body)
        if tag == "$dict":
            return {decode(key, tensors): decode(value, tensors) for key, value in body}
    return {key: decode(value, tensors) for key, value in data.items()}


def _encode(node: Any, path: str, tensors: dict[str, Tensor], storages: set[int]) -> Any:
    if node is None or isinstance(node, bool | str):
        return node
    if isinstance(node, int):
        return int(node)
    if isinstance(node, float):
        return float(node) if math.isfinite(node) else {"$float": repr(float(node))}
    if isinstance(node, Tensor):
        return _encode_tensor(node, path, tensors, storages)
    if isinstance(node, list | tuple):
        items = [_encode(item, f"{path}/{i}", tensors, storages) for i, item in enumerate(node)]
        return items if isinstance(node, list) else {"$tuple": items}
    if isinstance(node, dict):
        if all(type(key) is str and not key.startswith("$") for key in node):
            return {
                key: _encode(value, f"{path}/{key}", tensors, storages)
                for key, value in node.items()
            }
        return {
            "$dict": [
                [
                    _encode_key(key, path, storages),
                    _encode(value, f"{path}/{key}", tensors, storages),
                ]
                for key, value in node.items()
            ]
        }
    raise _alien(node, path)


def _encode_key(key: Any, path: str, storages: set[int]) -> Any:
    if isinstance(key, Tensor):  # hashed by identity, which no file keeps
        raise _alien(key, f"{path}/(key)")
    return _encode(key, f"{path}/(key)", {}, storages)


def _alien(node: Any, path: str) -> RequestError:
    return RequestError(
        f"cannot save a {type(node).__module__}.{type(node).__qualname__} at "
        f'"{path.lstrip("/") or "the top"}" of a state; a state is made of dict, list, tuple, '
        f"str, int, float, bool, None and dense torch tensors"
    )


def _encode_tensor(
    tensor: Tensor, path: str, tensors: dict[str, Tensor], storages: set[int]
) -> dict[str, Any]:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise _alien(tensor, path)
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    storage = plain.untyped_storage()
    # a view would save its whole storage's memory twice, or be refused as shared
    if storage.data_ptr() in storages or storage.nbytes() != plain.nbytes:
        plain = plain.clone()
        storage = plain.untyped_storage()
    storages.add(storage.data_ptr())
    name = base = path.lstrip("/") or "tensor"
    number = 1
    while name in tensors or name == "__metadata__":  # a word of the file format
        number += 1
        name = f"{base}#{number}"
    if plain.dtype in _NATIVE:
        tensors[name] = plain
        return {"$tensor": name}
    tensors[name] = plain.reshape(-1).view(torch.uint8)
    dtype = str(plain.dtype).removeprefix("torch.")
    return {"$bytes": {"name": name, "dtype": dtype, "shape": list(plain.shape)}}


def _from_bytes(raw: Tensor, dtype: str, shape: list[int]) -> Tensor:
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f'unknown dtype "{dtype}"')
    return raw.clone().view(kind).reshape(shape)
