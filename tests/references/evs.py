"""A reference for EVS: loops over the tokens of one video, by the rule of vLLM's `compute_retention_mask`."""

import math


def evs(features, frames, pruned):
    """Return the kept tokens. `features` has a list of floats per token, frame by frame; `pruned` is vLLM's rate."""
    size = len(features) // frames
    count = max(size, int(len(features) * (1 - pruned)))
    changes = [255.0] * size + [1 - cosine(features[n], features[n - size]) for n in range(size, len(features))]
    ranking = sorted(range(len(features)), key=lambda n: -changes[n])
    return sorted(ranking[:count])


def cosine(a, b):
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / (math.hypot(*a) * math.hypot(*b))
