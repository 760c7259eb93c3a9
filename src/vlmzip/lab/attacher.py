"""Attach a series of compressors to a model."""

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
    """A model that attaches compressors, with the fingerprints of the code and weights on which answers depend."""

    model: nn.Module
    name: str
    """The model as the user wrote it. If it was saved with a compressor, that compressor gets its trained weights."""
    _identities: dict[str, dict[str, str]] = field(default_factory=dict)

    def attach(self, compressor: Compressor) -> CompressedModel:
        """Return the model with a compressor attached. Untrained weights are the same each time."""
        with torch.random.fork_rng(), collecting_warnings():  # the warnings were shown when the methods were configured
            torch.manual_seed(0)
            return attach(self.model, compressor, weights=saved_weights(compressor, self.name))

    def identity(self, configuration: Configuration) -> dict[str, str]:
        """Return the fingerprints of the code and weights of a configuration's method, on which its answers depend."""
        if configuration.file_stem not in self._identities:
            compressed = self.attach(configuration.chosen)
            try:
                self._identities[configuration.file_stem] = of_method(compressed)
            finally:
                compressed.detach()
        return self._identities[configuration.file_stem]
