"""A reference for HoloV: loops over the crops of one image, from the paper and a description of the code."""

import math


def holov(features, attention, count, crops=16):
    """Return the kept tokens in the order of the output. `features` has a list of floats per token."""
    parts, start = [], 0
    for number in range(crops):
        end = start + len(features) // crops + (number < len(features) % crops)
        parts += [list(range(start, end))] if end > start else []
        start = end
    scores = [crop_score([features[n] for n in part], [attention[n] for n in part]) for part in parts]
    shares = [score / (sum(scores) + 1e-6) for score in scores]
    quotas = [math.floor(share * count) for share in shares]
    largest_first = sorted(range(len(parts)), key=lambda number: -shares[number])
    for number in largest_first[: count - sum(quotas)]:
        quotas[number] += 1
    ranked = [sorted(part, key=lambda n: -attention[n]) for part in parts]
    kept = {n for part, quota in zip(ranked, quotas, strict=True) for n in part[:quota]}
    # The places that full crops could not take.
    for n in sorted(range(len(features)), key=lambda n: -attention[n]):
        if len(kept) < count:
            kept.add(n)
    out = []
    for part, best_first in zip(parts, ranked, strict=True):
        out += part if kept.issuperset(part) else [n for n in best_first if n in kept]
    return out


def crop_score(features, attention):
    """Return the mean score of a crop's tokens."""
    units = [[x / (math.hypot(*token) + 1e-6) for x in token] for token in features]
    size, variances = len(units), []
    for i, unit in enumerate(units):
        similarities = [
            0.0 if i == j else sum(x * y for x, y in zip(unit, other, strict=True)) for j, other in enumerate(units)
        ]
        mean = sum(similarities) / max(size - 1, 1)
        variances.append(sum((s - mean) ** 2 for s in similarities) / max(size - 1, 1))
    scaled = [1000 * a for a in attention]
    scale = sum(scaled) / size / (sum(variances) / size + 1e-6)
    return sum(a + 0.09 * scale * v for a, v in zip(scaled, variances, strict=True)) / size
