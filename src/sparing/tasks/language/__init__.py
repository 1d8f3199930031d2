"""Byte-level language modelling on three real domains: Shakespeare, GSM8K, Python's library."""

from sparing.tasks.language.language import Language
from sparing.tasks.language.options import LanguageOptions

__all__ = ["Language", "LanguageOptions"]
