"""The ways to compute a layer of experts, one interface, chosen by device, dtype and load."""

from sparing.experts.backends.choice import choose_backend

__all__ = ["choose_backend"]
