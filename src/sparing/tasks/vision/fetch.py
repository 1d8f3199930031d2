"""Fetches Fashion-MNIST, once, into the user's cache."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path

from sparing.core.errors import RequestError, RunError
from sparing.core.state import replacing
from sparing.tasks.vision import idx

ADDRESS = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
PACKAGE = "dataset-fashion-mnist"
SECONDS = 120


def fashion_mnist(place: Path) -> Path:
    """Put the four files, checked, into the directory ``place``, whole or not at all.

    Tried are Debian's package, which holds them, and the authors' repository. Raises RequestError
    that says what to do where neither can be had.
    """
    failed = []
    for way in (_by_package, _by_address):
        with tempfile.TemporaryDirectory() as work:
            try:
                found = way(Path(work))
                for stem in idx.STEMS:
                    idx.read(found, stem, checked=True)
                with replacing(place) as aside:
                    aside.mkdir(parents=True, exist_ok=True)
                    for stem in idx.STEMS:
                        file = idx.find(found, stem)
                        assert file is not None
                        shutil.copyfile(file, aside / file.name)
            except (OSError, subprocess.SubprocessError, RequestError, RunError) as error:
                failed.append(str(error).splitlines()[0] if str(error) else repr(error))
            else:
                return place
    raise RequestError(
        f"Fashion-MNIST is not at hand and could not be fetched ({'; '.join(failed)}); put its "
        "four *-ubyte.gz files into $SPARING_DATA/fashion-mnist, or take the part of it that is "
        "shipped: -s task.dataset=fashion-mnist-small"
    )


def _by_package(work: Path) -> Path:
    """Download the package and take it apart; nothing is installed."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FileNotFoundError(f"there is no {tool}")
    _run(["apt-get", "-qq", "download", PACKAGE], work)
    package = next(work.glob("*.deb"), None)
    if package is None:
        raise FileNotFoundError(f"apt-get left no {PACKAGE}")
    _run(["dpkg-deb", "-x", package.name, "unpacked"], work)
    return work / "unpacked" / "usr" / "share" / "datasets" / "fashion-mnist"


def _by_address(work: Path) -> Path:
    for stem in idx.STEMS:
        with urllib.request.urlopen(f"{ADDRESS}{stem}.gz", timeout=SECONDS) as answer:
            (work / f"{stem}.gz").write_bytes(answer.read())
    return work


def _run(command: list[str], work: Path) -> None:
    ended = subprocess.run(
        command, cwd=work, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    if ended.returncode:
        told = ended.stderr.strip().splitlines()
        raise OSError(f"{command[0]} failed: {told[-1] if told else ended.returncode}")
