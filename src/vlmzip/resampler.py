"""The base class of methods with weights, which compute new tokens instead of keeping visual tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.visual_tokens import Grid, VisualTokens

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Resampler(Compressor):
    """The settings of a module that computes the LLM's tokens from the visual tokens. The façade holds its weights.

    A resampler has a name, fields, a budget and a saved form like every compressor, but no token map: each of its
    tokens draws on the whole image. Therefore:

    - positions are contiguous (one after another on every axis, like those of text),
    - a report has counts and no map,
    - no setting is the identity: even a resampler that makes as many tokens as there were computes new ones.

    It replaces the model's projector, and comes first in a chain.
    """

    trained_weights = True
    default_positions = "contiguous"

    @abstractmethod
    def build(self, in_dim: int, out_dim: int) -> nn.Module:
        """Build the untrained module: [batch, tokens, in_dim] to [batch, new tokens, out_dim].

        It is on the CPU, in float32. Every call gives the same weights; it neither reads nor changes the state of the
        global random generators. `in_dim` is the width of the visual tokens at `site`, which include the prefix (CLS);
        `out_dim` is the LLM's width. Submodules that are transformers models follow the façade's
        `gradient_checkpointing_enable`.
        """

    def __call__(self, tokens: VisualTokens) -> NoReturn:
        self.assign(tokens)

    def assign(self, tokens: VisualTokens) -> NoReturn:
        raise UserError(f"{self.name()} has no token map: each of its tokens comes from all visual tokens")

    def count_at(self, layer: int | None, views: Sequence[Grid]) -> int | None:
        return self.image_count(views)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions == "original":
            raise UserError(f"{self.name()} has contiguous positions only: its tokens have no places in the image")
