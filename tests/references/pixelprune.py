"""References for PixelPrune: loops over the tokens of one image, and the plain encoder with hidden patches."""

from contextlib import contextmanager

import torch
from transformers import AttentionInterface

HIDDEN = "hidden_patches"


def pixelprune(pixels, rows, cols, tau):
    """Return the numbers of the tokens that remain; `pixels` has a list of values for each token, in raster order."""
    stands_for = {}
    kept = []

    def similar(one, other):
        return max(abs(x - y) for x, y in zip(one, other, strict=True)) <= tau

    for r in range(rows):
        for c in range(cols):
            x = pixels[r * cols + c]
            if r == 0 and c == 0:
                prediction = None
            elif r == 0:
                prediction = stands_for[r, c - 1]
            elif c == 0:
                prediction = stands_for[r - 1, c]
            else:
                left, above, corner = stands_for[r, c - 1], stands_for[r - 1, c], stands_for[r - 1, c - 1]
                prediction = above if similar(corner, left) and not similar(corner, above) else left
            if prediction is not None and similar(x, prediction):
                stands_for[r, c] = prediction
            else:
                stands_for[r, c] = x
                kept.append(r * cols + c)
    return kept


@contextmanager
def hidden_patches(encoder, kept):
    """Hide patches from the attention of a vision encoder; `kept` marks the others, in the order in which it runs.

    The encoder then runs on all patches. Its attention sees one sequence, such as a window, after another.
    """
    done = 0

    def attention(module, query, key, value, attention_mask, scaling, **_):
        nonlocal done
        marks = kept[done : done + key.shape[2]]
        done = (done + key.shape[2]) % len(kept)
        if not marks.any():  # nothing sees these patches
            return torch.zeros_like(query).transpose(1, 2), None
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~marks, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register(HIDDEN, attention)
    usual = encoder.config._attn_implementation
    encoder.config._attn_implementation = HIDDEN
    try:
        yield
    finally:
        encoder.config._attn_implementation = usual
    assert done == 0
