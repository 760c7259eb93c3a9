"""A reference for PruMerge and PruMerge+: loops over the patches of one image, from the paper and the code's rules."""

import math

import torch


def prumerge(features, attention, keys, plus=False, neighbours=32):
    """Return the output tokens and the kept patches in their order. The arguments are of patches, without CLS."""
    size = len(attention)
    outliers = [
        n for n in range(size) if attention[n] > quantile(attention, 0.75) * 2.5 - quantile(attention, 0.25) * 1.5
    ]
    kept = sorted(outliers, key=lambda n: -attention[n])
    if plus and kept:
        step = max(size // len(kept) // 3, 1)
        kept += [n for n in range(0, size - 1, step) if n not in outliers]
    return merged(features, attention, keys, kept, neighbours), kept


def with_count(features, attention, keys, count, plus=False, neighbours=32):
    """Return the same for `count` output tokens."""
    ranked = sorted(range(len(attention)), key=lambda n: -attention[n])
    first = math.floor((count - 1) / 4 + 0.5) if plus else count - 1
    others = [n for n in range(len(attention)) if n not in ranked[:first]]
    spaced = [others[(2 * i + 1) * len(others) // (2 * (count - 1 - first))] for i in range(count - 1 - first)]
    kept = ranked[:first] + spaced
    return merged(features, attention, keys, kept, neighbours), kept


def merged(features, attention, keys, kept, neighbours):
    """Return the kept patches, each with its nearest patches, and the sum of the rest."""
    out = []
    for n in kept:
        others = [m for m in range(len(attention)) if m != n]
        similarity = {m: float(torch.cosine_similarity(keys[n], keys[m], dim=0)) for m in others}
        token = features[n].clone()
        for m in sorted(others, key=lambda m: -similarity[m])[:neighbours]:
            token += attention[m] * features[m]
        out.append(token)
    rest = [m for m in range(len(attention)) if m not in kept]
    if rest:
        out.append(sum(attention[m] * features[m] for m in rest))
    return torch.stack(out)


def quantile(values, share):
    """Return a quantile, linear between the neighbouring values."""
    ordered, place = sorted(values), share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
