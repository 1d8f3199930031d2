"""What can be named in a recipe. Lazy: a record is plain text until its class is asked for."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

from sparing.core.errors import RequestError, unknown

if TYPE_CHECKING:
    from sparing.core.method import Method


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One entry: known without importing what it names.

    ``target`` is ``"package.module:Class"``; ``paper`` an identifier such as ``"arXiv 2405.14297"``
    (empty if none); ``extras`` the optional dependency groups that the class needs; ``card`` the
    name of its page in ``docs/methods``.
    """

    name: str
    target: str
    summary: str
    paper: str = ""
    extras: tuple[str, ...] = ()
    card: str = ""

    @property
    def class_name(self) -> str:
        """The class's own name, the part of ``target`` after the colon."""
        return self.target.partition(":")[2]

    def load(self) -> type[Any]:
        """Import and return the class.

        Raises RequestError if an optional dependency is not installed, and says how to install it.
        """
        module, _, attribute = self.target.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if not self.extras or (error.name or "").split(".")[0] == "sparing":
                raise
            raise RequestError(
                f'"{self.name}" needs the package "{error.name}", which is not installed; '
                f'run: pip install "sparing[{",".join(self.extras)}]"'
            ) from error
        if not isinstance(found, type):
            raise TypeError(f"{self.target} is not a class")
        return found


METHODS: Final[tuple[Record, ...]] = (
    Record(
        name="dynmoe",
        target="sparing.experts.top_any:TopAny",
        summary="Each token picks as many experts as pass their thresholds; experts come and go.",
        paper="arXiv 2405.14297",
        card="dynmoe",
    ),
    Record(
        name="top-k",
        target="sparing.experts.top_k:TopK",
        summary="Each token goes to the k experts that a softmax router scores highest.",
        paper="arXiv 1701.06538",
        card="top-k",
    ),
    Record(
        name="noisy-top-k",
        target="sparing.experts.noisy_top_k:NoisyTopK",
        summary="Top-k by logits with learned noise in training; losses even importance and load.",
        paper="arXiv 1701.06538",
        card="noisy-top-k",
    ),
    Record(
        name="switch",
        target="sparing.experts.switch:Switch",
        summary="Each token goes to one expert, weighted by the router's probability for it.",
        paper="arXiv 2101.03961",
        card="switch",
    ),
    Record(
        name="sigmoid-top-k",
        target="sparing.experts.sigmoid:SigmoidTopK",
        summary="Top-k by sigmoid score plus a bias that evens the load without a loss.",
        paper="arXiv 2408.15664",
        card="sigmoid-top-k",
    ),
    Record(
        name="expert-choice",
        target="sparing.experts.expert_choice:ExpertChoice",
        summary="Experts choose tokens in training, which is not causal; evaluation goes by token.",
        paper="arXiv 2202.09368",
        card="expert-choice",
    ),
    Record(
        name="random",
        target="sparing.experts.random:RandomExperts",
        summary="Each token takes random experts, in any mean number: the control at equal cost.",
        paper="arXiv 2110.04260",
        card="random",
    ),
    Record(
        name="hash",
        target="sparing.experts.hash:HashExperts",
        summary="Each token takes the experts that a hash of its id names: nothing is learned.",
        paper="arXiv 2106.04426",
        card="hash",
    ),
    Record(
        name="top-p",
        target="sparing.experts.top_p:TopP",
        summary="Each token takes experts until their probabilities add up to p.",
        paper="arXiv 2403.07652",
        card="top-p",
    ),
    Record(
        name="relu",
        target="sparing.experts.relu:ReLURouter",
        summary="Experts whose ReLU gate is positive act; an adaptive penalty holds their number.",
        paper="arXiv 2412.14711",
        card="relu",
    ),
    Record(
        name="convert",
        target="sparing.convert.method:Convert",
        summary="Makes experts of a trained dense model's feed-forward blocks, then trains on.",
        paper="arXiv 2406.16554",
        extras=("hf",),
        card="convert",
    ),
    Record(
        name="infobatch",
        target="sparing.samples.infobatch:InfoBatch",
        summary="Leaves out a random part of the well learned samples, and weighs up the rest.",
        paper="arXiv 2303.04947",
        card="infobatch",
    ),
    Record(
        name="quantiles",
        target="sparing.samples.quantiles:Quantiles",
        summary="Strata of samples by loss, each with its own share to keep, weighed up.",
        paper="arXiv 2303.04947",
        card="quantiles",
    ),
    Record(
        name="ucb",
        target="sparing.samples.ucb:UCB",
        summary="Keeps the samples with the highest upper bound of their loss.",
        paper="arXiv 2111.12621",
        card="ucb",
    ),
    Record(
        name="seta",
        target="sparing.samples.seta:SeTa",
        summary="A window of clusters by loss slides from easy samples to hard ones.",
        paper="arXiv 2503.13385",
        card="seta",
    ),
    Record(
        name="random-samples",
        target="sparing.samples.random:RandomSamples",
        summary="A random part of the samples each epoch: the control at equal cost.",
        paper="arXiv 2303.04947",
        card="random-samples",
    ),
    Record(
        name="gain-proportional",
        target="sparing.samples.gains:GainProportional",
        summary="Draws samples in proportion to their gain; an epoch keeps its length.",
        paper="arXiv 2405.18347",
        card="gain-proportional",
    ),
    Record(
        name="two-phase",
        target="sparing.samples.gains:TwoPhase",
        summary="Epochs of samples with a high gain, then of those with a low one, in turn.",
        paper="arXiv 2405.18347",
        card="two-phase",
    ),
    Record(
        name="coreset",
        target="sparing.samples.coreset:Coreset",
        summary="Scores samples in the first epochs, then trains on a fixed part of them.",
        paper="arXiv 2107.07075",
        card="coreset",
    ),
    Record(
        name="growth",
        target="sparing.pool.training.method:GrowthSelection",
        summary="Cleans the training set, values each sample by what it adds, trains on a part.",
        paper="arXiv 2405.18347",
        extras=("pool",),
        card="growth",
    ),
    Record(
        name="mix",
        target="sparing.samples.mix:Mix",
        summary="Draws from weighted sources; weights may follow losses or the load of experts.",
        paper="arXiv 2406.11256",
        card="mix",
    ),
    Record(
        name="sparse-adapter",
        target="sparing.weights.adapters:SparseAdapter",
        summary="Trains the entries of an adapter that a score keeps before training; base frozen.",
        paper="arXiv 2210.04284",
        card="sparse-adapter",
    ),
    Record(
        name="peft",
        target="sparing.weights.peers:Peft",
        summary="LoRA or SHiRA by Hugging Face's PEFT, to compare with; base frozen.",
        paper="arXiv 2106.09685",
        extras=("peft",),
        card="peft",
    ),
    Record(
        name="cowclip",
        target="sparing.updates.cowclip:CowClip",
        summary="Clips each embedding row's gradient by its norm and how often its id occurs.",
        paper="arXiv 2204.06240",
        card="cowclip",
    ),
)

TASKS: Final[tuple[Record, ...]] = (
    Record(
        name="language",
        target="sparing.tasks.language:Language",
        summary="Byte-level language modelling of Shakespeare, grade-school maths and Python.",
        extras=("hf",),
    ),
    Record(
        name="vision",
        target="sparing.tasks.vision:Vision",
        summary="Image classification on Fashion-MNIST, a part of it that is shipped, or CIFAR-10.",
    ),
    Record(
        name="text",
        target="sparing.tasks.text:Text",
        summary="Text classification with an encoder: passages by source, or AG News.",
        extras=("hf",),
    ),
    Record(
        name="clicks",
        target="sparing.tasks.clicks:Clicks",
        summary="Click prediction on a log of retail promotions, a sample of it, or your files.",
        extras=("clicks",),
    ),
    Record(
        name="instruct",
        target="sparing.tasks.instruct:Instruct",
        summary="Instructions from many sources: small tasks of shipped texts, T0, or your files.",
        extras=("hf",),
    ),
    Record(
        name="continued",
        target="sparing.tasks.continued:Continued",
        summary="A trained causal model goes on training, on text by domain or of its own writing.",
        extras=("hf",),
    ),
)

OPTIMIZERS: Final[tuple[Record, ...]] = (
    Record(
        name="muon",
        target="sparing.updates.muon:Muon",
        summary="Orthogonalised momentum for single and stacked matrices, AdamW for the rest.",
    ),
    Record(
        name="rowwise",
        target="sparing.updates.rowwise:RowWise",
        summary="Adagrad or Adam with one second moment a table row, AdamW for the rest.",
    ),
)

KINDS: Final[dict[str, tuple[Record, ...]]] = {
    "method": METHODS,
    "task": TASKS,
    "optimizer": OPTIMIZERS,
}


def records(kind: str) -> tuple[Record, ...]:
    """All records of a kind, a key of ``KINDS``; RequestError for another kind."""
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    return KINDS[kind]


def methods() -> tuple[Record, ...]:
    """The records of all methods."""
    return records("method")


def tasks() -> tuple[Record, ...]:
    """The records of all tasks."""
    return records("task")


def find(kind: str, name: str) -> Record:
    """The record of ``name``, its registry name or its class's name, in any case.

    Raises RequestError that names the nearest known one.
    """
    wanted = name.lower()
    for record in records(kind):
        if wanted in (record.name.lower(), record.class_name.lower()):
            return record
    raise unknown(kind, name, [record.name for record in records(kind)])


def method_record(name: str) -> Record:
    """The record of a method; see ``find``."""
    return find("method", name)


def task_record(name: str) -> Record:
    """The record of a task; see ``find``."""
    return find("task", name)


def method(name: str) -> type[Method]:
    """The class of a method; see ``find`` and ``Record.load`` for the errors."""
    return method_record(name).load()


def task(name: str) -> type[Any]:
    """The class of a task; see ``find`` and ``Record.load`` for the errors."""
    return task_record(name).load()


def optimizer(name: str) -> type[Any]:
    """The class of an optimizer; see ``find`` and ``Record.load`` for the errors."""
    return find("optimizer", name).load()
