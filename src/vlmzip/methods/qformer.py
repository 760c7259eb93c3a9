"""Q-Former: a few learned queries attend to the visual tokens and replace them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlmzip.compressor import Profile
from vlmzip.errors import UserError
from vlmzip.keep import Keep, count_to_keep
from vlmzip.resampler import Resampler
from vlmzip.schema import Count, Seed
from vlmzip.visual_tokens import Grid

#: Standard deviation of the initial weights and queries, as in BERT and BLIP-2.
INITIAL_SPREAD = 0.02


@dataclass(frozen=True, kw_only=True)
class QFormer(Resampler):
    """Replace the visual tokens with learned queries that attend to them. It must be trained before use.

    Li et al., ICML 2023 (arXiv:2301.12597), section 3.1. Each layer has self-attention among the queries and a
    feed-forward network. Every `cross_every`-th layer also has cross-attention to the encoder's features, including
    CLS. A linear layer then maps the queries to the LLM's width; it replaces the model's projector.

    LLaVolta uses a Q-Former as a baseline (arXiv:2406.20092, Table 4) with 105 M parameters and 1024 tokens over 32
    layers, which means 32 queries. The module here is `Blip2QFormerModel` of transformers with BERT-base's dimensions.
    It has 105.1 M parameters for BLIP-2's features (width 1408). For LLaVA-1.5 (1024 to 4096) it has 104.8 M, including
    the queries and the linear layer.

    Differences from the authors' code: there is no dropout, the initial weights are drawn from `seed` instead of copied
    from BERT, and no text passes through the module.

    When it fails: without training, and with little training: trained on mini as briefly as `llavolta`, it scores 27
    points less (docs/training_claims.md).
    """

    paper = "arXiv:2301.12597"
    kind = "merge"
    cost = "N·k"
    examples = ("queries=64",)
    budget_fields = ("queries",)

    queries: Count = 32
    """Learned queries: the number of tokens that the LLM gets for each image, or each view, whatever its size."""
    depth: Count = 12
    """Layers of the Q-Former."""
    width: Count = 768
    """Width of the queries; the feed-forward layers are four times as wide."""
    heads: Count = 12
    """Attention heads."""
    cross_every: Count = 2
    """Cross-attention period: the first layer and every `cross_every`-th layer after it attend to the visual tokens."""
    seed: Seed = 0
    """Seed of the initial weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise UserError(f"width must be a multiple of heads={self.heads}, got {self.width}")

    def token_count(self, grid: Grid) -> int:
        return self.queries

    def at_budget(self, keep: Keep, profile: Profile) -> tuple[QFormer, float]:
        queries = count_to_keep(keep, profile.size) // len(profile.grids)
        chosen = dataclasses.replace(self, queries=max(queries, 1))
        return chosen, chosen.reached(profile)

    def build(self, in_dim: int, out_dim: int) -> QFormerModule:
        with torch.device("meta"):  # constructors must not draw random numbers from the global generator
            module = QFormerModule(self, in_dim, out_dim)
        module.to_empty(device="cpu")
        module.initialise(torch.Generator().manual_seed(self.seed))
        return module


class QFormerModule(nn.Module):
    """The module of a Q-Former: queries, transformer layers and the linear layer to the LLM's width."""

    def __init__(self, settings: QFormer, in_dim: int, out_dim: int) -> None:
        from transformers import Blip2QFormerConfig, Blip2QFormerModel  # a slow import that other methods do not need

        super().__init__()
        self.queries = nn.Parameter(torch.empty(settings.queries, settings.width))
        self.qformer: nn.Module = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=settings.width,
                num_hidden_layers=settings.depth,
                num_attention_heads=settings.heads,
                intermediate_size=4 * settings.width,
                cross_attention_frequency=settings.cross_every,
                encoder_hidden_size=in_dim,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )
        self.to_llm = nn.Linear(settings.width, out_dim)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw normal weights, and set biases to 0 and layer-norm weights to 1."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, INITIAL_SPREAD, generator=generator)
            else:
                parameter.fill_(1.0 if name.lower().endswith("layernorm.weight") else 0.0)

    def forward(self, features: Float[Tensor, "batch tokens in_dim"]) -> Float[Tensor, "batch queries out_dim"]:
        queries = self.queries.expand(len(features), -1, -1)
        hidden = self.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        tokens: Tensor = self.to_llm(hidden)
        return tokens.to(features.dtype)  # these weights can have a higher precision than the model's
