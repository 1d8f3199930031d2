"""Runs a recipe: a loop over a Session, with a run directory that survives a kill at any point."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import random
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import nn

from sparing.core.errors import DivergedError, RequestError, RunError, SparingError
from sparing.core.random_state import random_state, set_random_state_
from sparing.hosts.session import Session
from sparing.run import record
from sparing.run.directory import RunDirectory
from sparing.run.optim import optimizer, schedule
from sparing.run.precision import probe
from sparing.run.progress import Display, Quiet, signal_values
from sparing.run.recipe import Recipe, difference, resolve
from sparing.run.taken import Taken
from sparing.run.watching import Due, Lately

EXTRAS = {
    "hf": ("transformers",),
    "report": ("jinja2",),
    "vision": ("PIL",),
    "clicks": ("pyarrow",),
    "pool": ("cleanlab", "PIL"),
}
"""The modules that tell whether an extra is installed."""


def check_extras(recipe: Recipe) -> None:
    """Raise RequestError for an extra that the recipe needs and this environment lacks."""
    for extra in recipe.needs:
        for module in EXTRAS.get(extra, ()):
            if importlib.util.find_spec(module) is None:
                raise RequestError(
                    f'the recipe "{recipe.name}" needs {module}, which is not installed; '
                    f'run: pip install "sparing[{extra}]"'
                )


def planned_steps(recipe: Recipe, task: Any, world: int = 1) -> int | None:
    """Optimizer steps of the recipe's token budget, None if its epochs are the only budget."""
    train = recipe.train
    if train.tokens is None:
        return None
    per_step: int = train.batch_size * train.accumulate * world * task.tokens_per_sample
    if train.tokens < per_step:
        raise RequestError(
            f"train.tokens is {train.tokens}, less than one step of {per_step} tokens "
            "(batch_size x accumulate x tokens per sample); raise it, or lower train.batch_size"
        )
    return train.tokens // per_step


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    display: Display | None = None,
    page: bool = True,
    command: str | None = None,
) -> dict[str, Any]:
    """Train the recipe into the directory ``out`` and return its summary.

    Raises RequestError before anything is spent if the request is wrong, RunError if the run
    failed; the last checkpoint is kept, and ``resume`` goes on from it to the same result as if
    nothing had happened (bit for bit on one CPU). ``command`` is what the page says made it.
    """
    check_extras(recipe)
    directory = RunDirectory(out)
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    recipe = directory.claim(recipe.alone(), resume=resume)
    with _seeded(recipe.seed), closing(directory):
        whole = _Run(recipe, directory, display or Quiet(), resume=resume)
        return whole.go(page=page, command=command or f"sparing run {recipe.name}")


@contextmanager
def rehearsal(recipe: Recipe) -> Iterator[tuple[Any, Session]]:
    """The task and the session that ``run`` would use, to be thrown away; nothing is written."""
    check_extras(recipe)
    with _seeded(recipe.seed):
        whole = _Run(recipe.alone(), RunDirectory("."), Quiet(), resume=False)
        yield whole.task, whole.session


def chosen_precision(recipe: Recipe) -> str:
    """What ``precision: auto`` comes to on this machine, by a probe of the recipe's model."""
    with rehearsal(recipe) as (_, session):
        return session.precision


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Dropout and the like follow the recipe's seed; afterwards the generators are as they were."""
    kept = random_state()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  a task's libraries may draw from the global one
    try:
        yield
    finally:
        set_random_state_(kept)


@final
class _Run:
    def __init__(
        self, recipe: Recipe, directory: RunDirectory, display: Display, *, resume: bool
    ) -> None:
        self.recipe, self.directory, self.display = recipe, directory, display
        self.resume = resume
        self.code = record.code_hash()  # now: the sources may change while the run is under way
        self.seconds, self.steps = 0.0, 0
        self.lately = Lately()
        self.probed: dict[str, float] = {}
        self.task = recipe.build_task()
        display.note(f"{recipe.name}: loading {recipe.task['name']}")
        self.task.prepare(recipe.seed)
        self.session = self._session()
        whose = self.task.domain_of(torch.arange(len(self.task.train)))
        sizes = torch.bincount(whose, minlength=len(self.task.domains))
        self.taken = Taken(self.task.domains, sizes)

    def _session(self) -> Session:
        recipe, task, train = self.recipe, self.task, self.recipe.train
        model: nn.Module = task.model(recipe.seed)
        if train.precision == "auto":
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            index = torch.arange(min(train.batch_size, len(task.train)))
            self.probed = probe(model, task.losses, task.train.batch(index), device)
            chosen = min(self.probed, key=lambda name: self.probed[name])
            self.recipe = recipe = dataclasses.replace(
                recipe,
                train=dataclasses.replace(train, precision=chosen),  # type: ignore[arg-type]
            )
            self.display.note(
                "precision: "
                + ", ".join(f"{name} {1000 * s:.0f} ms" for name, s in self.probed.items())
                + f" a batch; taking {chosen}"
            )
        return Session(
            model,
            recipe.build_methods(),
            data=task.train,
            losses=task.losses,
            optimizer=optimizer(train),
            schedule=schedule(train),
            batch_size=train.batch_size,
            accumulate=train.accumulate,
            steps=planned_steps(recipe, task),
            epochs=train.epochs,
            clip=train.clip,
            order=task.order,
            domain_of=task.domain_of,
            domains=task.domains,
            seed=recipe.seed,
            precision=recipe.train.precision,
        )

    def go(self, *, page: bool, command: str) -> dict[str, Any]:
        session, clock = self.session, self.session.clock
        assert clock.steps is not None
        steps = self.steps = clock.steps  # a bound, where methods leave samples out
        if self.resume:
            self._restore()
        else:  # not before: a request that turned out wrong leaves nothing behind
            self.directory.write_recipe(self.recipe)
        (self.directory.path / "diverged.json").unlink(missing_ok=True)
        # a method that leaves samples out ends before the planned steps
        self.directory.rewind(clock.step, clock.step if session.finished else steps)
        watch = self.recipe.watch
        due = Due(watch, clock)
        self.display.start(self.recipe.name, steps, clock.step)
        if watch.start and clock.step == 0:
            self._evaluate()
        begun, before = time.monotonic(), self.seconds
        lately = self.lately
        try:
            for batch, context in session:
                self.taken.add(clock.epoch, context.domain)
                losses, outputs = session.forward(batch)
                step, fraction = clock.step, clock.fraction
                lately.add(session.step(losses, context, outputs), clock.tokens)
                if clock.step == step:
                    continue  # within an accumulation
                self.seconds = before + time.monotonic() - begun
                self._report(force=due("log", fraction) or session.finished)
                if due("evaluate", fraction) and not session.finished:
                    self._evaluate()
                    self.seconds = before + time.monotonic() - begun
                if due("checkpoint", fraction):
                    self._save()
        except RunError as error:
            if isinstance(error, DivergedError):  # so that nobody runs it again in vain
                told = {"format": 1, "step": clock.step + 1, "why": str(error), "code": self.code}
                self.directory.write_json("diverged.json", told)
            raise type(error)(f"{error}. {self._kept()}") from error
        finally:
            self.display.stop()
        self.seconds = before + time.monotonic() - begun
        metrics = self._evaluate()
        self._save()
        return self._finish(metrics, page=page, command=command)

    # ---- while it runs -----------------------------------------------------------------------

    def _report(self, *, force: bool) -> None:
        session, clock, lately = self.session, self.session.clock, self.lately
        for event in session.take_events():
            self._log_event(event)
        signals = session.signals()
        shown = {
            "loss": f"{lately.loss:.3f}",
            f"{self._unit}/s": f"{lately.speed:,.0f}",
            **signal_values(signals),
        }
        done = clock.step if clock.by_epochs is None else math.floor(clock.fraction * self.steps)
        self.display.update(done, shown)
        if force:
            self.directory.log(
                "train",
                step=clock.step,
                epoch=clock.epoch,
                samples=clock.samples,
                tokens=clock.tokens,
                flops=session.ledger.spent("flops"),
                loss=lately.take(),
                tokens_per_second=lately.speed,
                seconds=self.seconds,
                learning_rate=session.optimizer.param_groups[0]["lr"],
                signals=signals,
            )

    @property
    def _unit(self) -> str:
        """What is counted as a token: where no sample is a sequence, samples."""
        clock = self.session.clock
        return "samples" if clock.tokens == clock.samples else "tokens"

    def _log_event(self, event: dict[str, Any]) -> None:
        told = {key: value for key, value in event.items() if key != "kind"}
        self.directory.log(
            "event", event=event["kind"], **{"step": self.session.clock.step, **told}
        )
        self.display.note(
            f"step {told.get('step')}: {event['kind']}, "
            f"{told.get('layer', '')} {told.get('expert', '')}: {told.get('why', '')}"
        )

    def _evaluate(self) -> dict[str, float]:
        session = self.session
        with session.evaluating() as model:
            metrics: dict[str, float] = self.task.evaluate(model)
        self.directory.log(
            "eval",
            step=session.clock.step,
            tokens=session.clock.tokens,
            flops=session.ledger.spent("flops"),
            **metrics,
        )
        name = self.task.metric
        self.display.note(f"step {session.clock.step}: {name} {metrics[name]:.4f}")
        return metrics

    def _save(self) -> None:
        state = {"session": self.session.state_dict(), "seconds": self.seconds}
        state["lately"] = self.lately.state_dict()
        state["taken"] = self.taken.state_dict()
        about = {
            "recipe": self.recipe.to_dict(),
            "fingerprint": self.task.fingerprint,
            "probed": self.probed,
        }
        self.directory.checkpoints.write(self.session.clock.step, state, about)

    def _restore(self) -> None:
        newest = self.directory.checkpoints.newest()
        if newest is None:
            self.display.note("no checkpoint was written yet; starting from the beginning")
            return
        _, state, about = newest
        other = difference(resolve(about["recipe"]), self.recipe)
        if other:
            raise RequestError(
                f"the checkpoint in {self.directory.path} is of another recipe: {other}; "
                "start a new run by --out"
            )
        if about["fingerprint"] != self.task.fingerprint:
            raise RequestError(
                f"the run in {self.directory.path} was trained on other data (its hash is "
                f"{about['fingerprint'][:12]}, here it is {self.task.fingerprint[:12]}); "
                "resume it where its data is, or start a new run by --out"
            )
        self.session.load_state_dict(state["session"])
        self.seconds = state["seconds"]
        self.lately.load_state_dict(state["lately"])
        if "taken" in state:  # checkpoints of earlier versions have none
            self.taken.load_state_dict(state["taken"])
        self.probed = about["probed"]

    def _kept(self) -> str:
        steps = sorted((self.directory.path / "checkpoint").glob("step-*"))
        if not steps:
            return "No checkpoint had been written yet"
        return f"The last good checkpoint is kept: {steps[-1]}"

    # ---- at the end --------------------------------------------------------------------------

    def _finish(self, metrics: dict[str, float], *, page: bool, command: str) -> dict[str, Any]:
        session, task = self.session, self.task
        self.display.note("writing the model, the summary and the page")
        with session.evaluating() as model:
            if hasattr(task, "documents"):
                self.directory.write_documents(task.documents(model))
            shown = task.page(model, self.recipe.seed)
            place = self.directory.path / "model"
            for method in session.methods:
                method.export(model, place)
                method.account(session.ledger)  # the bytes that were written
                shown |= method.page(
                    model, shown.get("passages", []), lambda passage: task.read(model, passage)
                )
            if not place.exists() and hasattr(task, "export"):
                task.export(model, place)
            shown |= self._pictures(model, shown)
        shown |= {"domains": list(task.domains), "references": task.references()}
        shown["taken"] = self.taken.page()
        for key in ("domain_name", "about_metric"):
            if hasattr(task, key):
                shown[key] = getattr(task, key)
        shown["command"] = command
        self.directory.write_json("page.json", shown)
        summary = {
            "format": 1,
            "recipe": self.recipe.name,
            "task": task.name,
            "corpus": task.fingerprint,
            "seed": self.recipe.seed,
            "metric": {
                "name": task.metric,
                "value": metrics[task.metric],
                "higher_is_better": task.higher_is_better,
            },
            "metrics": metrics,
            "methods": session.signals(),
            "ledger": session.account().to_dict(),
            "steps": session.clock.step,
            "tokens": session.clock.tokens,
            "seconds": round(self.seconds, 3),
            "precision": {"chosen": self.recipe.train.precision, "probe_seconds": self.probed},
            "environment": record.environment(),
            "code": self.code,
        }
        self.directory.write_json("summary.json", summary)
        if page:
            from sparing.run import report

            try:
                report.write(self.directory.path)
            except SparingError as error:  # the run is whole without its page
                self.display.note(f"no page was written: {error}")
        return summary

    def _pictures(self, model: nn.Module, shown: dict[str, Any]) -> dict[str, Any]:
        """What the task shows of the samples that a method names, by their ids."""
        groups = (shown.get("selection") or {}).get("groups") or []
        if not hasattr(self.task, "show"):
            return {}
        ids = sorted({number for group in groups for number in group["index"]})
        return {"shown": dict(zip(map(str, ids), self.task.show(model, ids), strict=True))}
