"""Runs what a comparison lacks, and compares: resumable, within a budget, seed by seed."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, final

from sparing.core.errors import RequestError
from sparing.core.state import atomic_write_json
from sparing.run.compare import settled, tune
from sparing.run.compare.arms import Asked, Planned
from sparing.run.compare.finished import STATE, Comparison, judged
from sparing.run.compare.found import Found, find, read_json
from sparing.run.compare.request import checked, chunks_of
from sparing.run.compare.same import first_difference
from sparing.run.compare.work import Job, Launch, Pool, Processes, locked
from sparing.run.declared import Compared
from sparing.run.estimate import seconds as estimated_seconds
from sparing.run.recipe import resolve

PAGE = "compare.html"
Note = Callable[[str], None]


def run_comparison(
    asked: Asked, *, launch: Launch | None = None, note: Note = lambda text: None
) -> Comparison:
    """Make the runs that are missing in ``asked.out``, then compare all that are there.

    Finished and diverged runs are kept, unfinished ones resumed. Writes ``comparison.json`` and
    the page ``compare.html`` there. ``launch`` makes a run; by default in a process of its own.

    Raises:
        RequestError: the request is wrong, the directory holds something else, or another
            comparison is at work there. Nothing has been run then.
    """
    arms, compared = checked(asked)
    with locked(asked.out) as lock:
        work = _Work(asked, arms, compared, launch or Processes(lock), note)
        work.go()
        return work.end()


def _as_of_now(recipe: dict[str, Any]) -> dict[str, Any]:
    """A run's recipe with options that it did not know at their defaults, which change nothing."""
    try:
        return resolve(recipe).to_dict()
    except RequestError:  # it has options that there are no longer
        return recipe


@final
class _Work:
    def __init__(
        self,
        asked: Asked,
        arms: Sequence[Planned],
        compared: Compared,
        launch: Launch,
        note: Note,
    ) -> None:
        self.asked, self.note = asked, note
        self.margin, self.baseline = str(compared.margin), compared.baseline
        self.tuning = compared.tune
        self.seeds = list(range(asked.seeds))
        self._check_state()
        self.settled = settled.read(asked.out)
        self.tuned = tune.read(asked.out)
        self.arms = {p.name: self._known(p) for p in arms}
        self._check_places()
        self._write_state()
        self.measured: float | None = None
        self.pool = Pool(
            launch,
            jobs=asked.jobs,
            budget=None if asked.budget is None else 60 * asked.budget,
            estimate=self._estimate,
            note=note,
            done=lambda job: self._find(job.out, "").state in ("finished", "diverged"),
        )

    # ---- what is known of an arm -------------------------------------------------------------

    def _known(self, planned: Planned) -> Planned:
        """The arm with what earlier calls settled and chose for it."""
        held = self.settled.get("arms", {}).get(planned.name, {})
        chosen = self.tuned.get(planned.name, {})
        return dataclasses.replace(
            planned, settled=held.get("set", {}), tuned=chosen.get("chosen", {})
        )

    def _ready(self, planned: Planned) -> bool:
        tuned = self.tuning is None or planned.name in self.tuned
        return tuned and self._is_settled(planned)

    def _is_settled(self, planned: Planned) -> bool:
        return planned.waits_for is None or planned.name in self.settled.get("arms", {})

    def _fixed(self) -> list[str]:
        """Overrides that all runs share beside the user's."""
        threads = self.asked.threads
        precision = self.settled.get("precision")
        return [
            *([f"train.precision={precision}"] if precision else []),
            *([f"train.threads={threads}"] if threads else []),
        ]

    def _place(self, planned: Planned, seed: int) -> Path:
        return self.asked.out / planned.slug / f"seed-{seed}"

    def _find(self, path: Path, name: str) -> Found:
        return find(path, name)

    def _job(self, name: str, block: int, out: Path, overrides: Sequence[str]) -> Job:
        asked = self.asked
        every = (*asked.overrides, *overrides)
        parts = ["sparing", "run", asked.recipe]
        parts += ["--preset", asked.preset] if asked.preset else []
        for override in every:
            parts += ["-s", override]
        return Job(
            name=name,
            block=block,
            out=out,
            recipe=asked.recipe,
            preset=asked.preset,
            overrides=self._with_held_threads(out, every),
            command=shlex.join([*parts, "--out", str(out)]),
            threads=asked.threads,
        )

    def _with_held_threads(self, out: Path, overrides: Sequence[str]) -> tuple[str, ...]:
        """A run that was begun goes on with its own number of threads."""
        train = self._find(out, "").recipe.get("train")
        if train is None:
            return tuple(overrides)
        held = train.get("threads")
        return (*overrides, f"train.threads={'null' if held is None else held}")

    def _run_job(self, planned: Planned, seed: int) -> Job:
        overrides = [*planned.overrides(), *self._fixed(), f"seed={seed}"]
        place = self._place(planned, seed)
        return self._job(f"{planned.name}, seed {seed}", seed, place, overrides)

    def _check_state(self) -> None:
        """Refuse a directory that holds a comparison of something else."""
        file = self.asked.out / STATE
        if not file.is_file():
            return
        held, now = read_json(file).get("about", {}), self._about()
        for key, option in (("recipe", "recipe"), ("preset", "--preset"), ("set", "-s")):
            if held.get(key) != now[key]:
                raise RequestError(
                    f"{self.asked.out} holds a comparison with another {option}: {held.get(key)} "
                    f"there and {now[key]} here; choose another directory by --out"
                )

    def _check_places(self) -> None:
        """Refuse runs that are there and have other settings than their arm."""
        for planned in self.arms.values():
            if not self._is_settled(planned):
                continue
            wanted = self.asked.load([*planned.overrides(), *self._fixed()]).alone().to_dict()
            for seed in self.seeds:
                run = self._find(self._place(planned, seed), planned.name)
                tuned = self.tuning is None or planned.name in self.tuned
                held = _as_of_now(run.recipe) if run.recipe and tuned else wanted
                key = first_difference(held, wanted)
                if key:
                    raise RequestError(
                        f'{run.path} holds a run of other settings than the arm "{planned.name}" '
                        f"has now: {key}; choose another directory by --out"
                    )

    # ---- running -----------------------------------------------------------------------------

    def go(self) -> None:
        self._settle_precision()
        if self.pool.budget is not None:
            self._measure()
        independent = [p for p in self.arms.values() if p.waits_for is None]
        self._tune(independent)
        waiting = [p for p in self.arms.values() if not self._is_settled(p)]
        chunks = chunks_of(self.seeds, self.asked.looks)
        if waiting:
            sources = {p.waits_for for p in waiting}
            first = chunks[0][: self._affordable()]
            self._run([p for p in self._arms() if p.name in sources], first)
            for planned in waiting:
                self._settle(planned)
        self._tune([p for p in self._arms() if p.waits_for is not None])
        for number, chunk in enumerate(chunks, start=1):
            self._run(self._arms(), chunk)
            if self.pool.skipped:
                break
            if number < len(chunks) and self._decided():
                self.note(f"every verdict is decided after look {number} of {len(chunks)}")
                self.seeds = [seed for each in chunks[:number] for seed in each]
                break

    def _arms(self) -> list[Planned]:
        return list(self.arms.values())

    def _run(self, arms: Sequence[Planned], seeds: Sequence[int]) -> None:
        ready = [p for p in arms if self._ready(p)]
        self.pool.run([self._run_job(p, seed) for seed in seeds for p in ready])

    def _tune(self, arms: Sequence[Planned]) -> None:
        if self.tuning is None:
            return
        todo = [p for p in arms if p.name not in self.tuned and self._is_settled(p)]
        tries = list(tune.settings(self.tuning))
        jobs = {}
        for planned in todo:
            train = planned.load(self.asked).train
            for tried in tries:
                place = tune.place(self.asked.out, planned, tried)
                overrides = [*planned.overrides(), *self._fixed()]
                overrides += tune.overrides(self.tuning, tried, train)
                name = f"{planned.name}, tuning {place.name}"
                jobs[place] = self._job(name, -1, place, overrides)
        self.pool.run(list(jobs.values()))
        for planned in todo:
            runs = [
                (tried, self._find(tune.place(self.asked.out, planned, tried), planned.name))
                for tried in tries
            ]
            chosen = tune.choose(self.tuning, runs)
            if chosen is not None:
                self.tuned[planned.name] = chosen
                tune.write(self.asked.out, self.tuned)
                self.arms[planned.name] = self._known(planned)

    def _settle(self, planned: Planned) -> None:
        source = self.arms[str(planned.waits_for)]
        runs = [self._find(self._place(source, seed), source.name) for seed in self.seeds]
        done = [run for run in runs if run.state == "finished"]
        if not done or not self._ready(source):
            why = f'"{source.name}" has no finished run whose cost it could match'
            self.arms[planned.name] = dataclasses.replace(planned, why_not=why)
            return
        recipe = self.asked.load(source.overrides())
        try:
            found = settled.settle(planned, self.asked, recipe, done, self._fixed())
        except RequestError as error:  # the other arms have run by now, and go on
            self.note(f"{planned.name}: {error}")
            self.arms[planned.name] = dataclasses.replace(planned, why_not=str(error))
            return
        self.settled.setdefault("arms", {})[planned.name] = found
        settled.write(self.asked.out, self.settled)
        self.arms[planned.name] = self._known(planned)
        for key, value in found["set"].items():
            if "match" in found and key == found["match"]["key"]:
                self.note(f"{planned.name}: {key} = {value:g} costs what {source.name} spent")

    def _settle_precision(self) -> None:
        """One precision for all: were it measured for each run, arms might differ in it."""
        if "precision" in self.settled:
            return
        recipe = self.asked.load()
        chosen: str = recipe.train.precision
        if chosen == "auto":
            from sparing.run.runner import chosen_precision

            chosen = chosen_precision(self.asked.load(self._fixed()))
            self.note(f"precision: {chosen}, for all runs")
        self.settled["precision"] = chosen
        settled.write(self.asked.out, self.settled)

    def _decided(self) -> bool:
        others = [arm for arm in self._judged().arms if arm.name != self.baseline]
        return all(arm.judgement and arm.judgement.verdict in ("equivalent", "different")
                   for arm in others)  # fmt: skip

    # ---- budget ------------------------------------------------------------------------------

    def _measure(self) -> None:
        base = self.arms[self.baseline]
        arm = base if self._is_settled(base) else next(
            p for p in self._arms() if p.waits_for is None
        )  # fmt: skip
        runs = [f for p in self._arms() for f in self._runs(p) if f.state == "finished"]
        if not runs:
            recipe = self.asked.load([*arm.overrides(), *self._fixed()])
            self.measured = estimated_seconds(recipe)["total"]
            self.note(f"a run of {arm.name} takes about {self.measured / 60:.1f} minutes")

    def _estimate(self, job: Job) -> float | None:
        """Seconds of the arm's finished runs, else of any, else what was measured."""
        by_arm = {
            p.slug: [s for f in self._runs(p) if (s := f.cost("seconds")) is not None]
            for p in self._arms()
        }
        own = by_arm.get(job.out.parent.name) or []
        every = [s for each in by_arm.values() for s in each]
        seconds = mean(own or every) if own or every else self.measured
        tokens = self.asked.load(job.overrides).train.tokens  # a run to tune by may be shorter
        whole = self.asked.load().train.tokens
        return seconds if seconds is None or not tokens or not whole else seconds * tokens / whole

    def _affordable(self) -> int:
        """How many whole blocks the budget reaches, at least one."""
        if self.pool.budget is None:
            return len(self.seeds)
        block = 0.0
        for planned in self._arms():
            job = self._job("", 0, self._place(planned, 0), planned.overrides())
            block += self._estimate(job) or 0.0
        return max(1, int(self.pool.left * self.asked.jobs / block)) if block else len(self.seeds)

    # ---- what came of it ---------------------------------------------------------------------

    def _runs(self, planned: Planned) -> list[Found]:
        return [self._find(self._place(planned, seed), planned.name) for seed in self.seeds]

    def _found(self) -> dict[str, list[Found]]:
        skipped = {job.out for job in self.pool.skipped}
        found = {}
        for name, planned in self.arms.items():
            runs = []
            for seed, run in zip(self.seeds, self._runs(planned), strict=True):
                why = run.why
                if run.state in ("missing", "unfinished"):
                    why = self.pool.failed.get(run.path) or planned.why_not or why
                    if run.path in skipped or (not self._ready(planned) and not planned.why_not):
                        why = "the budget did not reach it"
                runs.append(dataclasses.replace(run, seed=seed, why=why))
            found[name] = runs
        return found

    def _judged(self) -> Comparison:
        declared = {}
        for name, planned in self.arms.items():
            held = self.settled.get("arms", {}).get(name, {})
            declared[name] = planned.declared()
            if "match" in held:
                declared[name]["match"] = held["match"]
            if name in self.tuned:
                declared[name]["tuning"] = self.tuned[name]
            job = self._run_job(planned, 0)
            if self._is_settled(planned):
                declared[name]["command"] = job.command.replace("seed-0", "seed-N").replace(
                    "seed=0", "seed=N"
                )
        return judged(
            self._found(),
            baseline=self.baseline,
            margin=self.margin,
            level=self.asked.level,
            looks=self.asked.looks,
            declared=declared,
            about=self._about(),
        )

    def _about(self) -> dict[str, Any]:
        recipe = self.asked.load()
        return {
            "recipe": recipe.name,
            "about": recipe.about,
            "preset": self.asked.preset,
            "set": list(self.asked.overrides),
            "seeds": self.seeds,
            "command": self.asked.command,
        }

    def _write_state(self, comparison: Comparison | None = None) -> None:
        arms: dict[str, Any] = {}
        for name, planned in self.arms.items():
            held = comparison.arm(name) if comparison else None
            arms[name] = {
                "declared": held.declared if held else planned.declared(),
                "runs": [
                    {
                        "seed": seed,
                        "path": self._place(planned, seed).relative_to(self.asked.out).as_posix(),
                        "why": held.runs[i].why if held else "",
                    }
                    for i, seed in enumerate(self.seeds)
                ],
            }
        state = {
            "format": 1,
            "baseline": self.baseline,
            "margin": self.margin,
            "level": self.asked.level,
            "looks": self.asked.looks,
            "about": self._about(),
            "arms": arms,
        }
        atomic_write_json(self.asked.out / STATE, state)

    def end(self) -> Comparison:
        comparison = self._judged()
        failed = [f"{path}: {why}" for path, why in self.pool.failed.items()
                  if self._find(path, "").state != "diverged"]  # fmt: skip
        if failed:
            comparison = dataclasses.replace(
                comparison, about={**comparison.about, "failed": failed}
            )
        self._write_state(comparison)
        try:
            comparison.page(self.asked.out / PAGE)
        except RequestError as error:  # the comparison is whole without its page
            self.note(f"no page was written: {error}")
        return comparison
