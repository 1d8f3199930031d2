"""Which samples enter the epoch: scores, policies, plans, and the losses per sample they need."""

from sparing.samples import sample_losses as sample_losses
