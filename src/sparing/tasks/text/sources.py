"""Where texts with labels come from: the language task's texts, or a file of the user's."""

from __future__ import annotations

import csv
import hashlib
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor

from sparing.core.cache import places
from sparing.core.errors import RequestError
from sparing.tasks.language import corpus

AGNEWS: Final = ("World", "Sports", "Business", "Sci/Tech")
AGNEWS_FILE: Final = "agnews_7600.csv.xz"
FOLDER: Final = "text-classification"

PASSAGES: Final = {"shakespeare": "Shakespeare", "gsm8k": "maths problem", "python": "Python"}
CLASSES: Final = {"passages": tuple(PASSAGES.values()), "agnews": AGNEWS}
PASSAGE: Final = 24
"""Characters of a passage: so few that some tell nothing of their source."""
PER_SOURCE: Final = 2000


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """``texts`` and ``labels``, (N,) int64, positions in the class names."""

    texts: tuple[str, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: Tensor) -> Labelled:
        """The samples ``index``, (n,) int64."""
        texts = tuple(self.texts[i] for i in index.tolist())
        return Labelled(texts=texts, labels=self.labels[index])


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Texts, ``keys`` (texts with the same key are the same to a split), classes, a remark."""

    data: Labelled
    keys: tuple[str, ...]
    classes: tuple[str, ...]
    remark: str = ""


def load(dataset: str) -> Source:
    """The data set of that name, an option of the task.

    Raises RequestError where it is not at hand, and for damaged files.
    """
    return _passages() if dataset == "passages" else _agnews()


def running(name: str) -> str:
    """The training text of a domain that passages are cut from, white space as single spaces.

    Raises RequestError if it is not at hand.
    """
    try:
        (whole,) = corpus.load([name]).values()
    except RequestError as error:
        raise RequestError(
            f"the passages of {PASSAGES[name]} cannot be made: {str(error).partition(';')[0]}; "
            "install them, or take other texts: -s task.dataset=agnews"
        ) from error
    return " ".join(whole.train.decode("utf-8", "ignore").split())


def _passages() -> Source:
    """Pieces of ``PASSAGE`` characters from all over each text, white space as single spaces."""
    texts: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(PASSAGES):
        whole = running(name)
        count = min(PER_SOURCE, len(whole) // PASSAGE)
        starts = [i * len(whole) // count for i in range(count)]
        texts += [whole[start : start + PASSAGE].strip() for start in starts]
        labels += [label] * count
    return Source(
        data=Labelled(texts=tuple(texts), labels=torch.tensor(labels)),
        keys=tuple(texts),
        classes=CLASSES["passages"],
        remark=f"Passages of {PASSAGE} characters from Shakespeare, maths problems (GSM8K) and "
        "Python's standard library, to be put with their source.",
    )


def _agnews() -> Source:
    """Headline and text, one space between them, as they stand in the file."""
    candidates = [folder / AGNEWS_FILE for root in (FOLDER, "") for folder in places(root)]
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise RequestError(
            f"AG News is not at hand, and cannot be shipped since it has no licence: put "
            f"{AGNEWS_FILE} (rows of class 1 to 4, title, text) into $SPARING_DATA/{FOLDER}, or "
            "take texts that are shipped: -s task.dataset=passages"
        )
    rows = _rows(file)
    return Source(
        data=Labelled(
            texts=tuple(f"{title} {text}" for _, title, text in rows),
            labels=torch.tensor([label for label, _, _ in rows]),
        ),
        # news come again under another headline
        keys=tuple(text for _, _, text in rows),
        classes=AGNEWS,
        remark=f"{len(rows):,} news of AG News, split anew into training, development and test "
        "texts: accuracies are not comparable with those on its own split.",
    )


def _rows(file: Path) -> list[tuple[int, str, str]]:
    """(class from 0 on, title, text) of each line."""
    found = []
    try:
        with lzma.open(file, "rt", encoding="utf-8", newline="") as lines:
            for number, row in enumerate(csv.reader(lines), start=1):
                if len(row) != 3 or row[0] not in ("1", "2", "3", "4"):
                    raise RequestError(
                        f"row {number} of {file} is not class 1 to 4, title, text: "
                        f"{', '.join(row)[:60]!r}; put the original file there"
                    )
                found.append((int(row[0]) - 1, row[1], row[2]))
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError(
            f"{file} cannot be read ({error}); put the original file there again"
        ) from error
    if len({label for label, _, _ in found}) < len(AGNEWS):
        raise RequestError(f"{file} does not have all four classes; put the original file there")
    return found


def fingerprint(*parts: Labelled) -> str:
    """SHA-256 over texts and labels: results on other data are not comparable."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        for text in part.texts:
            content = text.encode()
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
        digest.update(part.labels.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
