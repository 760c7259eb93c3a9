"""LLaVA-1.5 before its training: an LLM and an encoder put together, with a projector of random weights.

    python -m recipes.llava_untrained --llm lmsys/vicuna-7b-v1.5 --encoder openai/clip-vit-large-patch14-336 \\
        --like llava-hf/llava-1.5-7b-hf --out models/vicuna-7b-clip-336

From `--like` come configuration, tokenizer, image sizes and chat template, and none of the weights. Its vocabulary
may be larger than the LLM's, by <image> for one: rows of the LLM's embedding that nobody has trained are random, too.
The 7B model needs about 45 GB of main memory.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel

#: The embedding, and what the output head alone calls its weights.
OF_WORDS = ("embed_tokens.weight", "weight")


def put_together(llm: str, encoder: str, like: str, out: Path) -> None:
    """Raises OSError for a checkpoint that cannot be found, ValueError for parts that do not fit."""
    processor = AutoProcessor.from_pretrained(like)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(like), dtype=torch.float32)
    language = whole(AutoModelForCausalLM, llm)
    take(model.model.language_model, language.model.state_dict())
    take(model.lm_head, language.lm_head.state_dict())
    take(model.model.vision_tower, whole(CLIPVisionModel, encoder).state_dict())
    model.save_pretrained(out)
    processor.save_pretrained(out)


def whole(kind: Any, source: str) -> Any:
    """A model none of whose weights is missing, for which transformers would take random ones."""
    model, about = kind.from_pretrained(source, output_loading_info=True)
    if about["missing_keys"]:
        raise ValueError(f"{source} has no weights for a {type(model).__name__}, such as {min(about['missing_keys'])}")
    return model


def take(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies weights, of which those with a row for each word of the vocabulary may have fewer rows."""
    own = module.state_dict()
    if own.keys() != weights.keys():
        raise ValueError(f"weights do not fit, such as {min(own.keys() ^ weights.keys())}")
    for name, value in weights.items():
        rows = own[name][: len(value)] if name in OF_WORDS else own[name]
        if rows.shape != value.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, which does not fit into {tuple(own[name].shape)}")
        rows.copy_(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True, help="a Llama, such as Vicuna: hub id or folder")
    parser.add_argument("--encoder", required=True, help="a CLIP")
    parser.add_argument("--like", required=True, help="a LLaVA of that shape")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.out.exists():
        parser.error(f"--out {str(given.out)!r} exists already")
    try:
        put_together(given.llm, given.encoder, given.like, given.out)
    except (OSError, ValueError, AttributeError) as error:
        parser.error(" ".join(str(error).split())[:300])
    print(f"the untrained model is in {given.out}")


if __name__ == "__main__":
    main()
