"""Tiny checkpoints in the layout in which Mini-Gemini, CLIP and OpenCLIP are published, with random weights."""

import json

import torch
from safetensors.torch import load_file, save_file  # noqa: F401 (tests change files with them)
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.tiny import LLM, SIDE, VIT

WIDTHS, DEPTHS = (8, 12, 16, 20), (1, 1, 2, 1)
#: Candidates per side of each patch's window.
WINDOW = 4
#: The side of the images that the second encoder sees: 4 pixels for each candidate.
AUX_SIDE = SIDE // VIT["patch_size"] * WINDOW * 4


def random(rng, *shape):
    return torch.randn(*shape, generator=rng) * 0.3


def linear(rng, name, rows, *cols):
    return {f"{name}.weight": random(rng, rows, *cols), f"{name}.bias": random(rng, rows)}


def norm(rng, name, width):
    return {f"{name}.weight": 1 + random(rng, width), f"{name}.bias": random(rng, width)}


def trunk(seed=0):
    """The weights of a ConvNeXt with timm's names."""
    rng = torch.Generator().manual_seed(seed)
    weights = linear(rng, "stem.0", WIDTHS[0], 3, 4, 4) | norm(rng, "stem.1", WIDTHS[0])
    for stage, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
        if stage:
            down = f"stages.{stage}.downsample"
            weights |= norm(rng, f"{down}.0", WIDTHS[stage - 1])
            weights |= linear(rng, f"{down}.1", width, WIDTHS[stage - 1], 2, 2)
        for block in (f"stages.{stage}.blocks.{number}" for number in range(depth)):
            weights[f"{block}.gamma"] = random(rng, width)
            weights |= linear(rng, f"{block}.conv_dw", width, 1, 7, 7) | norm(rng, f"{block}.norm", width)
            weights |= linear(rng, f"{block}.mlp.fc1", 4 * width, width)
            weights |= linear(rng, f"{block}.mlp.fc2", width, 4 * width)
    return weights


def modules(llm_dim, seed=0):
    """The weights of the authors' modules beside LLM and encoders."""
    rng = torch.Generator().manual_seed(seed)
    dim, weights = VIT["hidden_size"], {}
    for name, width in (("query", dim), ("aux", sum(WIDTHS)), ("val", sum(WIDTHS))):
        full = f"vlm_uni_{name}_projector"
        weights |= norm(rng, f"{full}.0", width) | linear(rng, f"{full}.1", dim, width)
    return weights | linear(rng, "mm_projector.0", llm_dim, dim) | linear(rng, "mm_projector.2", llm_dim, llm_dim)


def clip(seed=0):
    torch.manual_seed(seed)
    model = CLIPVisionModel(CLIPVisionConfig(**VIT)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def patches(model, views):
    """CLIP's patches of views, by `hidden_states`."""
    with torch.no_grad():
        return model(views, output_hidden_states=True).hidden_states[-2][:, 1:]


# --- whole checkpoints ----------------------------------------------------------------------------------------------

LLMS = {"Llama": (LlamaConfig, LlamaForCausalLM), "Gemma": (GemmaConfig, GemmaForCausalLM)}
#: What the authors' config.json has beside the LLM's fields.
FIELDS = {
    "mm_vision_tower": "model_zoo/OpenAI/clip-vit-large-patch14-336",
    "mm_vision_tower_aux": "model_zoo/OpenAI/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_hidden_size": VIT["hidden_size"],
    "mm_hidden_size_aux": sum(WIDTHS),
    "image_aspect_ratio": "pad",
    "image_size_aux": AUX_SIDE,
    "tokenizer_padding_side": "right",
    "use_mm_proj": True,
}


def llm(kind, seed=0):
    """An LLM of 96 words, the tiny tokenizer's without those for images."""
    config_class, model_class = LLMS[kind]
    torch.manual_seed(seed)
    return model_class(config_class(**{**LLM, "vocab_size": 96}, head_dim=8, bos_token_id=1, eos_token_id=2)).eval()


def write(folder, kind="Llama", grid=1, tuned=None, pickled=False, fields=None):
    """Write the three checkpoints into a folder, and return their paths: the authors' own, CLIP, and ConvNeXt.

    With `tuned`, a seed, the first has encoders inside it.
    """
    own, clip_folder, convnext = (folder / name for name in ("MGM", "clip", "convnext"))
    own.mkdir()
    model = llm(kind)
    state = {name: weight for name, weight in model.state_dict().items() if kind != "Gemma" or name != "lm_head.weight"}
    state |= {f"model.{name}": weight for name, weight in modules(LLM["hidden_size"]).items()}
    if tuned is not None:
        prefix = "model.vision_tower.vision_tower.vision_model."
        state |= {prefix + name.removeprefix("vision_model."): w for name, w in clip(tuned).state_dict().items()}
        state |= {f"model.vision_tower_aux.vision_{name}": weight for name, weight in trunk(tuned).items()}
    config = model.config.to_dict() | FIELDS | {"image_size_aux": AUX_SIDE * grid}
    config |= {"architectures": [f"MGM{kind}ForCausalLM"], "model_type": "mgm" if kind == "Llama" else "mgm_gemma"}
    config |= {"image_grid": 2, "image_global": True} if grid == 2 else {}
    (own / "config.json").write_text(json.dumps({**config, **(fields or {})}))
    visual = {f"visual.trunk.{name}": weight for name, weight in trunk().items()}
    visual |= {"visual.trunk.head.norm.weight": torch.ones(WIDTHS[-1]), "text.ln_final.weight": torch.ones(4)}
    convnext.mkdir()
    if pickled:
        torch.save(state, own / "pytorch_model.bin")
        torch.save(visual, convnext / "open_clip_pytorch_model.bin")
    else:
        names = sorted(state)  # in two files
        for number, part in enumerate((names[::2], names[1::2]), start=1):
            save_file(
                {name: state[name].clone() for name in part},
                own / f"model-0000{number}-of-00002.safetensors",
                {"format": "pt"},
            )
        index = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(names)}
        (own / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        save_file(visual, convnext / "open_clip_model.safetensors")
    words().save_pretrained(own)
    clip().save_pretrained(clip_folder)
    return own, clip_folder, convnext


def words():
    """A tokenizer of the LLM's words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{n}": n for n in range(4, 96)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
