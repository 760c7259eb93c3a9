"""Q-Former: a few learned queries read the visual tokens by cross-attention."""

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

#: Spread of the initial weights and queries, BERT's and BLIP-2's.
INITIAL_SPREAD = 0.02


@dataclass(frozen=True, kw_only=True)
class QFormer(Resampler):
    """Let learned queries read the visual tokens, and give the LLM what they have read. Has to be trained.

    Li et al., ICML 2023 (arXiv:2301.12597, section 3.1): self-attention among the queries, cross-attention to the
    encoder's features (CLS among them) in every `cross_every`-th layer, feed-forward; then one linear layer to the
    LLM's width in the place of the model's projector. The baseline of LLaVolta (arXiv:2406.20092, Table 4), which
    gives 105 M parameters and 1024 tokens over 32 layers: 32 queries. The module is transformers' `Blip2QFormerModel`:
    at the defaults, which are BERT-base's, 105.1 M parameters for BLIP-2's features (width 1408), and 104.8 M with
    queries and last layer for LLaVA-1.5 (1024 to 4096).

    Differences from the authors' code: no dropout; weights are drawn from `seed`, not taken from BERT; no text goes
    through it.
    """

    paper = "arXiv:2301.12597"
    examples = ("queries=64",)
    budget_fields = ("queries",)

    queries: Count = 32
    """Learned queries: the tokens that the LLM gets of each image, or of each of its views, whatever its size."""
    depth: Count = 12
    """Layers of the Q-Former."""
    width: Count = 768
    """Width of the queries; the feed-forward layers are four times as wide."""
    heads: Count = 12
    """Attention heads."""
    cross_every: Count = 2
    """Every how many layers, from the first, the queries attend to the visual tokens."""
    seed: Seed = 0
    """Seed of the initial weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise UserError(f"width={self.width} is no multiple of heads={self.heads}")

    def token_count(self, grid: Grid) -> int:
        return self.queries

    def at_budget(self, keep: Keep, profile: Profile) -> tuple[QFormer, float]:
        queries = count_to_keep(keep, profile.size) // len(profile.grids)
        chosen = dataclasses.replace(self, queries=max(queries, 1))
        return chosen, chosen.reached(profile)

    def build(self, in_dim: int, out_dim: int) -> QFormerModule:
        with torch.device("meta"):  # the constructors would draw from the global generator, for nothing
            module = QFormerModule(self, in_dim, out_dim)
        module.to_empty(device="cpu")
        module.initialise(torch.Generator().manual_seed(self.seed))
        return module


class QFormerModule(nn.Module):
    """The weights of a Q-Former."""

    def __init__(self, settings: QFormer, in_dim: int, out_dim: int) -> None:
        from transformers import Blip2QFormerConfig, Blip2QFormerModel  # slow, and few need it

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
        """Normal weights, zero biases, norms that change nothing."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, INITIAL_SPREAD, generator=generator)
            else:
                parameter.fill_(1.0 if name.lower().endswith("layernorm.weight") else 0.0)

    def forward(self, features: Float[Tensor, "batch tokens in_dim"]) -> Float[Tensor, "batch queries out_dim"]:
        queries = self.queries.expand(len(features), -1, -1)
        read = self.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        tokens: Tensor = self.to_llm(read)
        return tokens.to(features.dtype)  # its weights may be kept wider than the model's
