"""A method whose counts differ from image to image, for tests of ragged batches."""

from dataclasses import dataclass

import torch

from vlmzip.compressor import Compressor
from vlmzip.token_map import TokenMap


@dataclass(frozen=True, kw_only=True)
class Ragged(Compressor):
    """Averages neighbours in pairs, for as many pairs as the image's features say, and drops the rest."""

    def assign(self, tokens):
        size = tokens.grid.size
        count = 3 + (tokens.features[..., :4] > 0).sum((1, 2)) % (size // 2 - 3)
        place = torch.arange(tokens.features.shape[1]).expand(len(count), -1) - tokens.prefix
        return TokenMap.merge(torch.where((place >= 0) & (place < 2 * count[:, None]), place // 2, -1))
