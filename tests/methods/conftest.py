import pytest
import torch
from PIL import Image

from vlmzip import Signal, Site, mini
from vlmzip.mini.assets import shipped_assets
from vlmzip.mini.drawing import draw
from vlmzip.mini.scene import make_scene
from vlmzip.mini.splits import VALIDATION
from vlmzip.models import family_of


@pytest.fixture(scope="session")
def mini_images():
    """Return six of mini's validation images, two of each level."""
    return [Image.fromarray(draw(make_scene(seed), shipped_assets("validation"))) for seed in VALIDATION[:6]]


@pytest.fixture(scope="session")
def mini_tokens(mini_images):
    """Return the visual tokens of `mini_images`."""
    model, processor = mini.load()
    pixels = processor.image_processor(mini_images, return_tensors="pt")
    needs = frozenset({Signal.CLS_ATTENTION, Signal.KEYS, Signal.PIXELS})
    with torch.no_grad():
        (group,) = family_of(model).encode(pixels, Site.PRE_PROJECTOR, needs).groups
        return group.tokens
