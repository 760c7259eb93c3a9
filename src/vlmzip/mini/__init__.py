"""mini: a small but real LLaVA that comes with the package, and the image questions it was trained on.

`words`, `scene`, `assets` and `drawing` make the images, `questions` and `splits` make the questions, and `weights/`
has the model. The training code is in the repository's `recipes/mini/`, which is not part of the package.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor


def weights_folder() -> Path:
    """Return the folder of mini's weights, for `AutoModelForImageTextToText` and `AutoProcessor`."""
    return Path(__file__).parent / "weights"


def load(dtype: "torch.dtype | None" = None) -> "tuple[LlavaForConditionalGeneration, LlavaProcessor]":
    """Load mini and its processor, by default in float32."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = weights_folder()
    model = AutoModelForImageTextToText.from_pretrained(folder, **({} if dtype is None else {"dtype": dtype}))
    return model.eval(), AutoProcessor.from_pretrained(folder)
