from __future__ import annotations

import pytest
import torch
from routers import normal

from sparing.experts import calibration
from sparing.experts.calibration import batch_quantile


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_quantile_of_each_column(share):
    values = normal(101, 3, dtype=torch.float64)
    found = batch_quantile(values, share)
    expected = values.sort(0).values[round(share * 100)].float()
    assert found is not None
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32


def test_no_row_has_no_quantile():
    assert batch_quantile(torch.zeros(0, 3), 0.5) is None


def test_more_numbers_than_torch_sorts_are_cut(monkeypatch):
    monkeypatch.setattr(calibration, "MOST", 30)
    values = normal(50, 3)
    torch.testing.assert_close(batch_quantile(values, 0.5), batch_quantile(values[:10], 0.5))
