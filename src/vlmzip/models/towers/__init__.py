"""Vision encoders that several families share, one kind per file."""

from __future__ import annotations

from torch import nn

from vlmzip.models.towers.qwen import QwenTower
from vlmzip.models.towers.tower import Tower


def tower_of(encoder: nn.Module) -> Tower:
    """Return the tower of a vision encoder. Encoders with a merge size get the patches of a token one after another."""
    return QwenTower(encoder) if hasattr(encoder, "spatial_merge_size") else Tower(encoder)
