"""A reference for SCOPE: loops over the tokens of one image, from the paper and a description of the authors' code."""

from tests.references.divprune import cosine, first_of_largest


def scope(features, attention, count, alpha=1.0):
    """Return the kept tokens, ascending. `features` has a list of floats and `attention` a float for each token."""
    size = len(features)
    similarity = [[cosine(a, b) for b in features] for a in features]
    covered = [0.0] * size
    kept = []
    while len(kept) < count:
        gain = [sum(max(similarity[i][j] - covered[i], 0) for i in range(size)) for j in range(size)]
        score = [gain[j] * attention[j] ** alpha for j in range(size)]
        kept.append(first_of_largest([j for j in range(size) if j not in kept], score))
        covered = [max(covered[i], similarity[i][kept[-1]]) for i in range(size)]
    return sorted(kept)
