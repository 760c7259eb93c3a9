"""A reference for downsample: smaller images, and the plain model changed to their size by hand."""

import copy

import numpy as np
import torch
from PIL import Image


def smaller_image(pixels, height, width):
    """Resize an image [3, h, w] to [3, height, width], channel by channel with Pillow."""
    channels = [Image.fromarray(c.numpy(), mode="F").resize((width, height), Image.Resampling.BICUBIC) for c in pixels]
    return torch.from_numpy(np.stack([np.asarray(c) for c in channels]))


def model_for(model, side):
    """Return a copy of a model whose CLIP or SigLIP encoder has a resolution of `side` x `side` pixels."""
    model = copy.deepcopy(model)
    encoder = model.model.image_tower if hasattr(model.model, "image_tower") else model.model.vision_tower
    embeddings = encoder.embeddings
    old = embeddings.position_embedding.weight
    grid, new = int(old.shape[0] ** 0.5), side // embeddings.patch_size
    front, patches = old[: -grid * grid], old[-grid * grid :]
    image = patches.T.reshape(1, -1, grid, grid)
    scaled = torch.nn.functional.interpolate(image, (new, new), mode="bicubic", align_corners=False)
    table = torch.cat([front, scaled[0].flatten(1).T])
    embeddings.position_embedding = torch.nn.Embedding.from_pretrained(table)
    embeddings.position_ids = torch.arange(len(table))[None]
    embeddings.image_size = side
    return model
