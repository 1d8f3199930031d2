"""The page of a run: one self-contained ``report.html``, and a page that lists several runs."""

from __future__ import annotations

from sparing.run.report.many import write_many
from sparing.run.report.one import write

__all__ = ["write", "write_many"]
