"""Without the progress bars of transformers, which would run through this library's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quietly() -> Iterator[None]:
    """Within, transformers shows no bars; they are as they were afterwards. It must be installed.

    Imported inside, since ``core`` needs no transformers.
    """
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
