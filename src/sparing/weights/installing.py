"""A further adapter on a model: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from sparing.core.errors import RequestError
from sparing.weights.adapter import attach_, places
from sparing.weights.fingerprint import fingerprint, require_plain
from sparing.weights.installed import NOTE, active, base_parameters, names, note_of
from sparing.weights.own import Own
from sparing.weights.switching import delete_, switch_


@contextmanager
def installing(
    model: nn.Module, name: str, about: dict[str, Any], own: list[str]
) -> Iterator[None]:
    """Note a new adapter on the model and give it its own heads; if the body fails, nothing stays.

    The body attaches the parts, and they act afterwards. Raises RequestError for a taken name and
    a base that cannot be adapted.
    """
    if name in names(model):
        raise RequestError(
            f'the model has an adapter "{name}" already; give another name, or delete_ it first'
        )
    if not names(model):
        if places(model):
            raise RequestError("this is a part of an adapted model; give the model itself")
        require_plain(model)
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        vars(model)[NOTE] = {"trainable": trainable, "adapters": {}}
    before = active(model)
    switch_(model)  # heads show the base's values now, which a further adapter begins with
    note_of(model)["adapters"][name] = {
        "options": {**about, "name": name},
        "fingerprint": fingerprint(base_parameters(model).items(), own),
        "heads": list(own),
    }
    try:
        for path in own:
            for inner, module in model.get_submodule(path).named_modules():
                if next(module.parameters(recurse=False), None) is not None:
                    whole = f"{path}.{inner}" if inner else path
                    attach_(module, whole, name, Own(module))
        yield
        switch_(model, name)
    except BaseException:
        delete_(model, name)
        if names(model):
            switch_(model, *before)
        raise
