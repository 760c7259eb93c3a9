"""Make an untrained LLaVA-1.5: a pretrained LLM and vision encoder with a randomly initialized projector.

    python -m recipes.llava_untrained --llm lmsys/vicuna-7b-v1.5 --encoder openai/clip-vit-large-patch14-336 \\
        --like llava-hf/llava-1.5-7b-hf --out models/vicuna-7b-clip-336

`--like` gives configuration, tokenizer, image sizes and chat template, but no weights. Its vocabulary can be larger
than the LLM's, for example by <image>; the embedding rows of such words are random. The 7B model needs about 45 GB of
main memory.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel

#: Weights with a row for each word: the embedding's, and the output head's in its own state dict.
OF_WORDS = ("embed_tokens.weight", "weight")


def put_together(llm: str, encoder: str, like: str, out: Path) -> None:
    """Write the model and processor. Raise OSError for a missing checkpoint, ValueError for parts that do not fit."""
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
    """Load a model. Raise ValueError if weights are missing; transformers would initialize them randomly."""
    model, about = kind.from_pretrained(source, output_loading_info=True)
    if about["missing_keys"]:
        raise ValueError(f"{source} has no weights for a {type(model).__name__}, such as {min(about['missing_keys'])}")
    return model


def take(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a module. Weights with a row for each word of the vocabulary may have fewer rows."""
    state = module.state_dict()
    if state.keys() != weights.keys():
        raise ValueError(f"weights do not fit, such as {min(state.keys() ^ weights.keys())}")
    for name, value in weights.items():
        rows = state[name][: len(value)] if name in OF_WORDS else state[name]
        if rows.shape != value.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, which does not fit {tuple(state[name].shape)}")
        rows.copy_(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True, help="a Llama, such as Vicuna: hub id or folder")
    parser.add_argument("--encoder", required=True, help="a CLIP")
    parser.add_argument("--like", required=True, help="a LLaVA of that shape")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out {str(args.out)!r} exists already")
    try:
        put_together(args.llm, args.encoder, args.like, args.out)
    except (OSError, ValueError, AttributeError) as error:
        parser.error(" ".join(str(error).split())[:300])
    print(f"the untrained model is in {args.out}")


if __name__ == "__main__":
    main()
