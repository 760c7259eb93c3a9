"""One model, with one compressor after another."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from vlmzip.compressor import Compressor
from vlmzip.errors import collecting_warnings
from vlmzip.lab.configurations import Configuration
from vlmzip.runtime.attach import attach
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.fingerprint import of_method
from vlmzip.runtime.saving import saved_weights


@dataclass
class Attacher:
    """Attaches compressors to a model, and knows what their answers depend on beside their settings."""

    model: nn.Module
    name: str
    """Where the model came from; a compressor that was saved there brings its weights."""
    _identities: dict[str, dict[str, str]] = field(default_factory=dict)

    def attach(self, compressor: Compressor) -> CompressedModel:
        """Return the model with a compressor. Weights that were never trained are the same at every start."""
        with torch.random.fork_rng(), collecting_warnings():  # they were told of when the methods were configured
            torch.manual_seed(0)
            return attach(self.model, compressor, weights=saved_weights(compressor, self.name))

    def identity(self, one: Configuration) -> dict[str, str]:
        """Return what answers depend on beside the settings of a configuration: its code and its weights."""
        if one.file_stem not in self._identities:
            compressed = self.attach(one.chosen)
            try:
                self._identities[one.file_stem] = of_method(compressed)
            finally:
                compressed.detach()
        return self._identities[one.file_stem]
