"""A reference for VidCom2: loops over the tokens of one video, by the rules of vLLM's `vidcom2.py`."""

import math


def vidcom2(features, frames, pruned):
    """Return the kept tokens. `features` has a list of floats per token, frame by frame; `pruned` is vLLM's rate."""
    tokens, size = range(len(features)), len(features) // frames
    target = max(frames, min(int(len(features) * (1.0 - pruned)), len(features)))
    width = len(features[0])
    means = [sum(row[c] for row in features) / len(features) for c in range(width)]
    variance = [sum((row[c] - means[c]) ** 2 for row in features) / len(features) for c in range(width)]
    channels = sorted(range(width), key=lambda c: variance[c])[: max(1, width // 2)]
    units = []
    for row in features:
        chosen = [row[c] for c in channels]
        length = math.hypot(*chosen)
        units.append([value / length for value in chosen])
    of_video = centre(units)
    to_video = [similarity(unit, of_video) for unit in units]
    redundancy = []
    for n in tokens:
        frame = n // size
        of_frame = centre(units[frame * size : (frame + 1) * size])
        redundancy.append(round(to_video[n] + similarity(units[n], of_frame), 6))

    score = [-sum(to_video[f * size : (f + 1) * size]) / size for f in range(frames)]
    powers = [math.exp((s - max(score)) / 0.01) for s in score]
    kept = []
    for frame in range(frames):
        share = (1.0 - pruned) * (1 + powers[frame] / sum(powers) - 1 / frames)
        count = min(max(round(min(share, 1.0) * size), 1), size)
        kept += sorted(range(frame * size, (frame + 1) * size), key=lambda n: redundancy[n])[:count]
    kept.sort(key=lambda n: (redundancy[n], n))
    others = sorted((n for n in tokens if n not in kept), key=lambda n: (redundancy[n], n))
    return sorted((kept + others)[:target])


def centre(rows):
    return [sum(row[c] for row in rows) / len(rows) for c in range(len(rows[0]))]


def similarity(row, other):
    squared = sum((a - b) ** 2 for a, b in zip(row, other, strict=True))
    return sum(math.exp(-squared / (2 * 2.0**power)) for power in range(-3, 2))
