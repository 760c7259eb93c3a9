"""VCC: each LLM layer sees most blocks of visual tokens as one coarse token each, and restores all tokens after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from jaxtyping import Int

from vlmzip.compressor import NEAR, Compressor, Profile
from vlmzip.keep import Keep, count_to_keep
from vlmzip.token_map import TokenMap, highest
from vlmzip.visual_tokens import Grid, Signal, Site, VisualTokens

#: The authors add this to a block's size before they divide by it.
EPSILON = 1e-4


@dataclass(frozen=True, kw_only=True)
class VCC(Compressor):
    """Show each layer one coarse token for most blocks of visual tokens, and restore all tokens after the layer.

    Zeng et al., NeurIPS 2023 (arXiv:2305.04241), VIP-token centric compression, in the layers of a causal LLM. LLaVolta
    (arXiv:2406.20092, Table 3) compares with it. In every layer from K on:

    1. Blocks of b neighbouring visual tokens have a coarse token each: c = sum of the tokens / (b + 1e-4).
    2. A block's score is the attention of the question's tokens (the VIP tokens) to c in this layer, with the layer's
       own norm, queries, keys and positions: softmax over the coarse tokens alone, mean over heads and questions.
    3. The h blocks with the highest scores stay fine, as b tokens. Of equal scores, the first blocks win.
    4. The layer sees the fine tokens, the coarse tokens of the other blocks, and the text. A coarse token gets log b
       more on its attention logits, because it stands for b tokens.
    5. A fine token becomes its output. The tokens of a coarse block all get the change of their coarse token:
       x + (c' - c). So nothing is lost between layers; each layer selects again.

    b = 16 and h = 3 give LLaVolta's 3,582 tokens in LLaVA-1.5-7B, with K = 2: 2 x 576 + 30 x 81. The paper's own
    experiments use b = 16, too.

    **Our reading.** The authors compress the layers of bidirectional encoders. LLaVolta published no code for this
    baseline and does not say how it made VCC causal, nor b, h and K; other values fit 3,582, too. Here VIP tokens are
    the text between the image and its answer, so that no answer chooses what its own prompt keeps. A coarse token has
    the position of its block's middle token, index (b - 1) // 2, and sees what that token would see. The KV cache of a
    layer holds what the layer saw.

    Differences from the authors' code:

    - The tokens after the last whole block stay fine; theirs are padded to a block. An image with fewer tokens than b
      stays whole.
    - A coarse token gets log b on its logits and other tokens nothing; theirs get log(b + 1e-4) and log(1 + 1e-4). The
      logits differ by less than 1e-4.
    - h counts blocks of each image or video of a prompt. Tokens outside the grids (newlines, CLS beside a single grid)
      skip these layers, unless all blocks are fine.
    - Their training tricks are left out: random blocks with probability 0.1, and factors that pass gradients to the
      scores.

    **Budgets.** `at_budget` changes h and b. It only takes a b that leaves at most as many tokens after the last block
    as there are blocks; other pairs would reach a small budget with the image's last tokens alone. Of the pairs within
    5 % of the budget it takes those with h > 0 first, then those with the b that is set, then the nearest. If no pair
    is within 5 %, it takes the nearest.

    No other method can act inside the LLM beside it. It needs SDPA or eager attention: FlashAttention cannot add to
    logits. The tiles of an image and the frames of a video are one sequence: blocks run on from one to the next.

    When it fails: on details inside a coarse block, because no layer from K on sees its tokens one by one. It also
    saves less time than dropping tokens, because every layer scores, gathers and restores all of them.
    """

    paper = "arXiv:2305.04241"
    kind = "pool"
    cost = "N"
    examples = ("block=16,fine=3", "block=4,fine=2,layer=1")
    needs = frozenset({Signal.CANDIDATE_ATTENTION})
    sites = (Site.IN_LLM,)
    budget_fields = ("block", "fine")
    label_fields = ("block", "fine")
    restores = True

    site: Site = Site.IN_LLM
    block: Annotated[int, Ge(1)] = 16
    """b, the number of neighbouring visual tokens, in raster order, that one coarse token stands for."""
    fine: Annotated[int, Ge(0)] = 3
    """h, the number of blocks of an image that a layer sees token by token."""
    layer: Annotated[int, Ge(0)] = 2
    """K, the first layer that sees fewer tokens, 0-based; all later layers do, too."""

    # --- how many ---------------------------------------------------------------------------------------------

    def token_count(self, grid: Grid) -> int:
        return _count(grid.size, self.block, self.fine)

    def at_budget(self, keep: Keep, profile: Profile) -> tuple[Compressor, float]:
        """Return the configuration near an average budget that the class docstring describes."""
        method = self.placed(profile)
        method.check_layers(profile.layers, profile.first_layer)
        chosen = method._nearest(method._count_inside(keep, profile), profile)
        return chosen, chosen.reached(profile)

    def at_keep(self, keep: Keep, profile: Profile) -> tuple[Compressor, float]:
        """Return the configuration with which layers see near to `keep` tokens, as the class docstring describes."""
        method = self.placed(profile)
        method.check_layers(profile.layers, profile.first_layer)
        chosen = method._nearest(count_to_keep(keep, profile.size), profile)
        return chosen, chosen.left(profile)

    def _nearest(self, target: int, profile: Profile) -> VCC:
        """Return the configuration whose layers see near to `target` tokens of an image."""
        size = profile.size

        def order(pair: tuple[int, int]) -> tuple[int, bool, bool, int]:
            block, fine = pair
            miss = abs(_count(size, block, fine) - target)
            far = miss if miss > NEAR * target else 0
            return far, fine == 0, block != self.block, miss

        pairs = []
        for block in range(2, size + 1):
            if size % block > size // block:
                continue  # more tokens after the last block than blocks
            # As many fine blocks as fit, or one more, or none.
            fits = (target - _count(size, block, 0)) // (block - 1)
            pairs += [(block, min(max(fine, 0), size // block)) for fine in (0, fits, fits + 1)]
        block, fine = min(pairs, key=order, default=(self.block, self.fine))
        return self.with_fields(block=block, fine=fine)

    # --- which tokens ------------------------------------------------------------------------------------------------

    def candidates(self, tokens: VisualTokens) -> TokenMap:
        """Return the map to the coarse tokens of all whole blocks."""
        block = self._blocks(tokens)
        weight = (block >= 0) / (self.block + EPSILON)
        return TokenMap.merge(block, weight).after_dropping(tokens.prefix)

    def assign(self, tokens: VisualTokens) -> TokenMap:
        block = self._blocks(tokens)
        asks = tokens.query_mask[..., None]
        score = (tokens.candidate_attention.float() * asks).sum(1) / asks.sum(1)
        fine = highest(score, min(self.fine, score.shape[1]))
        # Number the output tokens: every token of a fine block or after the last block, and the first of other blocks.
        whole = (block < 0) | fine.gather(1, block.clamp(min=0))
        first = torch.arange(block.shape[1], device=block.device) % self.block == 0
        group = (whole | first).cumsum(1) - 1
        weight = torch.where(whole, 1.0, 1 / (self.block + EPSILON))
        return TokenMap.merge(group, weight).after_dropping(tokens.prefix)

    def _blocks(self, tokens: VisualTokens) -> Int[torch.Tensor, "batch tokens"]:
        """Return the block of each token of the grid; -1 for tokens after the last whole block."""
        batch, count, _ = tokens.features.shape
        number = torch.arange(count - tokens.prefix, device=tokens.features.device) // self.block
        return torch.where(number < len(number) // self.block, number, -1).expand(batch, -1)


def _count(size: int, block: int, fine: int) -> int:
    """Return the number of tokens of an image of `size` tokens that a layer sees."""
    blocks = size // block
    return size - (blocks - min(fine, blocks)) * (block - 1)
