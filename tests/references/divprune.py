"""A reference for DivPrune: loops over the tokens of one image, from the paper's section 3."""

import math

#: Cosines that round to the same multiple of this are equal.
UNIT = 2.0**-20


def divprune(features, count):
    """Return the kept tokens, ascending. `features` has a list of floats for each token."""
    size = len(features)
    distance = [[1 - cosine(a, b) for b in features] for a in features]
    alone = [min((distance[i][j] for j in range(size) if j != i), default=0) for i in range(size)]
    kept = [first_of_largest(range(size), alone)]
    while len(kept) < count:
        nearest = [min(distance[i][j] for j in kept) for i in range(size)]
        kept.append(first_of_largest([i for i in range(size) if i not in kept], nearest))
    return sorted(kept)


def first_of_largest(candidates, value):
    """Return the first candidate with the largest value."""
    return max(candidates, key=lambda i: (value[i], -i))


def cosine(a, b):
    lengths = math.hypot(*a) * math.hypot(*b)
    exact = sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0
    return round(exact / UNIT) * UNIT
