"""T0's templates grouped into eight sources, split by example and not by row."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, Final

from sparing.core.cache import places
from sparing.core.errors import RequestError
from sparing.tasks.instruct.rows import read

FILE: Final = "t0_55k.jsonl.xz"
FOLDER: Final = "instructions"
EXAMPLES: Final = 200
"""Rows of a template: row i of every template of a data set tells of the same example i."""
DEVELOPMENT, FINAL, GAP = 150, 175, 3
"""First example of each held-out part, and how many in front of it are left out: neighbours may
share a passage."""
END: Final = "<|endoftext|>"

GROUPS: Final = {
    "extraction": ("adversarial_qa", "duorc", "quoref", "ropes"),
    "reading choice": ("cosmos_qa", "dream", "wiqa", "quail", "social_i"),
    "science choice": ("sciq", "qasc", "quarel", "quartz", "commonsense_qa", "cos_e"),
    "topic": ("ag_news", "dbpedia_14", "trec"),
    "sentiment": ("imdb", "rotten_tomatoes", "yelp", "amazon_polarity", "app_reviews"),
    "summary": ("cnn_dailymail", "xsum", "samsum", "gigaword", "multi_news"),
    "paraphrase": ("paws", "glue"),
    "knowledge": ("wiki", "kilt", "common_gen"),
}


def group_of(template: str) -> str:
    """The source of a template by its name; RequestError for one that belongs to none."""
    for name, prefixes in GROUPS.items():
        if template.startswith(prefixes):
            return name
    raise RequestError(f'no source for T0\'s template "{template}"; put the original {FILE} there')


def load(split: str) -> dict[str, tuple[list[Any], list[Any]]]:
    """(training, held-out) rows by source.

    Templates with fewer rows than the rest are left out: their rows cannot be told by example.
    Raises RequestError where the file is not at hand, with the place to put it.
    """
    candidates = [folder / FILE for folder in (*places(FOLDER), *places(""))]
    file: Path | None = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise RequestError(
            f"T0's templates are not at hand, and are not shipped: put {FILE} (lines of task, "
            f"prompt, completion) into $SPARING_DATA/{FOLDER}, or take what is shipped: "
            "-s task.dataset=derived"
        )
    templates: dict[str, list[Any]] = defaultdict(list)
    for where, row in read(file):
        if not isinstance(row, dict) or not {"task", "prompt", "completion"} <= set(row):
            raise RequestError(f"{where} has no task, prompt and completion")
        text = str(row["completion"]).removesuffix(END).strip()
        templates[str(row["task"])].append({"prompt": str(row["prompt"]), "completion": text})
    start = FINAL if split == "final" else DEVELOPMENT
    stop = EXAMPLES if split == "final" else FINAL - GAP
    train_stop = (DEVELOPMENT if split == "development" else FINAL) - GAP
    found: dict[str, tuple[list[Any], list[Any]]] = {name: ([], []) for name in GROUPS}
    for template, rows in sorted(templates.items()):
        if len(rows) == EXAMPLES:
            train, held = found[group_of(template)]
            train += [row for row in rows[:train_stop] if row["completion"]]
            held += [row for row in rows[start:stop] if row["completion"]]
    return found
