"""A reference for SparseVLM: loops over one image of one row for raters, scores, recycling and clusters."""

import math


def raters(visual, question):
    """Return the indices of the raters, for image [tokens, dim] and question [queries, dim] at the input of the LLM."""
    shares = [0.0] * len(question)
    for token in visual.double():
        products = [float(token @ word) for word in question.double()]
        powers = [math.exp(p - max(products)) for p in products]
        for q, power in enumerate(powers):
            shares[q] += power / sum(powers) / len(visual)
    above = [q for q, share in enumerate(shares) if share > sum(shares) / len(shares) + 1e-12]
    return above or [len(question) - 1]


def density_peaks(points, clusters):
    """Return the indices of each cluster's points [points, dim], centre first, and clusters by descending score."""
    points, dim = points.double(), points.shape[1]
    every = range(len(points))
    away = [[float((points[i] - points[j]).norm()) / math.sqrt(dim) for j in every] for i in every]
    density = [math.exp(-sum(d * d for d in sorted(away[i])[:clusters]) / clusters) for i in every]
    farthest = max(max(row) for row in away)
    score = []
    for i in every:
        denser = [j for j in every if density[j] > density[i] or (density[j] == density[i] and j < i)]
        score.append(density[i] * min((away[i][j] for j in denser), default=farthest))
    centres = sorted(every, key=lambda i: -score[i])[:clusters]
    members = [[centre] for centre in centres]
    for i in every:
        if i not in centres:
            members[min(range(clusters), key=lambda c: away[i][centres[c]])].append(i)
    return members


def sparsevlm(features, attention, rating, count, recycle):
    """Return the output tokens as lists of (index, weight), anchor first: the kept ones, then the merged ones.

    `features` is [tokens, dim], `attention` [queries, tokens], `rating` has the indices of the raters, `count` is the
    number of tokens to keep, and `recycle` the fraction of the others to recycle.
    """
    tokens = range(len(features))
    if count >= len(features):
        return [[(i, 1.0)] for i in tokens]
    score = [sum(float(attention[q, i]) for q in rating) / len(rating) for i in tokens]
    ranking = sorted(tokens, key=lambda i: -score[i])
    kept, pruned = sorted(ranking[:count]), ranking[count:]
    groups = [[(i, 1.0)] for i in kept]
    if recycle > 0:
        recycled = sorted(pruned[: int(len(pruned) * recycle) + 1])
        for members in density_peaks(features[recycled], int(len(recycled) / 10) + 1):
            groups.append([(recycled[i], 1 / len(members)) for i in members])
    return groups
