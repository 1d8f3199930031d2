"""State on disk: a directory of ``tensors.safetensors`` and ``state.json``, never a pickle.

Whatever happens while a state is written (a full disk, a kill, a power cut), either the new one or
the previous one is there, complete. Both files carry checksums, so that a damaged state is an
error and never a different number.

How: the new state is written beside the old one, flushed to the disk, and only then renamed into
place. A directory cannot be renamed over a full one, so the old one first steps aside under a
fixed name, from which ``load`` takes it if the writer died between the two renames.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparing.core.errors import RunError
from sparing.core.tree import decode, encode

FORMAT = 1
TENSORS = "tensors.safetensors"
JSON = "state.json"


class Saved(NamedTuple):
    """What ``read`` gives: the state tree, and the ``meta`` that it was saved with."""

    tree: Any
    meta: Any


def save(path: str | Path, tree: Any, *, meta: Any = None) -> None:
    """Write a state tree (see ``core.tree``) to the directory ``path``, replacing a previous one.

    ``meta`` is a second, small tree without tensors. Raises RequestError if the tree holds
    something that cannot be saved, RunError if it could not be written; in both cases, and if the
    process is killed, a previous state at ``path`` stays readable.
    """
    path = Path(path)
    data, tensors = encode(tree)
    about, extra = encode(meta)
    if extra:
        raise TypeError("meta holds no tensors; put them into the tree")
    with replacing(path) as aside:
        save_file(tensors, aside / TENSORS)
        body = {
            "format": FORMAT,
            "tensors": _fingerprint(aside / TENSORS),
            "meta": about,
            "tree": data,
        }
        _write(aside / JSON, _dump({**body, "sha256": _sha256(_dump(body))}))


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give an empty directory to write into, which then takes the place of ``path`` as a whole.

    What was at ``path`` is gone afterwards, and stays readable (see ``complete``) if the writing
    fails or the process is killed. Raises RunError if it could not be written.
    """
    path = Path(path)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _recover(path)
        aside = _aside(path)
        _remove(aside)
        aside.mkdir()
        try:
            yield aside
            for entry in (*aside.iterdir(), aside):
                _flush(entry)
            if path.exists():
                os.replace(path, _previous(path))
            os.replace(aside, path)
        except BaseException:
            _recover(path)
            _remove(aside)
            raise
        _flush(path.parent)
        _remove(_previous(path))


def complete(path: str | Path) -> Path:
    """Where the complete directory is that ``replacing`` last left for ``path``."""
    path = Path(path)
    return _previous(path) if not path.exists() and _previous(path).exists() else path


def load(path: str | Path) -> Any:
    """The tree that ``save`` wrote to ``path``, tensors on the CPU. Errors as for ``read``."""
    return read(path).tree


def read(path: str | Path) -> Saved:
    """The tree and the meta at ``path``.

    Raises RunError if there is none, if it is damaged or cut short, or if a newer version of this
    library wrote it. Nothing on the disk is changed.
    """
    path = complete(path)
    if not path.is_dir():
        raise RunError(f"there is no saved state at {path}; check the path, or start afresh")
    body = _read_json(path)
    try:
        expected = body["tensors"]
        found = _fingerprint(path / TENSORS)
        if found != expected:
            raise _damaged(
                path,
                f"{TENSORS} has {found['bytes']} of {expected['bytes']} bytes"
                if found["bytes"] != expected["bytes"]
                else f"{TENSORS} does not match its checksum",
            )
        tensors = load_file(path / TENSORS)
        return Saved(decode(body["tree"], tensors), decode(body["meta"], {}))
    except FileNotFoundError as error:
        raise _damaged(path, f"{TENSORS} is missing") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


@final
class Checkpoints:
    """The checkpoints of one run in one directory, ``step-00000120``; the newest complete is kept.

    A new one is complete on the disk before the old one is deleted.
    """

    def __init__(self, directory: str | Path) -> None:
        """``directory`` is made by the first ``write``."""
        self.directory = Path(directory)

    def write(self, step: int, tree: Any, meta: Any = None) -> Path:
        """Save the state of ``step`` and delete all others. Errors as for ``save``."""
        path = self.directory / f"step-{step:08d}"
        save(path, tree, meta=meta)
        for entry in self.directory.iterdir():
            if entry != path and _OURS.fullmatch(entry.name):
                _remove(entry)
        return path

    def newest(self) -> tuple[int, Any, Any] | None:
        """``(step, tree, meta)`` of the newest readable checkpoint, None if there is none at all.

        If the newest is damaged and an older one survived beside it, warns and gives the older;
        if no other did, raises RunError as ``read`` does.
        """
        failure: RunError | None = None
        for step in sorted(self._steps(), reverse=True):
            try:
                tree, meta = read(self.directory / f"step-{step:08d}")
            except RunError as error:
                failure = failure or error
                continue
            if failure is not None:
                warnings.warn(
                    f"{failure}. Going on from step {step} instead", RuntimeWarning, stacklevel=2
                )
            return step, tree, meta
        if failure is not None:
            raise failure
        return None

    def _steps(self) -> set[int]:
        if not self.directory.is_dir():
            return set()
        found = (_STEP.fullmatch(entry.name) for entry in self.directory.iterdir())
        return {int(match[1] or match[2]) for match in found if match}


# a state, or the previous one of a writer that died between its two renames
_STEP = re.compile(r"step-(\d{8,})|\.step-(\d{8,})\.previous")
_OURS = re.compile(r"\.?step-\d{8,}(?:\.previous|\.writing)?")


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) so that a reader, at any time, sees all of the old or of the new.

    Raises RunError if it could not be written; the old file then stays.
    """
    path = Path(path)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = _aside(path)
        try:
            _write(aside, text)
            os.replace(aside, path)
        except BaseException:
            _remove(aside)
            raise
        _flush(path.parent)


def atomic_write_json(path: str | Path, value: Any) -> None:
    """``atomic_write_text`` of a plain JSON value; ValueError for NaN and infinities."""
    atomic_write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def atomic_save(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file of named tensors, as ``atomic_write_text`` writes text."""
    path = Path(path)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = _aside(path)
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside)
            _flush(aside)
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        _flush(path.parent)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name.lstrip('.')}.writing")


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name.lstrip('.')}.previous")


def _recover(path: Path) -> None:
    """Put the previous state back in place if a writer died, or failed, between its renames."""
    if not path.exists() and _previous(path).exists():
        os.rename(_previous(path), path)
    elif path.exists():
        _remove(_previous(path))


def _remove(path: Path) -> None:
    """Delete what is left over, best effort: a leftover is ignored wherever states are read."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with _ignoring():
            path.unlink(missing_ok=True)


@contextmanager
def _ignoring() -> Iterator[None]:
    try:
        yield
    except OSError:
        return


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"could not write {path} ({error}); what was there before is kept. Free some space "
            f"or give another place, then resume"
        ) from error


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(path: Path) -> None:
    """Force a file, or a directory's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _damaged(path: Path, how: str) -> RunError:
    return RunError(
        f"the saved state at {path} is damaged or cut short ({how}); delete this directory to "
        f"start afresh, or put back a copy of it"
    )


def _unreadable(path: Path, error: OSError) -> RunError:
    return RunError(f"the saved state at {path} cannot be read ({error}); check its permissions")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        body = json.loads((path / JSON).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _damaged(path, f"{JSON} is missing") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"{JSON}: {error}") from error
    if not isinstance(body, dict) or not isinstance(body.get("format"), int):
        raise _damaged(path, f"{JSON} names no format")
    if body["format"] > FORMAT:
        raise RunError(
            f"the saved state at {path} has format {body['format']}, and this version reads up "
            f"to {FORMAT}; a newer version of sparing wrote it: upgrade with "
            f'"pip install --upgrade sparing"'
        )
    digest = body.pop("sha256", None)
    if digest != _sha256(_dump(body)):
        raise _damaged(path, f"{JSON} does not match its checksum")
    return body
