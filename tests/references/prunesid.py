"""A reference for PruneSID: loops over the patches of one image, from the paper and a description of the code."""

import math
from fractions import Fraction

import torch


def components(features, count, seed):
    """Return each patch's component by a randomised analysis of one image, step by step.

    `features` is [patches, dim]. Columns are made orthonormal one by one.
    """
    x = torch.sigmoid(features.double())
    x = torch.stack([row - row.mean() for row in x]).T
    basis = orthonormal(x @ torch.randn(x.shape[1], count, generator=torch.Generator().manual_seed(seed)).double())
    for _ in range(2):
        basis = orthonormal(x @ orthonormal(x.T @ basis))
    small = basis.T @ x
    values, vectors = torch.linalg.eigh(small @ small.T)
    weights = (vectors.T.flip(0) @ small) / values.flip(0).clamp(min=1e-30).sqrt()[:, None]
    return [max(range(count), key=lambda c: abs(float(weights[c, n]))) for n in range(len(features))]


def orthonormal(columns):
    """Return the columns, each without its parts along the earlier ones, at length 1."""
    done = []
    for column in columns.T:
        for _ in range(2):  # a second time against rounding
            for earlier in done:
                column = column - (column @ earlier) * earlier
        done.append(column / column.norm())
    return torch.stack(done, 1)


def prunesid(group, attention, similarity, count, prefix):
    """Return the kept patches in the order of the output, without CLS.

    `group` has each patch's component, `similarity` the cosine similarity of each pair.
    """
    patches, groups = range(len(attention)), max(count // 4, 1)
    groups = max(groups, max(group) + 1)
    pairs = [(i, j) for i in patches for j in patches if i < j]
    threshold = count / 32 * sum(similarity[i][j] for i, j in pairs) / max(len(pairs), 1)
    members = [[n for n in patches if group[n] == g] for g in range(groups)]
    ranked, survivors = [], []
    for own in members:
        by_attention = sorted(own, key=lambda n: -attention[n])
        kept = []
        for n in by_attention:
            if all(similarity[other][n] <= threshold for other in kept):
                kept.append(n)
        survivors.append(len(kept))
        ranked.append(kept + [n for n in by_attention if n not in kept])
    quotas = quotas_of([len(own) for own in members], survivors, count, max(count - prefix, 0))
    return [n for own, quota in zip(ranked, quotas, strict=True) for n in own[:quota]]


def quotas_of(sizes, survivors, count, patches):
    """Return how many patches each group keeps, `patches` in all."""
    least = [min(1, size, patches) for size in sizes]
    most = [min(5 * math.ceil(count / 64), n, size) for n, size in zip(survivors, sizes, strict=True)]
    while sum(most) < count:
        most = [min(limit + 1, size) for limit, size in zip(most, sizes, strict=True)]
    rest = max(patches - sum(least), 0)
    quotas, given, running = [], 0, 0
    for lower, upper, n in zip(least, most, survivors, strict=True):
        running += n
        total = round(Fraction(running * rest, sum(survivors)))
        quotas.append(min(lower + total - given, upper))
        given = total
    for g in sorted(range(len(sizes)), key=lambda g: -survivors[g]):
        quotas[g] += min(most[g] - quotas[g], sum(least) + rest - sum(quotas))
    return quotas
