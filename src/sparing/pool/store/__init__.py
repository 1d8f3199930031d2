"""A store on disk that only grows, loses nothing that it acknowledged, and can forget."""

from sparing.pool.store.catalogue import Snapshot
from sparing.pool.store.checking import check
from sparing.pool.store.copying import backup
from sparing.pool.store.lineage import Event
from sparing.pool.store.merging import compact
from sparing.pool.store.records import content_hash, content_hashes
from sparing.pool.store.store import Store
from sparing.pool.store.view import Reading, View

__all__ = [
    "Event",
    "Reading",
    "Snapshot",
    "Store",
    "View",
    "backup",
    "check",
    "compact",
    "content_hash",
    "content_hashes",
]
