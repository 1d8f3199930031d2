"""The state of a method that chooses samples: scores, the plan itself, and the place in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from sparing.core import ranks
from sparing.core.errors import RequestError
from sparing.samples.selection import Selection
from sparing.samples.weights import Weights

if TYPE_CHECKING:
    from sparing.samples.method import SampleSelection


@final
class Saved:
    """Takes a method's state apart and puts it back."""

    @staticmethod
    def of(method: SampleSelection) -> dict[str, Any]:
        """All that is needed to go on; ``done`` counts places of the plan over all ranks."""
        selection = method._selection
        return {
            "size": method._size,
            "epoch": method._epoch,
            "done": method._done,
            "trained": method._trained,
            "scores": None if method._scores is None else method._scores.state_dict(),
            "plan": None if selection is None else selection.state_dict(),
            **method._left_out.state_dict(),
            **method._history.state_dict(),
        }

    @staticmethod
    def restore_(method: SampleSelection, state: dict[str, Any]) -> None:
        """Put back what ``of`` gave."""
        if state["size"] not in (None, method._size):
            raise RequestError(
                f"the saved state is of {state['size']} samples, the data set has "
                f"{method._size}; resume with the data that was trained on"
            )
        method._epoch = state["epoch"]
        method._left_out.load_state_dict(state)
        method._history.load_state_dict(state)
        method._scores = None
        if state["scores"] is not None:
            method.scores.load_state_dict(state["scores"])
        method._selection = method._weights = None
        if state["plan"] is not None:
            method._selection = Selection.of(state["plan"])
            method._weights = Weights(
                method._selection, by_batch=method.options.normalise == "batch"
            )
        method._exhausted = False
        method._start, method._reported = state["done"], 0
        method._trained = state["trained"]
        complete = method._selection is not None and state["done"] == len(method._selection)
        if complete and state["trained"]:  # the next epoch begins, wherever it is asked for
            world = ranks.world_size()
            method._reported = -(-state["done"] // world)
            method._start = 0
