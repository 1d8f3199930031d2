"""At every write of the store: a kill, a short write, a full disk; nothing acknowledged is lost."""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from store_model import Model, agree, create, steps, texts, unit

from sparing.core.errors import RunError
from sparing.pool.items import Vectors
from sparing.pool.store import Store, check, disk, merging
from sparing.pool.store.catalogue import Catalogue

Act = Callable[[str, Path, int], int | None]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(merging, "FAN", 3)  # so that merges happen
    yield
    disk.watch = None


class At:
    """Does something at the n-th operation on the disk, and counts all."""

    def __init__(self, n: int, act: Act) -> None:
        self.n, self.act = n, act
        self.seen: list[str] = []

    def __call__(self, operation: str, path: Path, size: int) -> int | None:
        self.seen.append(operation)
        return self.act(operation, path, size) if len(self.seen) - 1 == self.n else None


def no(operation: str, path: Path, size: int) -> None:
    return None


def kill(operation: str, path: Path, size: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full(operation: str, path: Path, size: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def models(upto: int) -> list[Model]:
    """What the store must hold after 0, 1, ... steps."""
    out = []
    for count in range(upto + 1):
        model = Model()
        for _, _, plain in steps()[:count]:
            plain(model)
        out.append(model)
    return out


def operations(path: Path) -> list[str]:
    create(path)
    counter = disk.watch = At(-1, no)
    with Store.open(path, write=True) as store:
        for _, real, _ in steps():
            real(store)
    disk.watch = None
    return counter.seen


def in_child(work: Callable[[int], None]) -> tuple[int, int]:
    """How many steps a forked child acknowledged before it ended, and by which signal."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            work(writing)
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as said:
        acknowledged = len(said.read())
    _, status = os.waitpid(child, 0)
    return acknowledged, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def run_steps(path: Path, watch: Act | None, begin: int = 0) -> Callable[[int], None]:
    def work(writing: int) -> None:
        disk.watch = watch
        with Store.open(path, write=True) as store:
            for _, real, _ in steps()[begin:]:
                real(store)
                os.write(writing, b"1")

    return work


def holds(path: Path, acknowledged: int, expected: list[Model]) -> int:
    """Which step the reopened store is at: the acknowledged one, or the one that was under way."""
    with Store.open(path, write=True) as store:
        change = len(expected) - 1 if acknowledged == len(expected) - 1 else acknowledged
        try:
            agree(store, expected[change])
        except AssertionError:
            change = acknowledged + 1
            agree(store, expected[change])
    assert check(path) == []
    return change


def killed_at(path: Path, n: int, half: bool, expected: list[Model]) -> None:
    """Kill before the n-th operation; or, of a write, when half of it is written."""
    create(path)
    at = At(n, (lambda _operation, _path, size: size // 2) if half else kill)

    def watch(operation: str, file: Path, size: int) -> int | None:
        if half and len(at.seen) == n + 1:  # the call for what the half has left over
            kill(operation, file, size)
        return at(operation, file, size)

    acknowledged, by = in_child(run_steps(path, watch))
    assert by == signal.SIGKILL
    state = holds(path, acknowledged, expected)
    with Store.open(path, write=True) as store:
        for _, real, _ in steps()[state:]:
            real(store)
        agree(store, expected[-1])


def sampled(seen: list[str], few: bool) -> list[tuple[int, bool]]:
    """Operations to fail at, each whole, and writes by half too; few: those of each kind."""
    chosen = [
        (n, half) for n in range(len(seen)) for half in (False, True)[: 1 + (seen[n] == "write")]
    ]
    return chosen[::17] if few else chosen


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_kill_at_any_operation_loses_nothing_acknowledged(tmp_path: Path, few: bool) -> None:
    seen = operations(tmp_path / "plain")
    kinds = {"write", "sync", "sync folder", "create", "remove", "commit", "committed"}
    assert kinds <= set(seen)
    expected = models(len(steps()))
    for n, half in sampled(seen, few):
        killed_at(tmp_path / f"{n}-{half}", n, half, expected)


def refused(real: Callable[[Store], object], store: Store) -> str:
    try:
        real(store)
    except RunError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_full_disk_at_any_operation_takes_back_the_step(tmp_path: Path, few: bool) -> None:
    seen = operations(tmp_path / "plain")
    expected = models(len(steps()))
    raised = set()
    for n in range(0, len(seen), 11 if few else 1):
        path = tmp_path / str(n)
        create(path)
        disk.watch = At(n, full)
        failures = 0
        with Store.open(path, write=True) as store:
            for number, (name, real, _) in enumerate(steps()):
                said = refused(real, store)
                if said:
                    failures += 1
                    raised.add(seen[n])
                if said and seen[n] == "remove":  # nothing but forgetting hangs on it
                    assert name == "forget"
                    assert "could not be deleted" in said
                elif said:
                    assert "No space left" in said
                    assert "free some space" in said
                    there = len(store.ids()) == len(expected[number + 1].items)
                    if seen[n] != "committed" or not there:  # to forget is first a request
                        agree(store, expected[number])
                        real(store)
                agree(store, expected[number + 1])
        disk.watch = None
        assert failures <= 1
        Store.open(path, write=True).close()
        assert check(path) == []
    assert {"write", "sync", "create", "commit"} <= raised


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_disk_that_stays_full_loses_nothing_and_the_step_can_be_done_again(
    tmp_path: Path, few: bool
) -> None:
    """From some operation on nothing can be written, also not what takes a step back."""
    seen = operations(tmp_path / "plain")
    expected = models(len(steps()))
    stands = 0
    for n in range(0, len(seen), 13 if few else 1):
        path = tmp_path / str(n)
        create(path)
        done = 0

        def watch(operation: str, file: Path, size: int, n: int = n) -> None:
            nonlocal done
            done += 1
            if done > n and operation not in ("remove", "cut", "committed"):
                full(operation, file, size)

        disk.watch = watch
        with Store.open(path, write=True) as store:
            for number, (_, real, _) in enumerate(steps()):
                said = refused(real, store)
                if said:
                    assert "No space left" in said
                    assert "free some space" in said
                    stands += "the request to forget may stand" in said.lower()
                    disk.watch = None
                    if len(store.ids()) != len(expected[number + 1].items):
                        agree(store, expected[number])
                    real(store)
                agree(store, expected[number + 1])
        disk.watch = None
        Store.open(path, write=True).close()
        assert check(path) == []
        with Store.open(path) as view:
            agree(view, expected[-1])
    assert stands


def test_a_request_to_forget_that_could_not_be_taken_back_is_finished_when_opened(
    tmp_path: Path,
) -> None:
    create(tmp_path / "s")
    commits = 0

    def watch(operation: str, path: Path, size: int) -> None:
        nonlocal commits
        commits += operation == "commit"
        if commits and operation != "commit":
            full(operation, path, size)
        if commits > 1:
            full(operation, path, size)

    with Store.open(tmp_path / "s", write=True) as store:
        store.append(texts(4, "n"), Vectors(main=unit(4, 0)), source="s")
        disk.watch = watch
        with pytest.raises(RunError, match="when the store is next opened for writing"):
            store.forget([1])
        disk.watch = None
        assert store.ids().tolist() == [0, 1, 2, 3]
    assert any("still to be forgotten" in text for text in check(tmp_path / "s"))
    with Store.open(tmp_path / "s", write=True) as store:
        assert store.ids().tolist() == [0, 2, 3]
    assert check(tmp_path / "s") == []


def test_a_journal_that_cannot_be_emptied_is_told_and_the_items_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(tmp_path / "s")

    def failing(_: Catalogue) -> None:
        raise RunError("disk full")

    with Store.open(tmp_path / "s", write=True) as store:
        store.append(texts(4, "n"), Vectors(main=unit(4, 0)), source="s")
        with monkeypatch.context() as patched:
            patched.setattr(Catalogue, "checkpoint", failing)
            with pytest.raises(RunError, match=r"the items are forgotten, but .*catalogue\.sqlite"):
                store.forget([1])
        assert store.ids().tolist() == [0, 2, 3]
        store.forget([2])
    assert check(tmp_path / "s") == []


def test_short_writes_are_gone_on_with(tmp_path: Path) -> None:
    create(tmp_path / "s")
    disk.watch = lambda operation, path, size: min(size, 7) if operation == "write" else None
    model = Model()
    with Store.open(tmp_path / "s", write=True) as store:
        for _, real, plain in steps()[:4]:
            real(store)
            plain(model)
        agree(store, model)
    assert check(tmp_path / "s") == []


@pytest.mark.parametrize("limit", [300, 900, 3_000, 9_000, 40_000])
def test_a_limit_on_file_size_is_an_error_and_no_loss(tmp_path: Path, limit: int) -> None:
    """The system itself refuses to write on: shards, segments or the catalogue's journal."""
    create(tmp_path / "s")

    def work(writing: int) -> None:
        with Store.open(tmp_path / "s", write=True) as store:
            store.append(texts(2, "zero"), Vectors(main=unit(2, 8)), source="s")
            store._state.settings["shard"] = 1 << 20
            os.write(writing, b"1")
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                for i in range(500):
                    store.append(texts(9, f"n{i}", 9), Vectors(main=unit(9, i)), source="s")
                    os.write(writing, b"1")
            except RunError as error:
                text = str(error)
                if "could not write" in text or "could not be written" in text:
                    os.kill(os.getpid(), signal.SIGUSR1)

    acknowledged, by = in_child(work)
    assert by == signal.SIGUSR1
    with Store.open(tmp_path / "s", write=True) as store:
        assert store.size in (2 + 9 * (acknowledged - 1), 2 + 9 * acknowledged)
        expected = [
            *texts(2, "zero"),
            *(i for n in range(acknowledged - 1) for i in texts(9, f"n{n}", 9)),
        ]
        assert store.items(store.ids())[: len(expected)] == expected
        store.append(texts(3, "after"), Vectors(main=unit(3, 1)), source="s")
    assert check(tmp_path / "s") == []


def test_files_are_on_the_disk_before_the_commit_that_tells_of_them(tmp_path: Path) -> None:
    """What a power cut needs: at each commit, all that was written has been forced, new files'
    folders too, in this order.
    """
    create(tmp_path / "s")
    dirty: set[Path] = set()
    commits = 0

    def watch(operation: str, path: Path, size: int) -> None:
        nonlocal commits
        if operation == "write":
            dirty.add(path)
        elif operation == "create":
            dirty.update((path, path.parent))
        elif operation in ("sync", "sync folder"):
            dirty.discard(path)
        elif operation == "commit":
            commits += 1
            assert dirty == set()

    disk.watch = watch
    with Store.open(tmp_path / "s", write=True) as store:
        for _, real, _ in steps():
            real(store)
    assert commits > len(steps())


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path: Path) -> None:
    """Also within SQLite's own writes, where no test can look."""
    import time

    rng = np.random.default_rng(0)
    path = tmp_path / "s"
    create(path)
    total = 0
    for _ in range(40):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            with Store.open(path, write=True) as store:
                while True:
                    i = store._state.next_id
                    store.append(texts(3, f"n{i}"), Vectors(main=unit(3, i)), source="s", cursor=i)
                    os.write(writing, b"1")
        os.close(writing)
        time.sleep(float(rng.uniform(0.0, 0.4)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(reading, "rb") as said:
            total += 3 * len(said.read())
        with Store.open(path, write=True) as store:
            assert store.size in (total, total + 3)
            total = store.size
            if total:
                assert store.sources() == {"s": total - 3}
                assert store.items([total - 1])[0].text == f"n{total - 3} 2 "
                np.testing.assert_array_equal(store.vectors()[-3:], unit(3, total - 3))
    assert check(path) == []
    assert total > 0


def test_what_is_flushed_is_on_the_disk_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk works beside the caller; what is written after it began is forced again."""
    create(tmp_path / "s")
    under_way: set[int] = set()
    dirty: set[Path] = set()
    begun: list[int] = []

    def slow(handle: int) -> None:
        under_way.add(handle)
        begun.append(handle)
        time.sleep(0.05)
        os.fsync(handle)
        under_way.discard(handle)

    def watch(operation: str, path: Path, size: int) -> None:
        if operation == "write":
            dirty.add(path)
        elif operation == "sync":
            dirty.discard(path)
        elif operation == "commit":
            assert not under_way
            assert not dirty

    monkeypatch.setattr(disk, "_SYNC", slow)
    disk.watch = watch
    with Store.open(tmp_path / "s", write=True) as store:
        with store.together("both"):
            store.append(texts(3, "a"), Vectors(main=unit(3, 0)), source="s")
            store.flush()
            first = len(begun)
            store.append(texts(3, "b"), Vectors(main=unit(3, 1)), source="s")
            store.flush()
        assert store.size == 6
    assert first
    assert len(begun) > 2 * first - 1  # the shards are the same, and were forced twice
    assert check(tmp_path / "s") == []


def test_a_flush_that_fails_takes_back_the_whole_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(tmp_path / "s")

    def broken(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def add(store: Store, name: str, fails: bool = False) -> None:
        with store.together("one"):
            store.append(texts(3, name), Vectors(main=unit(3, 0)), source="s")
            store.flush()
            if fails:
                raise ValueError("the caller's own")

    with Store.open(tmp_path / "s", write=True) as store:
        add(store, "a")
        with monkeypatch.context() as patch:
            patch.setattr(disk, "_SYNC", broken)
            with pytest.raises(RunError, match="No space left"):
                add(store, "b")
        assert store.size == 3
        with pytest.raises(ValueError, match="own"):
            add(store, "b", fails=True)
        assert store.size == 3
        add(store, "b")
        assert [item.text for item in store.items([3])] == ["b 0 "]
    assert check(tmp_path / "s") == []
