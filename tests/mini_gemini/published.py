"""Tiny checkpoints in the layout in which Mini-Gemini, CLIP and OpenCLIP are published, with random weights."""

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.tiny import SIDE, VIT

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
