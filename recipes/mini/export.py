"""Export a trained model to a folder that `AutoModelForImageTextToText` and `AutoProcessor` can load."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from recipes.mini.recipe import Shape
from recipes.mini.tokenizer import make_tokenizer

WEIGHTS = "model.safetensors"


def make_processor(shape: Shape) -> LlavaProcessor:
    """Make a processor that resizes any image to the model's size, with pixels from -1 to 1.

    It uses the PIL image processor, which does not need torchvision.
    """
    side = {"height": shape.image, "width": shape.image}
    images = CLIPImageProcessorPil(
        size=side,
        crop_size=side,
        default_to_square=True,
        do_center_crop=False,
        do_convert_rgb=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    tokenizer = make_tokenizer()
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=shape.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS, which the "default" strategy drops again
        chat_template=tokenizer.chat_template,
    )


def export(model: LlavaForConditionalGeneration, shape: Shape, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    make_processor(shape).save_pretrained(folder)
    _halve_and_rename(folder / WEIGHTS)
    _amend_config(folder / "config.json")


def _halve_and_rename(path: Path) -> None:
    """Store float16 weights, with the tower's names that serving engines expect; transformers reads both names."""
    weights = {}
    for name, weight in load_file(path).items():
        tower = "vision_tower."
        if tower in name and f"{tower}vision_model." not in name:
            name = name.replace(tower, f"{tower}vision_model.")
        weights[name] = weight.to(torch.float16).contiguous()
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)


def _amend_config(path: Path) -> None:
    """Set the config to compute in float32 (weights are stored in float16), with any attention implementation."""
    config = json.loads(path.read_text())
    for part in (config, config["vision_config"], config["text_config"]):
        part["dtype"] = "float32"
        part.pop("_attn_implementation", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
