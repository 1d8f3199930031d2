"""The state of a session: all that continues it bit for bit."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from sparing.core.errors import RequestError
from sparing.core.random_state import random_state, set_random_state_
from sparing.hosts import loading
from sparing.hosts.host import PROBE_BATCHES
from sparing.hosts.layout import lay_out_like_parameters_

if TYPE_CHECKING:
    from sparing.hosts.session import Session


def state_of(session: Session) -> dict[str, Any]:
    """Weights, optimizer, methods, epochs, ledger, latest batches, generators."""
    return {
        "model": session.unwrapped.state_dict(),
        "optimizer": session._torch_optimizer.state_dict(),
        "methods": {method.name: method.state_dict() for method in session.methods},
        "epochs": session.epochs.state_dict(),
        "ledger": session.ledger.state_dict(),
        "recent": list(session._recent),
        "random": random_state(),
    }


def restore_(session: Session, state: dict[str, Any]) -> None:
    """Put back what ``state_of`` gave; RequestError if it is of other methods."""
    saved, here = sorted(state["methods"]), sorted(m.name for m in session.methods)
    if saved != here:
        raise RequestError(f"the saved state is of the methods {saved}, this session has {here}")
    session.unwrapped.load_state_dict(state["model"])
    session._torch_optimizer.load_state_dict(state["optimizer"])
    lay_out_like_parameters_(session._torch_optimizer)
    for method in session.methods:
        method.load_state_dict(state["methods"][method.name])
    epochs = state.get("epochs")
    if epochs is None:  # of a version before epochs had a state of their own
        fresh = session.epochs.state_dict()
        epochs = {**fresh, **{key: state[key] for key in ("clock", "plan", "done")}}
    session.epochs.load_state_dict(epochs)
    session.clock.steps = session._planned_steps()
    session.ledger.load_state_dict(state["ledger"])
    session._recent = deque(
        (loading.to_device(b, session.accelerator.device) for b in state["recent"]),
        maxlen=PROBE_BATCHES,
    )
    set_random_state_(state["random"])
