"""Photos that the drawings contain: Fashion-MNIST items and crops of public-domain photos.

The validation and test splits and the examples only need a few hundred small crops, shipped in `assets/crops.npz`.
Training uses other images, which vlmzip's repository reads from their sources (`recipes/mini/sources.py`).
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from vlmzip.mini.words import ITEMS

SHIPPED = Path(__file__).parent / "assets" / "crops.npz"


@dataclass(frozen=True)
class Assets:
    """Crops of photos for backgrounds and items."""

    grounds: np.ndarray  # uint8 [n 96 96 3]
    items: dict[str, np.ndarray]  # uint8 [m 28 28] for each item

    def item(self, name: str, look: int) -> np.ndarray:
        crops = self.items[name]
        return crops[look % len(crops)]


@cache
def shipped_assets(part: str) -> Assets:
    """Return the crops of the "validation" or "test" split."""
    with np.load(SHIPPED) as crops:
        return Assets(crops[f"{part}_grounds"], {name: crops[f"{part}_{name}"] for name in ITEMS})
