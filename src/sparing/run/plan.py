"""What a recipe would do and cost, without training anything."""

from __future__ import annotations

from typing import Any

import torch

from sparing.core import flops
from sparing.core.ledger import human
from sparing.core.method import Setup, arrange, implements
from sparing.run.recipe import Recipe
from sparing.run.runner import check_extras, planned_steps


def plan(recipe: Recipe) -> dict[str, Any]:
    """Build the recipe's model and methods, count one batch, and multiply.

    Returns plain data: ``steps``, ``tokens``, ``parameters``, ``methods`` {name: lines},
    ``flops`` {spent, dense}. Loads the task's data; nothing is written.
    """
    check_extras(recipe)
    task = recipe.build_task()
    task.prepare(recipe.seed)
    train = recipe.train
    model = task.model(recipe.seed)
    methods = arrange(recipe.build_methods())
    length = len(task.order(0, torch.Generator().manual_seed(recipe.seed)))
    by_epochs = None
    if train.epochs is not None:
        by_epochs = train.epochs * -(-length // (train.batch_size * train.accumulate))
    budgets = [n for n in (planned_steps(recipe, task), by_epochs) if n is not None]
    steps = min(budgets)
    shuffled = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(recipe.seed))
    order = torch.split(shuffled, train.batch_size)
    setup = Setup(
        seed=recipe.seed,
        steps=steps,
        batches=lambda: map(task.train.batch, order),
        read=task.train.batch,
        domain_of=task.domain_of,
        domains=task.domains,
        loss=lambda model, batch: task.losses(model, batch)[0].mean(),
    )
    for method in methods:
        model = method.prepare(model, setup)
        method.bind(size=len(task.train), epochs=train.epochs, steps=steps, model=model)
    batch = task.train.batch(torch.arange(min(train.batch_size, len(task.train))))
    once = flops.count(model, lambda: task.losses(model, batch)[0].mean())
    samples = steps * train.batch_size * train.accumulate
    if train.epochs is not None:  # the last batch of an epoch may be smaller
        samples = min(samples, train.epochs * length)
    tokens = samples * task.tokens_per_sample
    spent = dense = once.total * steps * train.accumulate
    for method in methods:
        more = method.estimate(tokens)
        spent, dense = spent + more[0], dense + more[1]
    return {
        "recipe": recipe.name,
        "about": recipe.about,
        "task": task.name,
        "domains": list(task.domains),
        "samples": len(task.train),
        "corpus": task.fingerprint,
        "steps": steps,
        "samples_per_step": train.batch_size * train.accumulate,
        "tokens": tokens,
        "epochs": samples / length,
        "at_most": any(implements(method, "order") for method in methods),
        "unit": "samples" if task.tokens_per_sample == 1 else "tokens",
        "parameters": sum(p.numel() for p in model.parameters()),
        "methods": {method.name: method.touches() for method in methods},
        "flops": {"spent": spent, "dense": dense},
    }


def lines(planned: dict[str, Any]) -> list[str]:
    """The plan as people read it."""
    spent, dense = planned["flops"]["spent"], planned["flops"]["dense"]
    most = "at most " if planned["at_most"] else ""
    told = [
        f"{planned['recipe']}: {planned['about']}",
        f"data        {', '.join(planned['domains'])}: {planned['samples']:,} samples "
        f"({planned['corpus'][:12]})",
        f"budget      {most}{planned['tokens']:,} {planned['unit']} in {planned['steps']:,} steps, "
        f"{planned['epochs']:.2f} epochs{', less what a method leaves out' if most else ''}",
        f"model       {planned['parameters']:,} parameters",
    ]
    for name, touched in planned["methods"].items():
        told.append(f"{name:<11} {touched[0] if touched else 'changes nothing in the model'}")
        told += [f"{'':<11} {line}" for line in touched[1:]]
    told.append(
        f"compute     about {human(spent, 'flops')} of {human(dense, 'flops')} dense "
        f"({spent / dense:.0%}), forward and backward{', if nothing is left out' if most else ''}"
    )
    if "seconds" in planned:
        total = planned["seconds"]["total"]
        told.append(
            f"time        about {total / 60:.1f} minutes here, by {planned['seconds']['step']:.3f} "
            "s a step as just timed"
        )
    return told
