"""A reference for CDPruner: one image, with the determinant of every candidate in float64, from the paper."""

import torch

from tests.references.divprune import cosine, first_of_largest


def cdpruner(projected, words, count, sign=1):
    """Return the kept tokens, ascending. `projected` and `words` have a list of floats for each token and word."""
    size = len(projected)
    similarity = [sign * sum(cosine(token, word) for word in words) / len(words) for token in projected]
    least, most = min(similarity), max(similarity)
    relevance = [(value - least + 1e-6) / (most - least) if most - least > 1e-6 else 1.0 for value in similarity]
    cosines = torch.tensor([[cosine(a, b) for b in projected] for a in projected], dtype=torch.float64)
    cosines.fill_diagonal_(1)
    kept, independent = [], []
    while len(kept) < count:
        others = [i for i in range(size) if i not in kept]
        left = {i: determinant(cosines, [*independent, i]) / determinant(cosines, independent) for i in others}
        adds = {i: relevance[i] ** 2 * (left[i] if left[i] >= 1e-4 else 0) for i in others}
        kept.append(first_of_largest(others, adds))
        if adds[kept[-1]] > 0:
            independent.append(kept[-1])
    return sorted(kept)


def determinant(matrix, chosen):
    return float(torch.linalg.det(matrix[chosen][:, chosen])) if chosen else 1.0
