"""Progress bars of transformers are off within, and afterwards as they were."""

from __future__ import annotations

import pytest
from transformers.utils import logging

from sparing.core.quiet import quietly


def failing() -> None:
    with quietly():
        assert not logging.is_progress_bar_enabled()
        raise KeyError


@pytest.mark.parametrize("shown", [True, False])
def test_bars_are_as_they_were_afterwards(shown: bool):
    before = logging.is_progress_bar_enabled()
    turn = {True: logging.enable_progress_bar, False: logging.disable_progress_bar}
    turn[shown]()
    try:
        with pytest.raises(KeyError):
            failing()
        assert logging.is_progress_bar_enabled() is shown
    finally:
        turn[before]()
