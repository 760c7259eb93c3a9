"""Write a model as a folder that vLLM loads.

Some versions of transformers save CLIP and SigLIP encoders without the level `vision_model` in the names of their
weights. vLLM looks for names with it, and transformers loads both.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from vlmzip.processor import Processor

#: A weight of an encoder without the level `vision_model`.
SHORT = re.compile(r"^((?:model\.)?vision_tower\.)(?=(?:embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)")


def write_checkpoint(model: PreTrainedModel, processor: Processor, folder: str | os.PathLike[str]) -> None:
    """Write model and processor to a folder that vLLM loads."""
    path = Path(folder)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    for file in path.glob("*.safetensors"):
        _rename_in(file)
    for index in path.glob("*.safetensors.index.json"):
        content = json.loads(index.read_text())
        content["weight_map"] = {full_name(name): file for name, file in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=2))


def _rename_in(file: Path) -> None:
    with safe_open(file, "pt") as opened:
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    renamed = {full_name(name): weight for name, weight in weights.items()}
    if renamed.keys() != weights.keys():
        save_file(renamed, file, metadata)


def full_name(name: str) -> str:
    """Return the name of a weight that vLLM looks for."""
    return SHORT.sub(r"\1vision_model.", name)
