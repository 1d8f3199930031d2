"""Where items come from: folders of images, JSONL, Parquet and WebDataset tars, restartable."""

from __future__ import annotations

from sparing.pool.sources.ingest import Ingested, ingest
from sparing.pool.sources.opening import KINDS_OF_SOURCES, open_source
from sparing.pool.sources.reading import Reading
from sparing.pool.sources.source import Chunk, Source

__all__ = ["KINDS_OF_SOURCES", "Chunk", "Ingested", "Reading", "Source", "ingest", "open_source"]
