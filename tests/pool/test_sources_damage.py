"""Whatever bytes stand in a file: items and drops, or a request that is refused; never a crash."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.pool.made_sources import everything, pairs, restarted, tar

from sparing.core.errors import RequestError
from sparing.pool.sources import open_source


def whole(ending: str, place: Path) -> bytes:
    if ending.startswith(".tar"):
        return tar(place / "whole", pairs(3), "w:gz" if ending == ".tar.gz" else "w").read_bytes()
    if ending == ".parquet":
        table = pyarrow.table({"text": [f"text {n}" for n in range(9)], "label": range(9)})
        pyarrow.parquet.write_table(table, place / "whole", row_group_size=4)
        return (place / "whole").read_bytes()
    data = b"".join(b'{"text": "text %d", "label": %d}\n' % (n, n) for n in range(9))
    return gzip.compress(data, mtime=0) if ending == ".jsonl.gz" else data


changes = st.lists(
    st.tuples(st.sampled_from(["set", "cut", "put"]), st.floats(0, 1), st.binary(max_size=9)),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".parquet", ".jsonl", ".jsonl.gz"])
def test_damage_anywhere(ending: str, tmp_path: Path):
    data = whole(ending, tmp_path)

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(changes)
    def damaged(how: list[tuple[str, float, bytes]]) -> None:
        held = data
        for kind, where, put in how:
            at = int(where * len(held))
            behind = b"" if kind == "cut" else held[at + len(put) * (kind == "set") :]
            held = held[:at] + put + behind
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / f"a{ending}"
            place.write_bytes(held)
            try:
                found = everything(open_source(place))
            except RequestError as error:
                assert place.name in str(error)  # noqa: PT017  either is right
                return
            assert all(drop.reason == "unreadable" and drop.detail for drop in found[1])
            assert restarted(place, 2) == found

    damaged()
