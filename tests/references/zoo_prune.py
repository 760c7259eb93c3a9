"""A reference for ZOO-Prune: loops over one image, from the paper and a description of the authors' code."""

import math

from tests.references.divprune import cosine, first_of_largest


def zoo_prune(features, projected, projector, directions, step, count):
    """Return the kept tokens, ascending.

    `features` and `projected` have a list of floats for each token, before and behind the projector; `projector` maps
    the first to the second. `directions` has lists of floats of any length.
    """
    sensitivity = [sensitivity_of(token, projector, directions, step) for token in features]
    least, most = min(sensitivity), max(sensitivity)
    weight = [(value - least) / (most - least) if most > least else 1.0 for value in sensitivity]
    kept = [first_of_largest(range(len(features)), weight)]
    while len(kept) < count:
        others = [i for i in range(len(features)) if i not in kept]
        score = {i: weight[i] * min(1 - cosine(projected[i], projected[j]) for j in kept) for i in others}
        kept.append(first_of_largest(others, score))
    return sorted(kept)


def sensitivity_of(token, projector, directions, step):
    total = 0.0
    for direction in directions:
        scale = step / math.hypot(*direction)
        ahead = projector([x + scale * d for x, d in zip(token, direction, strict=True)])
        behind = projector([x - scale * d for x, d in zip(token, direction, strict=True)])
        total += math.dist(ahead, behind) / (2 * step)
    return total / len(directions)
