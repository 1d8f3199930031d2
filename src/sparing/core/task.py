"""What a recipe trains: data, model, loss per sample and metric. No method knows a task."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Samples(Protocol):
    """A finite training set whose samples keep their index for the whole run.

    Optional: ``set_epoch(epoch)``, called before each epoch. A set that augments draws by seed,
    epoch and index alone, so that a resumed run sees the same; its ``plain(index)`` gives the
    same batch not augmented, for methods that look at the samples before training.
    """

    def __len__(self) -> int: ...

    def batch(self, index: Tensor) -> Any:
        """The samples ``index``, (B,) int64, as one batch."""
        ...


@runtime_checkable
class Task(Protocol):
    """Constructed from the recipe's options; ``prepare`` loads the data and is called once.

    More are optional. ``evaluation``, a tuple of option names: those that decide data and
    evaluation, which the arms of a comparison must share. ``documents(model)``, {domain: (n,)
    float64 Tensor}: the metric of each held-out document, whose mean over a domain's documents,
    then over domains, is the metric; comparisons resample them. ``export(model, path)``: writes a
    trained model that no method has written, to the directory ``path``, whole or not at all;
    ``load(path)``: reads it again. ``model_needs_data``: False if ``model`` works before
    ``prepare``.
    ``show(model, index)``: training samples as a page shows them, a list of {"image" (a data URI)
    or "text", "caption"}, for methods that name samples in their page. ``domain_name``: what a
    domain is called, such as "class"; ``about_metric``: a sentence that says how to read it.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Any]]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]

    train: Samples
    domains: tuple[str, ...]
    fingerprint: str
    """A hash of the data; results on different data are never compared."""
    tokens_per_sample: int
    """1 where a sample is no sequence: budgets in tokens then count samples."""

    def prepare(self, seed: int) -> None: ...

    def model(self, seed: int) -> nn.Module:
        """A freshly initialised model; the global generators are left as they were."""
        ...

    def domain_of(self, index: Tensor) -> Tensor:
        """(B,) int64 -> (B,) int64, positions in ``domains``."""
        ...

    def order(self, epoch: int, generator: torch.Generator) -> Tensor:
        """The default order of an epoch, (n,) int64, by the epoch and generator's seed alone."""
        ...

    def losses(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        """The loss of each sample, (B,) float32, and the model's outputs."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Metrics on held-out data by name, ``metric`` among them."""
        ...

    def references(self) -> dict[str, dict[str, float]]:
        """Values of the metric that simple known methods reach, by method and domain."""
        ...

    def page(self, model: nn.Module, seed: int) -> dict[str, Any]:
        """What the report page shows of this task, by key.

        ``samples`` [{domain, prompt, text}] that the model wrote, ``passages`` [{domain, bytes}]
        for methods to annotate, ``pictures`` [{title, pictures: [{image, caption}]}], ``remark``,
        ``tables`` [{title, about, head: [text], rows: [[text]]}] of which the first ``words``
        columns are no numbers, ``also`` {further metric: what to call it}, drawn over the run.
        """
        ...

    def read(self, model: nn.Module, passage: dict[str, Any]) -> None:
        """Run the model over a passage of ``page``, so that methods can watch it."""
        ...
