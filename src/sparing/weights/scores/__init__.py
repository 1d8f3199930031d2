"""Scores of parameters before training: the higher, the more a mask should keep an entry.

Each is a function ``(model, named, batches, loss, *, ...) -> {name: scores}``; those in
``DATA_FREE`` need no data: of a batch SynFlow uses the shapes only, the others ignore it.

With several ranks all of them call the function together, each with its own batches: gradients are
summed over them, so that every rank gets the scores of all data and makes the same masks.
"""

from sparing.weights.scores.data_free import magnitude as magnitude
from sparing.weights.scores.data_free import random as random
from sparing.weights.scores.fisher import fisher as fisher
from sparing.weights.scores.grasp import grasp as grasp
from sparing.weights.scores.snip import iterative_snip as iterative_snip
from sparing.weights.scores.snip import snip as snip
from sparing.weights.scores.synflow import synflow as synflow

DATA_FREE = ("random", "magnitude", "synflow")
