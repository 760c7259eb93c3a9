"""A reference for MMTok: loops over one image, from the paper and a description of the authors' code."""

import math

from tests.references.divprune import cosine, first_of_largest

#: Shares that round to the same multiple of this are equal. At low temperatures, many are nearly 1.
UNIT = 2.0**-30


def mmtok(projected, vision, words, count, alpha=0.5, text_temperature=0.02, vision_temperature=0.2):
    """Return the kept tokens, ascending.

    `projected` and `vision` have a list of floats for each token, behind and before the projector; `words` has one for
    each word of the question.
    """
    size = len(projected)
    rows = [[share / len(words) for share in shares(word, projected, text_temperature)] for word in words]
    rows += [[alpha * share / size for share in shares(token, vision, vision_temperature)] for token in vision]
    best = [0.0] * len(rows)
    kept = []
    while len(kept) < count:
        gain = [sum(max(row[j] - covered, 0) for row, covered in zip(rows, best, strict=True)) for j in range(size)]
        kept.append(first_of_largest([j for j in range(size) if j not in kept], gain))
        best = [max(covered, row[kept[-1]]) for row, covered in zip(rows, best, strict=True)]
    return sorted(kept)


def shares(target, tokens, temperature):
    """Return the softmax of a target's cosines to all tokens."""
    exponents = [math.exp(cosine(target, token) / temperature) for token in tokens]
    return [round(exponent / sum(exponents) / UNIT) * UNIT for exponent in exponents]
