"""Mini-Gemini's visual tokens as its paper and checkpoints define them, from weights with the checkpoints' names.

One patch after another, without batches. CLIP's hidden states are given.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import conv2d, gelu, interpolate, layer_norm, linear

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])


# --- the ConvNeXt, with timm's names --------------------------------------------------------------------------------


def norm_of_channels(weights, name, x):
    """LayerNorm over the channels of [channels, rows, cols]."""
    rows_last = x.permute(1, 2, 0)
    normed = layer_norm(rows_last, rows_last.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)
    return normed.permute(2, 0, 1)


def conv(weights, name, x, **settings):
    return conv2d(x[None], weights[f"{name}.weight"], weights[f"{name}.bias"], **settings)[0]


def block(weights, name, x):
    y = conv(weights, f"{name}.conv_dw", x, padding=3, groups=len(x))
    y = norm_of_channels(weights, f"{name}.norm", y).permute(1, 2, 0)
    y = linear(y, weights[f"{name}.mlp.fc1.weight"], weights[f"{name}.mlp.fc1.bias"])
    y = linear(gelu(y), weights[f"{name}.mlp.fc2.weight"], weights[f"{name}.mlp.fc2.bias"])
    return x + (weights[f"{name}.gamma"] * y).permute(2, 0, 1)


def convnext_stages(weights, pixels):
    """The outputs of the stages for one image, [channels, rows, cols]. There is no norm behind them."""
    x = norm_of_channels(weights, "stem.1", conv(weights, "stem.0", pixels, stride=4))
    outputs = []
    for stage in range(4):
        if stage:
            x = norm_of_channels(weights, f"stages.{stage}.downsample.0", x)
            x = conv(weights, f"stages.{stage}.downsample.1", x, stride=2)
        depth = 0
        while f"stages.{stage}.blocks.{depth}.gamma" in weights:
            x = block(weights, f"stages.{stage}.blocks.{depth}", x)
            depth += 1
        outputs.append(x)
    return outputs


def neck(weights, pixels):
    """All stages at the size of the first, [channels, rows, cols]."""
    first, *others = convnext_stages(weights, pixels)
    size = first.shape[1:]
    grown = [interpolate(each[None], size=size, mode="bilinear", align_corners=False)[0] for each in others]
    return torch.cat([first, *grown])


# --- mining ---------------------------------------------------------------------------------------------------------


def normalised_linear(weights, name, x):
    x = layer_norm(x, x.shape[-1:], weights[f"{name}.0.weight"], weights[f"{name}.0.bias"], 1e-5)
    return linear(x, weights[f"{name}.1.weight"], weights[f"{name}.1.bias"])


def tokens_of_view(weights, patches, features):
    """The projected tokens of one view: `patches` [patches, dim] of CLIP, `features` [channels, rows, cols]."""
    side = math.isqrt(len(patches))
    window = features.shape[-1] // side
    tokens = []
    for number, patch in enumerate(patches):
        row, col = divmod(number, side)
        below = features[:, row * window : (row + 1) * window, col * window : (col + 1) * window]
        candidates = below.flatten(1).T
        query = normalised_linear(weights, "vlm_uni_query_projector", patch)
        keys = normalised_linear(weights, "vlm_uni_aux_projector", candidates)
        values = normalised_linear(weights, "vlm_uni_val_projector", candidates)
        attention = torch.softmax(keys @ query / math.sqrt(len(query)), dim=0)
        tokens.append(patch + attention @ values)
    hidden = gelu(linear(torch.stack(tokens), weights["mm_projector.0.weight"], weights["mm_projector.0.bias"]))
    return linear(hidden, weights["mm_projector.2.weight"], weights["mm_projector.2.bias"])


def tokens_of_image(weights, trunk, patches_of_views, aux_pixels, grid=1):
    """The projected tokens of an image, global view first; `patches_of_views` has CLIP's patches of each view."""
    features = neck(trunk, aux_pixels)
    if grid == 1:
        return tokens_of_view(weights, patches_of_views[0], features)
    half = interpolate(features[None], scale_factor=1 / grid, mode="bilinear", align_corners=False)[0]
    size = features.shape[-1] // grid
    parts = [
        features[:, row * size : (row + 1) * size, col * size : (col + 1) * size]
        for row in range(grid)
        for col in range(grid)
    ]
    views = zip(patches_of_views, [half, *parts], strict=True)
    return torch.cat([tokens_of_view(weights, patches, part) for patches, part in views])


# --- preprocessing --------------------------------------------------------------------------------------------------


def aux_pixels(image, size):
    """Pad to a square with CLIP's mean, resize with Pillow, normalise; [3, size, size]."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in CLIP_MEAN))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    resized = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)
    return ((resized / 255 - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)


def bilinear(pixels, size):
    """Resize [3, side, side]: each new pixel is a mix of the four around its place, however far the old ones are."""
    side = pixels.shape[-1]
    places = np.clip((np.arange(size) + 0.5) * side / size - 0.5, 0, None)
    low = np.floor(places).astype(int)
    high, share = np.minimum(low + 1, side - 1), places - low
    rows = pixels[:, low] * (1 - share)[None, :, None] + pixels[:, high] * share[None, :, None]
    return rows[:, :, low] * (1 - share) + rows[:, :, high] * share


def clip_pixels(aux, size, grid=1):
    """CLIP's views: the image, or a global view and crops in raster order."""
    whole = bilinear(aux, grid * size)
    if grid == 1:
        return [whole]
    crops = [
        whole[:, row * size : (row + 1) * size, col * size : (col + 1) * size]
        for row in range(grid)
        for col in range(grid)
    ]
    return [bilinear(whole, size), *crops]
