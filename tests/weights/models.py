"""Tiny models of the families that adapters know, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def seeded(build: Any, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().eval()


def mlp(seed: int = 0) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), seed)


def bert(seed: int = 0, **changes: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, **changes,
    )  # fmt: skip
    return seeded(lambda: BertForSequenceClassification(config), seed)


def roberta(seed: int = 0) -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=40,
    )  # fmt: skip
    return seeded(lambda: RobertaForSequenceClassification(config), seed)


def distilbert(seed: int = 0) -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=48, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=32
    )
    return seeded(lambda: DistilBertForSequenceClassification(config), seed)


def gpt2(seed: int = 0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return seeded(lambda: GPT2LMHeadModel(config), seed)


def llama(seed: int = 0, **changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        initializer_range=0.1, **changes,
    )  # fmt: skip
    return seeded(lambda: LlamaForCausalLM(config), seed)


def qwen(seed: int = 0) -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return seeded(lambda: Qwen2ForCausalLM(config), seed)


def mistral(seed: int = 0) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return seeded(lambda: MistralForCausalLM(config), seed)


def vit(seed: int = 0) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_labels=3,
    )  # fmt: skip
    return seeded(lambda: ViTForImageClassification(config), seed)


CLASSIFIERS = {"bert": bert, "roberta": roberta, "distilbert": distilbert}
FAMILIES = {
    **CLASSIFIERS, "gpt2": gpt2, "llama": llama, "qwen": qwen, "mistral": mistral, "vit": vit
}  # fmt: skip
KINDS = ("lora", "houlsby", "pfeiffer", "parallel", "prefix", "mam")
SMALL: dict[str, Any] = {"width": 4, "length": 3, "rank": 4}


def batch(model: nn.Module, seed: int = 0, rows: int = 4) -> dict[str, Tensor]:
    """Inputs with labels that the model gives a loss for."""
    generator = torch.Generator().manual_seed(seed)
    name = type(model).__name__
    if name.startswith("ViT"):
        pixels = torch.randn(rows, 3, 8, 8, generator=generator)
        return {"pixel_values": pixels, "labels": torch.arange(rows) % 3}
    ids = torch.randint(2, 48, (rows, 9), generator=generator)
    labels = ids if name.endswith("LMHeadModel") or name.endswith("CausalLM") else None
    return {"input_ids": ids, "labels": torch.arange(rows) % 2 if labels is None else labels}


def logits(model: nn.Module, seed: int = 5) -> Tensor:
    with torch.no_grad():
        return model(**batch(model, seed)).logits


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train_(model: nn.Module, steps: int = 5, rate: float = 0.05) -> nn.Module:
    """Some steps of AdamW with weight decay on what requires a gradient."""
    optimizer = torch.optim.AdamW(trained(model).values(), lr=rate, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(**batch(model, step)).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return model
