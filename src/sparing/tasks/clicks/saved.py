"""A trained click model on disk: weights, vocabulary, and a program that needs neither of us.

``config.json`` and ``model.safetensors`` make the model, ``vocabulary/`` turns columns into its
inputs, and ``program.pt2`` is the same model as ``torch.export`` writes it, for any batch size,
which ``torch.export.load`` reads without this library. ``rates.npz``: smoothed target rates, if the
model gets them; they are the last of its numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sparing.core.errors import RequestError
from sparing.core.modes import evaluating
from sparing.core.state import atomic_save, atomic_write_json, replacing
from sparing.tasks.clicks import prior
from sparing.tasks.clicks.models import ClickModel, Shape
from sparing.tasks.clicks.vocabulary import Vocabulary

FORMAT: Final = 1


@final
@dataclass(frozen=True, slots=True)
class Predictor:
    """A trained ``model`` with the ``vocabulary`` of its training rows, from columns to chances."""

    model: ClickModel
    vocabulary: Vocabulary
    label: str
    rates: prior.Rates | None = None

    def log_odds(self, columns: Mapping[str, Any]) -> Tensor:
        """The log-odds of each row, (n,) float32.

        ``columns``: lists, numpy arrays, or an arrow table, by the names of training; values that
        training has not seen have an id of their own. Raises RequestError for columns that are
        not there and values that do not belong in them.
        """
        found = self.vocabulary.encode(columns)
        ids = torch.from_numpy(found)
        numeric = None
        if self.model.numeric:
            numbers = self.vocabulary.numeric(columns)
            if self.rates is not None:
                column = self.rates.log_odds(found)[:, None].astype(np.float32)
                numbers = np.concatenate([numbers, column], axis=1)
            numeric = torch.from_numpy(numbers)
        with torch.inference_mode():
            said: Tensor = self.model(ids, numeric)
        return said.float()

    def predict(self, columns: Mapping[str, Any]) -> NDArray[np.float64]:
        """The chance of a positive label, (n,) float64."""
        return self.log_odds(columns).double().sigmoid().numpy()


def program(model: ClickModel) -> Any:
    """The model as a ``torch.export.ExportedProgram``: (ids[, numeric]) -> log-odds.

    The number of rows is free; ids must be those of the vocabulary, which it does not check.
    """
    model = model.eval()
    device = model.bias.device
    ids = torch.zeros(2, len(model.tables.sizes), dtype=torch.int64, device=device)
    given: tuple[Tensor, ...] = (ids,)
    if model.numeric:
        given += (torch.zeros(2, model.numeric, device=device),)
    rows = torch.export.Dim("rows")
    return torch.export.export(model, given, dynamic_shapes=({0: rows},) * len(given))


def write(
    model: nn.Module,
    path: Path,
    vocabulary: Vocabulary,
    label: str,
    rates: prior.Rates | None = None,
) -> None:
    """Write the directory ``path``, whole or not at all.

    Raises RequestError for a model of another kind.
    """
    if not isinstance(model, ClickModel):
        raise RequestError(f"only a ClickModel can be written here, got {type(model).__name__}")
    about = {
        "format": FORMAT,
        "label": label,
        "model": model.kind,
        "sizes": list(model.tables.sizes),
        "numeric": model.numeric,
        "rates": rates is not None,
        "shape": asdict(model.shape),
    }
    with replacing(path) as aside:
        aside.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        atomic_save(aside / "model.safetensors", tensors)
        atomic_write_json(aside / "config.json", about)
        vocabulary.save(aside / "vocabulary")
        if rates is not None:
            prior.save(aside / "rates.npz", rates)
        with evaluating(model):
            torch.export.save(program(model), aside / "program.pt2")


def read(path: str | Path) -> Predictor:
    """What ``write`` wrote, the model in evaluation mode.

    Raises RequestError for files that are missing, damaged or of a newer format.
    """
    path = Path(path)
    try:
        about = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if about["format"] > FORMAT:
            raise RequestError(
                f"{path} has format {about['format']}, this version reads up to {FORMAT}; "
                "update sparing"
            )
        model = ClickModel(
            about["model"], about["sizes"], about["numeric"], Shape(**about["shape"])
        )
        model.load_state_dict(load_file(path / "model.safetensors"))
        rates = prior.load(path / "rates.npz") if about.get("rates") else None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(
            f"there is no whole click model in {path}: {str(error).splitlines()[0]}"
        ) from error
    vocabulary = Vocabulary.load(path / "vocabulary")
    if list(vocabulary.sizes) != about["sizes"]:
        raise RequestError(f"the vocabulary in {path} is not that of its model; copy both again")
    return Predictor(model.eval(), vocabulary, about["label"], rates)
