"""mini: a small real LLaVA that comes with the package, and the image questions it was trained on.

Its parts, along the way of the data: `words`, `scene`, `drawing` and `assets` make images, `questions` and `splits`
ask about them, `model` and `tokenizer` are the model, `encoder`, `instruct` and `train` teach it, `export` writes it,
`evaluate` measures it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor


def weights_folder() -> Path:
    """The folder of mini's weights, for `AutoModelForImageTextToText` and `AutoProcessor`."""
    return Path(__file__).parent / "weights"


def load(dtype: "torch.dtype | None" = None) -> "tuple[LlavaForConditionalGeneration, LlavaProcessor]":
    """mini and its processor, in 32 bits unless told otherwise."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = weights_folder()
    model = AutoModelForImageTextToText.from_pretrained(folder, **({} if dtype is None else {"dtype": dtype}))
    return model.eval(), AutoProcessor.from_pretrained(folder)
