"""What methods share that train a few values beside a frozen base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparing.core.ledger import Ledger
from sparing.core.method import ParamGroups


def trained_only(groups: ParamGroups) -> ParamGroups:
    """The optimizer's groups without parameters that are frozen, named or not."""

    def is_trained(entry: Any) -> bool:
        return bool((entry[1] if isinstance(entry, tuple) else entry).requires_grad)

    return [{**g, "params": [p for p in g["params"] if is_trained(p)]} for g in groups]


def enter(ledger: Ledger, sizes: Mapping[str, int], written: tuple[int, int]) -> None:
    """Enter what is trained, of what training the whole base would train, and what was written.

    ``sizes``, in values: ``base``, those ``trained``, and the ``values`` that a token meets beside
    the base; empty before there are any. ``written``: bytes of files, and those of the base.
    """
    if sizes:
        base = sizes["base"]
        ledger.set_level("parameters", spent=sizes["trained"], dense=base)
        ledger.set_level("active_parameters", spent=base + sizes["values"], dense=base)
    if any(written):
        ledger.add("bytes", spent=written[0], dense=written[1])
