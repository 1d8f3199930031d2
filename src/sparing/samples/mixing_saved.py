"""The state of a mixture: weights, losses, the plan itself, and the place in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch

from sparing.core import ranks
from sparing.core.errors import RequestError
from sparing.samples.mixing_plan import Drawn, tensor

if TYPE_CHECKING:
    from sparing.samples.mix import Mix


@final
class MixState:
    """Takes a mixture's state apart and puts it back."""

    @staticmethod
    def of(mix: Mix) -> dict[str, Any]:
        """All that is needed to go on; ``done`` counts places of the plan over all ranks."""
        done = mix._start + mix._reported * ranks.world_size()
        return {
            "names": list(mix.names),
            "size": int(mix.members.source_of.size),
            "weights": mix.weights.clone(),
            "losses": mix.losses.state_dict(),
            "before": torch.from_numpy(mix._drawn.before.copy()),
            "plan": None if mix._plan is None else tensor(mix._plan).to(torch.int32),
            "epoch": mix._epoch,
            "ticks": mix.ticks,
            "steps": mix._steps,
            "dealt": mix._dealt,
            "done": min(mix.length, done),
            "due": mix._due,
            "seen": mix.seen,
            "paid": mix._paid,
            "history": mix._history.state_dict(),
        }

    @staticmethod
    def restore_(mix: Mix, state: dict[str, Any]) -> None:
        """Put back what ``of`` gave; RequestError if it is of other sources."""
        here = (list(mix.names), int(mix.members.source_of.size))
        if (state["names"], state["size"]) != here:
            raise RequestError(
                f"the saved state is of {state['size']} samples of {', '.join(state['names'])}, "
                f"this data set has {here[1]} of {', '.join(here[0])}; resume with the same data"
            )
        mix.weights = state["weights"].clone()
        mix.losses.load_state_dict(state["losses"])
        mix._drawn = Drawn(mix.members, state["before"].numpy().copy())
        plan = state["plan"]
        mix._plan = None if plan is None else plan.numpy().astype(np.int64)
        mix._epoch, mix.ticks, mix._steps = state["epoch"], state["ticks"], state["steps"]
        mix._dealt, mix._due = state["dealt"], state["due"]
        mix.seen, mix._paid = state["seen"], state["paid"]
        mix._start, mix._reported = state["done"], 0
        mix._exhausted = mix._plan is not None and mix._start >= mix.length
        mix._history.load_state_dict(state["history"])
