"""The model: an encoder, the mean over a text's tokens, a linear layer. Imports transformers."""

from __future__ import annotations

from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput


@final
class TextClassifier(nn.Module):
    """Follows Hugging Face's conventions for sequence classification, so that hosts can use it.

    ``encoder``: a model that gives ``last_hidden_state``, (B, S, d). The mean over real tokens is
    how all-MiniLM-L6-v2 was trained to stand for a text (Reimers and Gurevych 2019, section 3).
    """

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        config: Any = encoder.config
        self.config = config
        self.num_labels = classes
        dropout = getattr(config, "hidden_dropout_prob", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.classifier = nn.Linear(config.hidden_size, classes)
        std = getattr(config, "initializer_range", None)
        nn.init.normal_(self.classifier.weight, std=0.02 if std is None else std)
        nn.init.zeros_(self.classifier.bias)

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's table of tokens."""
        encoder: Any = self.encoder
        found: nn.Module = encoder.get_input_embeddings()
        return found

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **more: Any,
    ) -> SequenceClassifierOutput:
        """``input_ids`` and ``attention_mask`` (B, S) -> ``logits`` (B, classes).

        With ``labels`` (B,), ``loss`` is the mean cross entropy in nats. ``more`` goes to the
        encoder. Without a mask, all tokens are real.
        """
        outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **more)
        states: Tensor = outputs.last_hidden_state  # (B, S, d)
        found = self.dropout(mean(states, attention_mask)).to(self.classifier.weight.dtype)
        logits: Tensor = self.classifier(found)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def mean(states: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of ``states`` (B, S, d) over the places where ``mask`` (B, S) is 1: (B, d).

    In float32 at least: a sum over many tokens loses digits in bf16.
    """
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    if mask is None:
        return states.mean(1)
    real = mask.unsqueeze(-1).to(states.dtype)  # (B, S, 1)
    return (states * real).sum(1) / real.sum(1).clamp(min=1)
