"""Trained models, back from a run, or from what ``save`` and ``save_adapter`` wrote."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from sparing.core.errors import RequestError
from sparing.core.method import implements
from sparing.core.state import complete
from sparing.experts import storage
from sparing.run.directory import RunDirectory
from sparing.weights.files import holds_adapter, load_adapter_

RECIPE, MODEL = "recipe.yaml", "model"


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The trained model at ``path``, in evaluation mode, on the CPU unless ``model`` is elsewhere.

    ``path`` is one of

    - the directory of a finished run, or the ``model`` in it: what was trained, base and adapter
      or experts together. The base of an adapter is made anew from the run's recipe;
    - what ``save`` wrote;
    - what ``save_adapter`` wrote, which is put on ``model`` in place, as by ``load_adapter_``.

    model: what experts or an adapter are put on, where the files do not tell it; a run's own base
    otherwise.

    Raises RequestError if there is nothing of the kind at ``path``, or a base is missing or
    another one; RunError if it is damaged or a newer version wrote it.
    """
    path = Path(path)
    if (path / RECIPE).is_file():
        return _of_run(path, model)
    if path.name == MODEL and (path.parent / RECIPE).is_file():
        return _of_run(path.parent, model)
    path = complete(path)
    if holds_adapter(path):
        if model is None:
            raise RequestError(
                f"{path} holds an adapter without its base; give the model that it was trained "
                "on: sparing.load(path, model=...)"
            )
        return load_adapter_(model, path).eval()
    return storage.load(path, None if model is None else lambda: model)


def _of_run(run: Path, model: nn.Module | None) -> nn.Module:
    recipe = RunDirectory(run).recipe()
    assert recipe is not None
    place = complete(run / MODEL)
    if not place.is_dir():
        raise RequestError(
            f"the run in {run} has not come to its end, and has no model yet; finish it by "
            "sparing run with --resume"
        )
    task = recipe.build_task()

    def base() -> nn.Module:
        if model is not None:
            return model
        if getattr(task, "model_needs_data", True):
            task.prepare(recipe.seed)
        made: nn.Module = task.model(recipe.seed)
        return made

    for method in recipe.build_methods():
        if implements(method, "export"):
            return method.imported(place, base).eval()
    if not hasattr(task, "load"):
        raise RequestError(f'the task "{task.name}" writes no model that could be read again')
    trained: nn.Module = task.load(place)
    return trained
