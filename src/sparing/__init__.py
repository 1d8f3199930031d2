"""Sparing trains PyTorch models for less, and keeps an account of what that saved.

Names are imported when they are first used, so that ``import sparing`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparing.convert.method import Convert as Convert
    from sparing.core.clock import Clock as Clock
    from sparing.core.errors import RequestError as RequestError
    from sparing.core.errors import RunError as RunError
    from sparing.core.errors import SparingError as SparingError
    from sparing.core.ledger import Ledger as Ledger
    from sparing.core.method import Context as Context
    from sparing.core.method import Method as Method
    from sparing.core.method import Plan as Plan
    from sparing.core.method import Setup as Setup
    from sparing.experts.controller import ExpertController as ExpertController
    from sparing.experts.expert_choice import ExpertChoice as ExpertChoice
    from sparing.experts.hash import HashExperts as HashExperts
    from sparing.experts.layer import router_loss as router_loss
    from sparing.experts.moefy import moefy_ as moefy_
    from sparing.experts.noisy_top_k import NoisyTopK as NoisyTopK
    from sparing.experts.random import RandomExperts as RandomExperts
    from sparing.experts.relu import ReLURouter as ReLURouter
    from sparing.experts.sigmoid import SigmoidTopK as SigmoidTopK
    from sparing.experts.statistics import observe as observe
    from sparing.experts.statistics import statistics as statistics
    from sparing.experts.storage import save as save
    from sparing.experts.switch import Switch as Switch
    from sparing.experts.top_any import TopAny as TopAny
    from sparing.experts.top_k import TopK as TopK
    from sparing.experts.top_p import TopP as TopP
    from sparing.hosts.hf import attach as attach
    from sparing.hosts.lightning import LightningMethods as LightningMethods
    from sparing.hosts.session import Session as Session
    from sparing.loading import load as load
    from sparing.pool.growth import Growth as Growth
    from sparing.pool.training.method import GrowthSelection as GrowthSelection
    from sparing.run.compare.finished import Comparison as Comparison
    from sparing.run.compare.finished import compare as compare
    from sparing.samples import sample_losses as sample_losses
    from sparing.samples.coreset import Coreset as Coreset
    from sparing.samples.gains import GainProportional as GainProportional
    from sparing.samples.gains import TwoPhase as TwoPhase
    from sparing.samples.indexed import indexed as indexed
    from sparing.samples.infobatch import InfoBatch as InfoBatch
    from sparing.samples.mix import Mix as Mix
    from sparing.samples.mixing_sources import Sources as Sources
    from sparing.samples.quantiles import Quantiles as Quantiles
    from sparing.samples.random import RandomSamples as RandomSamples
    from sparing.samples.schedule import follow as follow
    from sparing.samples.seta import SeTa as SeTa
    from sparing.samples.ucb import UCB as UCB
    from sparing.updates.cowclip import CowClip as CowClip
    from sparing.updates.scaling import scale_rule as scale_rule
    from sparing.weights.adapters import SparseAdapter as SparseAdapter
    from sparing.weights.adapters import adapt_ as adapt_
    from sparing.weights.files import load_adapter_ as load_adapter_
    from sparing.weights.files import save_adapter as save_adapter
    from sparing.weights.peers import Peft as Peft
    from sparing.weights.peft import from_peft_ as from_peft_
    from sparing.weights.peft import to_peft as to_peft
    from sparing.weights.switching import delete_ as delete_
    from sparing.weights.switching import disabled as disabled
    from sparing.weights.switching import merge_ as merge_
    from sparing.weights.switching import switch_ as switch_
    from sparing.weights.switching import unmerge_ as unmerge_

__version__ = "0.1.0"

_HOMES = {
    "Clock": "core.clock",
    "Comparison": "run.compare.finished",
    "Context": "core.method",
    "Convert": "convert.method",
    "Coreset": "samples.coreset",
    "CowClip": "updates.cowclip",
    "ExpertChoice": "experts.expert_choice",
    "ExpertController": "experts.controller",
    "GainProportional": "samples.gains",
    "Growth": "pool.growth",
    "GrowthSelection": "pool.training.method",
    "HashExperts": "experts.hash",
    "InfoBatch": "samples.infobatch",
    "Ledger": "core.ledger",
    "LightningMethods": "hosts.lightning",
    "Method": "core.method",
    "Mix": "samples.mix",
    "NoisyTopK": "experts.noisy_top_k",
    "Peft": "weights.peers",
    "Plan": "core.method",
    "Quantiles": "samples.quantiles",
    "RandomExperts": "experts.random",
    "RandomSamples": "samples.random",
    "ReLURouter": "experts.relu",
    "RequestError": "core.errors",
    "RunError": "core.errors",
    "SeTa": "samples.seta",
    "Session": "hosts.session",
    "Setup": "core.method",
    "SigmoidTopK": "experts.sigmoid",
    "Sources": "samples.mixing_sources",
    "SparingError": "core.errors",
    "SparseAdapter": "weights.adapters",
    "Switch": "experts.switch",
    "TopAny": "experts.top_any",
    "TopK": "experts.top_k",
    "TopP": "experts.top_p",
    "TwoPhase": "samples.gains",
    "UCB": "samples.ucb",
    "adapt_": "weights.adapters",
    "attach": "hosts.hf",
    "compare": "run.compare.finished",
    "delete_": "weights.switching",
    "disabled": "weights.switching",
    "follow": "samples.schedule",
    "from_peft_": "weights.peft",
    "indexed": "samples.indexed",
    "load": "loading",
    "load_adapter_": "weights.files",
    "merge_": "weights.switching",
    "moefy_": "experts.moefy",
    "observe": "experts.statistics",
    "router_loss": "experts.layer",
    "sample_losses": "samples",
    "save": "experts.storage",
    "save_adapter": "weights.files",
    "scale_rule": "updates.scaling",
    "statistics": "experts.statistics",
    "switch_": "weights.switching",
    "to_peft": "weights.peft",
    "unmerge_": "weights.switching",
}

__all__ = [
    "UCB",
    "Clock",
    "Comparison",
    "Context",
    "Convert",
    "Coreset",
    "CowClip",
    "ExpertChoice",
    "ExpertController",
    "GainProportional",
    "Growth",
    "GrowthSelection",
    "HashExperts",
    "InfoBatch",
    "Ledger",
    "LightningMethods",
    "Method",
    "Mix",
    "NoisyTopK",
    "Peft",
    "Plan",
    "Quantiles",
    "RandomExperts",
    "RandomSamples",
    "ReLURouter",
    "RequestError",
    "RunError",
    "SeTa",
    "Session",
    "Setup",
    "SigmoidTopK",
    "Sources",
    "SparingError",
    "SparseAdapter",
    "Switch",
    "TopAny",
    "TopK",
    "TopP",
    "TwoPhase",
    "__version__",
    "adapt_",
    "attach",
    "compare",
    "delete_",
    "disabled",
    "follow",
    "from_peft_",
    "indexed",
    "load",
    "load_adapter_",
    "merge_",
    "moefy_",
    "observe",
    "router_loss",
    "sample_losses",
    "save",
    "save_adapter",
    "scale_rule",
    "statistics",
    "switch_",
    "to_peft",
    "unmerge_",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f'module "sparing" has no attribute "{name}"')
    value = getattr(importlib.import_module(f"sparing.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))
