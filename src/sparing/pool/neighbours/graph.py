"""A navigable graph, by hnswlib: for single queries that must be answered at once."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError
from sparing.pool.neighbours import ranking
from sparing.pool.neighbours.protocol import (
    Floats,
    Found,
    Ids,
    Joined,
    Neighbours,
    Pairs,
    Radius,
    checked_ids,
    empty,
)
from sparing.pool.neighbours.rows import LEAST, Rows

GONE = 0.25


@final
class Graph(Neighbours):
    """Hierarchical navigable small worlds (Malkov and Yashunin 2018, github.com/nmslib/hnswlib).

    links: of a node; effort: candidates looked at when a node is linked; width: when a row is
    looked for. Answers single rows in tens of microseconds; takes in items slower than
    ``Inverted``. Removed nodes stay until they are a quarter of all, or until it is saved; then the
    graph is built anew, which takes as long as adding what is left. ``join`` looks at as many
    stored items as ``width``, and finds most pairs.
    """

    kind: ClassVar[str] = "graph"

    def __init__(
        self, dim: int, *, links: int = 16, effort: int = 100, width: int = 64, seed: int = 0
    ) -> None:
        super().__init__(dim)
        for name, value, least in (("links", links, 2), ("effort", effort, 1), ("width", width, 1)):
            require_whole(name, value, least)
        require_whole("seed", seed, 0)
        self.links, self.effort, self.width, self.seed = links, effort, width, seed
        self.rows = Rows(dim, (), torch.device("cpu"))
        self._gone = 0
        self._graph = self._fresh(LEAST)

    def _fresh(self, capacity: int) -> Any:
        graph = _hnswlib().Index(space="ip", dim=self.dim)
        graph.init_index(
            max_elements=capacity,
            ef_construction=self.effort,
            M=self.links,
            random_seed=self.seed,
            allow_replace_deleted=False,
        )
        return graph

    def __len__(self) -> int:
        return len(self.rows)

    def ids(self) -> Ids:
        return self.rows.ids()

    def vectors(self, ids: Ids) -> Floats:
        names = np.asarray(ids, dtype=np.int64)
        self.rows.places(names)
        return self._vectors(names)

    def _vectors(self, ids: Ids) -> Floats:
        if not len(ids):
            return np.empty((0, self.dim), dtype=np.float32)
        found: Floats = np.asarray(self._graph.get_items(ids, return_type="numpy"), np.float32)
        return found

    def add(self, ids: Ids, vectors: Floats) -> None:
        ids, vectors = self.checked_pair(ids, vectors)
        self.rows.add(ids, vectors)
        self._link(ids, vectors)

    def _link(self, ids: Ids, vectors: Floats) -> None:
        if not len(ids):
            return
        wanted = self._graph.element_count + len(ids)
        if wanted > self._graph.max_elements:
            self._graph.resize_index(max(wanted, 2 * self._graph.max_elements))
        self._graph.add_items(vectors, ids)

    def update(self, ids: Ids, vectors: Floats) -> None:
        ids, vectors = self.checked_pair(ids, vectors)
        self.rows.places(ids)
        self._link(ids, vectors)

    def remove(self, ids: Ids) -> None:
        ids = checked_ids(ids)
        self.rows.remove(ids)
        for name in ids.tolist():  # hnswlib marks them one by one
            self._graph.mark_deleted(name)
        self._gone += len(ids)
        if self._gone > GONE * (len(self) + self._gone):
            self.rebuild_()
        self.rows.close()

    def rebuild_(self) -> None:
        """Build the graph anew from what is left; removed vectors are gone from memory then."""
        ids = self.ids()
        vectors = self._vectors(ids)
        self._graph = self._fresh(max(LEAST, len(ids)))
        self._gone = 0
        self._link(ids, vectors)

    def query(self, vectors: Floats, k: int) -> Found:
        require_whole("k", k, 0)
        distances, ids = self._near(self.checked(vectors), k)
        return ranking.best(distances, ids, k)

    def join(self, vectors: Floats, k: int, radius: Radius) -> Joined:
        require_whole("k", k, 0)
        distances, ids = self._near(self.checked(vectors), max(k, self.width))
        rows, columns = np.nonzero(ids >= 0)
        who, far = ids[rows, columns], distances[rows, columns]
        places = self.rows.find(who)
        if callable(radius):
            near = far < radius(who) if len(who) else np.empty(0, dtype=bool)
        else:
            near = far < self.rows.spread(self.radii(radius))[places]
        order = np.lexsort((places[near], rows[near]))
        pairs = Pairs(who[near][order], rows[near][order], far[near][order])
        return Joined(*ranking.best(distances, ids, k), pairs)

    def _near(self, vectors: Floats, k: int) -> tuple[Floats, Ids]:
        c = min(k, len(self))
        if c == 0 or not len(vectors):
            return empty(len(vectors), k)
        self._graph.set_ef(max(self.width, c))
        try:
            names, far = self._graph.knn_query(vectors, c)
        except RuntimeError:
            # it gives up where it reaches fewer than c nodes; then every vector is looked at
            return ranking.all_of(vectors, self.ids(), self._vectors, c)
        return np.maximum(far, 0).astype(np.float32), names.astype(np.int64)

    def state(self) -> dict[str, Any]:
        if self._gone:
            self.rebuild_()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph"
            self._graph.save_index(str(path))
            held = np.fromfile(path, dtype=np.uint8)
        return {
            "options": {
                "dim": self.dim,
                "links": self.links,
                "effort": self.effort,
                "width": self.width,
                "seed": self.seed,
            },
            "ids": torch.from_numpy(self.ids()),
            "graph": torch.from_numpy(held),
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Graph:
        options = dict(state["options"])
        index = cls(options.pop("dim"), **options)
        ids = state["ids"].numpy()
        index.rows.add(ids, np.empty((len(ids), index.dim), dtype=np.float32))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph"
            state["graph"].numpy().tofile(path)
            index._graph = _hnswlib().Index(space="ip", dim=index.dim)
            index._graph.load_index(str(path), max_elements=max(LEAST, len(ids)))
        return index


def _hnswlib() -> Any:
    try:
        import hnswlib
    except ModuleNotFoundError as error:
        raise RequestError(
            'the graph needs the package "hnswlib", which is not installed; '
            'run: pip install "sparing[graph]"'
        ) from error
    return hnswlib
