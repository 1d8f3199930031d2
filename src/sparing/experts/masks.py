"""Hands a model's padding mask to its expert layers, and the tokens' ids to their routers."""

from __future__ import annotations

import inspect
from typing import Any, final

from torch import Tensor, nn

from sparing.core.padding import real_tokens
from sparing.experts.layer import ExpertLayer

ELSEWHERE = ("vision", "visual", "image", "audio", "speech")
"""Names of towers whose tokens the mask of the text does not describe."""


@final
class MaskHook:
    """A forward pre-hook that begins a pass of all expert layers with the pass's padding mask.

    It takes the argument ``attention_mask`` if that is (B, S); anything not above 0 is padding.
    Of a bool mask (B, 1, S, S), as packed sequences have, a token that does not see itself is
    padding. Masks of other shapes do not say which token is real: then all are.

    The mask stays until the next pass, since activation checkpointing repeats a layer in backward:
    with checkpointing and padding, call backward before the next forward. So do ``input_ids``,
    for routers that go by them (see Router.begin).
    """

    def __init__(self, module: nn.Module) -> None:
        """``module``: what the hook will be registered on."""
        parameters = list(inspect.signature(module.forward).parameters)
        self.position = {name: place for place, name in enumerate(parameters)}
        self.text: list[ExpertLayer] = []
        self.other: list[ExpertLayer] = []

    def serve(self, layers: list[ExpertLayer]) -> None:
        """Serve ``layers`` from now on."""
        self.other = [layer for layer in layers if _elsewhere(layer.name)]
        self.text = [layer for layer in layers if not _elsewhere(layer.name)]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called by ``module`` before its forward."""
        mask = real_tokens(self._argument("attention_mask", args, kwargs))
        ids = self._argument("input_ids", args, kwargs)
        ids = ids if isinstance(ids, Tensor) and ids.ndim == 2 else None
        for layer in self.text:
            layer.begin(mask)
            layer.router.begin(ids)
        for layer in self.other:
            layer.begin(None)
            layer.router.begin(None)

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The argument of that name, however it was passed; None if it was not."""
        value = kwargs.get(name)
        place = self.position.get(name, len(args))
        return args[place] if value is None and place < len(args) else value


def _elsewhere(path: str) -> bool:
    return any(word in part for part in path.lower().split(".") for word in ELSEWHERE)


def attend_(model: nn.Module, layers: list[ExpertLayer]) -> None:
    """Hook ``model`` so that ``layers`` (all that it has) get its masks; repeatable.

    The hook sits on the body that all heads share, since that is called with or without a head.
    """
    body = getattr(model, "base_model", model)
    within = set(body.modules()) if isinstance(body, nn.Module) else set()
    target = body if within.issuperset(layers) else model
    hooks = [hook for hook in target._forward_pre_hooks.values() if isinstance(hook, MaskHook)]
    if hooks:
        hooks[0].serve(layers)
        return
    hook = MaskHook(target)
    hook.serve(layers)
    target.register_forward_pre_hook(hook, with_kwargs=True)
