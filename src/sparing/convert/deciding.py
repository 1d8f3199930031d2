"""From options to what is done with each block."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparing.convert import activations, dealing, fitting, simulating
from sparing.convert.clusters import balanced_kmeans
from sparing.convert.encoding import sentence_vectors
from sparing.convert.native import method_of, router_seed
from sparing.convert.options import WITH_LOSS, Conversion, plain_scale
from sparing.convert.pieces import STRIDE, Decision
from sparing.convert.reading import Batch, Batches, packed, texts_of, tokenizer_in, written
from sparing.convert.refitting import refit
from sparing.convert.skeleton import Skeleton
from sparing.convert.split import Split, at_random, contiguous, sizes, split
from sparing.convert.writing import Told
from sparing.core.errors import RequestError
from sparing.core.quiet import quietly
from sparing.experts.families import Block, feed_forwards
from sparing.experts.router import Router

TOKENS = 4096
"""How many tokens' inputs of each block gates and scales are fitted to, at most."""
WIDE = 8
"""Tokens for each hidden unit of a block whose last projections are fitted, at least."""
LEARN_RATE = 0.05


def decide(
    dense: Skeleton,
    chosen: Sequence[Block],
    options: Conversion,
    *,
    texts: Sequence[str | Path] = (),
    batches: Batches | None = None,
    told: Told = lambda stage, done, total: None,
) -> dict[str, Decision]:
    """A Decision for each of the chosen blocks, by path. Errors as for ``convert``."""
    given = bool(texts) or batches is not None
    if not (options.reads or given):
        return without_data(dense, chosen, options, told)
    model = loaded(dense)
    every = {block.path: block for block in feed_forwards(model, dense.families)}
    blocks = [every[block.path] for block in chosen]
    read = _batches(dense, model, options, texts, batches)
    return from_model(dense, model, blocks, read, options, told)


def without_data(
    dense: Skeleton,
    chosen: Sequence[Block],
    options: Conversion,
    told: Told = lambda stage, done, total: None,
) -> dict[str, Decision]:
    """The decisions of options that read nothing but weights."""
    found = {}
    for position, block in enumerate(chosen):
        made = dealt(dense, block, position, options, None)
        found[block.path] = unfitted(dense, block, position, made, options, False)
        told("deciding", position + 1, len(chosen))
    return found


def from_model(
    dense: Skeleton,
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    options: Conversion,
    told: Told = lambda stage, done, total: None,
) -> dict[str, Decision]:
    """The decisions from a model at work on batches; blocks: those of ``model`` to convert."""
    vectors = None
    if options.encoder is not None:
        vectors = sentence_vectors(options.encoder, dense.source.directory, batches)
    scores = scores_of(model, blocks, batches, options, told, vectors)
    fits = options.fits
    limit = tokens_of(blocks, refit=options.refit)
    inputs = activations.inputs_of(model, blocks, batches, limit) if fits else []
    found: dict[str, Decision] = {}
    for position, block in enumerate(blocks):
        score = scores[position] if scores is not None else None
        made = dealt(dense, block, position, options, score)
        if not fits:
            found[block.path] = unfitted(dense, block, position, made, options, True)
            continue
        x = inputs[position]
        sample = sampled(dense, block, made, x[:: -(-len(x) // TOKENS)])
        gate = gate_of(dense, block, position, sample, made, options)
        decision = scaled(dense, block, sample, made, gate, options)
        found[block.path] = refitted(dense, block, x, decision, options)
        told("fitting", position + 1, len(blocks))
    if options.scale == "learned":
        found = learned(model, blocks, found, batches, options, told)
    return found


def tokens_of(blocks: Sequence[Block], *, refit: bool) -> int:
    """How many tokens' inputs of each block to look at, at most."""
    return max(TOKENS, WIDE * max(block.width for block in blocks)) if refit else TOKENS


def learned(
    model: nn.Module,
    blocks: Sequence[Block],
    decisions: Mapping[str, Decision],
    batches: Sequence[Batch],
    options: Conversion,
    told: Told,
) -> dict[str, Decision]:
    """The scales of all blocks, one number each, by a few steps of Adam on the model's loss."""
    logs = {p: torch.tensor(d.scale).log().requires_grad_(True) for p, d in decisions.items()}
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in frozen:
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam(list(logs.values()), lr=LEARN_RATE)
    weigh = fitting.softmax_top_k(options.chosen)
    try:
        for step in range(options.learn_steps):
            optimizer.zero_grad()
            scales = {path: log.exp() for path, log in logs.items()}
            with torch.enable_grad(), simulating.converted(blocks, decisions, weigh, scales):
                activations.loss_of(model, batches[step % len(batches)]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            told("learning scales", step + 1, options.learn_steps)
    finally:
        for parameter, grad in frozen:
            parameter.requires_grad_(grad)
    return {
        path: dataclasses.replace(decision, scale=float(logs[path].detach().exp()))
        for path, decision in decisions.items()
    }


def scores_of(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    options: Conversion,
    told: Told,
    vectors: Tensor | None = None,
) -> list[Tensor] | None:
    """What the method goes by: importance (n, f), or a sketch (f, r), for each block.

    vectors: (N, d) of the sequences, to cluster these by; None: the model's own states.
    """
    if options.method == "coactivation":
        return activations.coactivation(model, blocks, batches, options.seed)
    if options.method not in WITH_LOSS:
        return None
    generator = torch.Generator().manual_seed(options.seed)
    n = options.routed
    labels: Any
    if options.clusters == "tokens":
        labels = _token_labels(model, blocks, batches, n, generator)
    else:
        if vectors is None:
            vectors = activations.text_vectors(model, blocks, batches)
        if len(vectors) < n:
            raise RequestError(
                f"{len(vectors)} texts cannot make {n} clusters; read more (--sequences), or take "
                f'clusters="tokens"'
            )
        vectors = vectors - vectors.mean(0)
        found, _ = balanced_kmeans(vectors, sizes(len(vectors), n), generator, cosine=True)
        labels = list(torch.split(found, [len(next(iter(batch.values()))) for batch in batches]))
    total = len(batches)
    return activations.importance(
        model, blocks, batches, labels, n, told=lambda done: told("importance", done, total)
    )


def _token_labels(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    n: int,
    generator: torch.Generator,
) -> list[list[Tensor]]:
    """For each block, the cluster of each token of each batch by its input of the block."""
    inputs = activations.inputs_of(model, blocks, batches, TOKENS)
    centres = []
    for x in inputs:
        _, found = balanced_kmeans(x, sizes(len(x), n), generator, cosine=True, rounds=10)
        centres.append(found)
    labels: list[list[Tensor]] = [[] for _ in blocks]

    def hook(position: int) -> Any:
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = torch.nn.functional.normalize(inputs[0].reshape(-1, inputs[0].shape[-1]).float())
            labels[position].append(torch.cdist(x, centres[position]).argmin(1))

        return before

    handles = [b.body.register_forward_pre_hook(hook(i)) for i, b in enumerate(blocks)]
    try:
        with torch.no_grad():
            for batch in batches:
                activations.look(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return labels


@torch.no_grad()
def dealt(
    dense: Skeleton, block: Block, position: int, options: Conversion, score: Tensor | None
) -> Split:
    """The block's hidden units dealt out by the method, with the scores that it goes by."""
    itemsize = dense.dtype(block).itemsize
    generator = torch.Generator().manual_seed(options.seed * STRIDE + position)
    method, n, residual = options.method, options.experts, options.always
    always = torch.empty(0, dtype=torch.int64)
    groups: list[Tensor]
    if method == "copy":
        groups = [torch.arange(block.width)] * n
    elif method == "random":
        groups, always = at_random(block.width, n, residual, generator)
    elif method == "contiguous":
        groups, always = contiguous(block.width, n, residual)
    elif method == "gradient":
        assert score is not None
        groups, always = dealing.deal_once(score, residual)
    elif method == "sharing-inter":
        assert score is not None
        groups, always = dealing.shared_by_most(score, residual)
    elif method == "sharing-inner":
        assert score is not None
        each = sizes(block.width, n)[0]
        if residual:
            order = score.sum(0).argsort(descending=True, stable=True)
            always = order[: residual * each]
        groups = dealing.overlapping(score, n)
    else:
        rows = score if score is not None else _rows(dense, block, method)
        cosine = method in ("kmeans-cosine", "coactivation")
        labels, _ = balanced_kmeans(
            rows, sizes(block.width, n), generator, cosine=cosine, rounds=10
        )
        parts = [(labels == e).nonzero().flatten() for e in range(n)]
        groups = parts[residual:]
        always = torch.cat(parts[:residual]) if residual else always
    return split(groups, always, itemsize=itemsize)


def _rows(dense: Skeleton, block: Block, method: str) -> Tensor:
    """The rows that stand for hidden units: of what makes them, (f, d)."""
    keys = "gate" if method == "groups" and block.kind == "gated" else "up"
    return dense.read(block, keys).float()


def _plain_gate(
    dense: Skeleton, block: Block, position: int, options: Conversion, made: Split, data: bool
) -> Tensor | None:
    """A gate that needs no data; None where the router is to keep its own."""
    kind = options.resolved_gate(data)
    if kind == "zero":
        return torch.zeros(options.routed, block.dim)
    if kind == "keys":
        keys = dense.read(block, "gate" if block.kind == "gated" else "up").float()
        rows = [keys[units[units >= 0]].mean(0) for units in made.index]
        found = torch.stack(rows)
        found = found - found.mean(0)
        # a random input of unit entries then has logits of standard deviation about 1
        size = float(found.norm(dim=1).mean())
        return found / size if size > 0 else found
    if kind == "random" and options.router == "top-k":
        generator = torch.Generator().manual_seed(options.seed * STRIDE + position + 1)
        return torch.randn(options.routed, block.dim, generator=generator) / math.sqrt(block.dim)
    return None


def unfitted(
    dense: Skeleton, block: Block, position: int, made: Split, options: Conversion, data: bool
) -> Decision:
    """The Decision whose gate and scale look at no input; data: whether texts are read anyway."""
    scale = plain_scale(options.resolved_scale(data), options)
    assert scale is not None
    gate = _plain_gate(dense, block, position, options, made, data)
    return Decision(split=made, scale=scale, gate=gate)


@torch.no_grad()
def sampled(dense: Skeleton, block: Block, made: Split, x: Tensor) -> fitting.Sample:
    """What the block's experts give on inputs x: (T, d)."""
    down = dense.read(block, "down").float()
    return fitting.sample(x, _hidden(dense, block, x), down, made)


@torch.no_grad()
def gate_of(
    dense: Skeleton,
    block: Block,
    position: int,
    found: fitting.Sample,
    made: Split,
    options: Conversion,
) -> Tensor | None:
    """The gate (E, d) that the options name; None where the router keeps its own."""
    generator = torch.Generator().manual_seed(options.seed * STRIDE + position + 2)
    kind = options.resolved_gate(True)
    if kind == "centroids":
        return fitting.centroids(found.x, options.routed, generator)
    if kind == "distilled":
        return fitting.distilled(found, options.chosen, generator)
    return _plain_gate(dense, block, position, options, made, True)


@torch.no_grad()
def scaled(
    dense: Skeleton,
    block: Block,
    found: fitting.Sample,
    made: Split,
    gate: Tensor | None,
    options: Conversion,
) -> Decision:
    """The scale and the biases that the options name, for this gate."""
    if options.method == "copy":
        return Decision(split=made, scale=1.0, gate=gate)
    x = found.x
    weights = _weigh(dense, block, options, gate)(x, gate if gate is not None else x)
    scale = plain_scale(options.resolved_scale(True), options)
    start = scale if scale is not None else fitting.calibrated(found, weights)
    bias: Tensor | None = None
    if options.compensate == "mean":
        bias = fitting.mean_biases(found, weights)
        start = scale if scale is not None else fitting.calibrated(found, weights, weights @ bias)
    elif options.compensate == "fitted":
        for _ in range(4):
            bias = fitting.fitted_biases(found, weights, start)
            if scale is None:
                start = fitting.calibrated(found, weights, weights @ bias)
        bias = fitting.fitted_biases(found, weights, start)
    return Decision(split=made, scale=start, gate=gate, bias=bias)


@torch.no_grad()
def refitted(
    dense: Skeleton, block: Block, x: Tensor, decision: Decision, options: Conversion
) -> Decision:
    """The decision with last projections fitted on inputs x: (T, d), where the options say so."""
    if not options.refit:
        return decision
    hidden, down = _hidden(dense, block, x), dense.read(block, "down").float()
    gate = decision.gate
    weights = _weigh(dense, block, options, gate)(x, gate if gate is not None else x)
    made = refit(
        hidden,
        hidden @ down.t(),
        weights,
        decision.split.index,
        decision.split.shared,
        down,
        decision.scale,
        decision.bias,
    )
    return dataclasses.replace(decision, down=made.down, always=made.always, bias=made.bias)


def _weigh(
    dense: Skeleton, block: Block, options: Conversion, gate: Tensor | None
) -> fitting.Weigh:
    """How the router weighs: softmax top-k, or whatever the named router does in evaluation."""
    if options.router == "top-k" and not options.router_options and gate is not None:
        return fitting.softmax_top_k(options.chosen)
    router: Router = (
        method_of(options).router(block.dim, router_seed(dense, block.path, options)).eval()
    )
    if gate is not None:
        router.similarity.copy_(gate)

    def weigh(x: Tensor, _gate: Tensor) -> Tensor:
        routing = router(x)
        weights: Tensor = routing.shares * routing.chosen
        return weights

    return weigh


def _hidden(dense: Skeleton, block: Block, x: Tensor) -> Tensor:
    """The dense hidden units of inputs x: (T, d) -> (T, f)."""
    names = set(dense.dense_parts(block)) - {"down", "down_bias"}
    return hidden_of(block, {name: dense.read(block, name) for name in names}, x)


def hidden_of(block: Block, parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The hidden units of a block with these parts on inputs x: (T, d) -> (T, f)."""

    def raised(part: str) -> Tensor:
        bias = parts[f"{part}_bias"].float() if f"{part}_bias" in parts else None
        return torch.nn.functional.linear(x, parts[part].float(), bias)

    up = raised("up")
    return block.act(raised("gate")) * up if block.kind == "gated" else block.act(up)


def loaded(dense: Skeleton) -> Any:
    """The dense model with its weights, in float32."""
    with quietly():
        found = type(dense.model).from_pretrained(  # type: ignore[attr-defined]
            dense.source.directory, local_files_only=True, dtype=torch.float32
        )
    return found.eval()


def _batches(
    dense: Skeleton,
    model: Any,
    options: Conversion,
    texts: Sequence[str | Path],
    batches: Batches | None,
) -> list[Batch]:
    if batches is not None:
        found = list(batches)
        if not found:
            raise RequestError("batches are empty; give at least one, or leave them out")
        return found
    if not texts:
        return written(model, options.sequences, options.length, options.seed)
    tokenizer = tokenizer_in(dense.source.directory)
    return packed(texts_of(texts), tokenizer, options.sequences, options.length)
