"""The package that searches, which need not be installed."""

from __future__ import annotations

from typing import Any

import torch

from sparing.core.errors import RequestError


def faiss() -> Any:
    """The package FAISS, set to work with as many threads as torch, each time this is called.

    Raises RequestError, and says how to install it, where it is missing.
    """
    try:
        import faiss as found
    except ModuleNotFoundError as error:
        raise RequestError(
            'inverted lists need the package "faiss", which is not installed; '
            'run: pip install "sparing[index]"'
        ) from error
    if found.omp_get_max_threads() != torch.get_num_threads():
        found.omp_set_num_threads(torch.get_num_threads())
    return found
