"""The base of methods that have weights: new tokens are computed from the visual tokens, none of which is kept."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from vlmzip.compressor import Compressor, Profile
from vlmzip.errors import UserError
from vlmzip.visual_tokens import VisualTokens

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Resampler(Compressor):
    """Settings of a module that computes the LLM's tokens from the visual tokens; the weights are the façade's.

    A compressor in all that is about names, fields, budgets and saving; but no token map says what it does. Its tokens
    come from everywhere in the image, so positions are contiguous (one after another on every axis, as text has
    them), a report has counts and no map, and keeping all is no identity: it always makes as many tokens as it makes.
    It stands in the place of the model's projector, and in a chain before all others.
    """

    trained_weights = True
    default_positions = "contiguous"

    @abstractmethod
    def build(self, in_dim: int, out_dim: int) -> nn.Module:
        """The untrained module, on the CPU in float32: [batch, tokens, in_dim] to [batch, new tokens, out_dim].

        The same weights at every call, whatever the state of the global random generators, which stays as it is.
        `in_dim` is the width of the visual tokens at `site`, prefix (CLS) among them; `out_dim` the LLM's width. Parts
        of it that are transformers' models follow the façade's `gradient_checkpointing_enable`.
        """

    def __call__(self, tokens: VisualTokens) -> NoReturn:
        self.assign(tokens)

    def assign(self, tokens: VisualTokens) -> NoReturn:
        raise UserError(f"{self.name()} has no token map: each of its tokens comes from all visual tokens")

    def tokens_by_layer(self, profile: Profile) -> list[int] | None:
        count = self.token_count(profile.grid)
        return None if count is None else [count] * profile.layers

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions == "original":
            raise UserError(f"{self.name()} has contiguous positions only: its tokens have no places in the image")
