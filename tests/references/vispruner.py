"""A reference for VisPruner: loops over the patches of one image, from the paper and a description of the code."""


def vispruner(attention, similarity, count, important=0.5):
    """Return the kept patches in raster order.

    `attention` has the attention from CLS to each patch, `similarity` the cosine similarity of each pair.
    """
    ranking = sorted(range(len(attention)), key=lambda patch: -attention[patch])
    first = int(count * important)
    kept, others = ranking[:first], ranking[first:]
    while len(others) > count - first:
        even = [patch for place, patch in enumerate(others) if place % 2 == 0]
        odd = [patch for place, patch in enumerate(others) if place % 2 == 1]
        if not odd:  # nothing is to be left
            break
        nearest = {patch: max(similarity[patch][other] for other in odd) for patch in even}
        dropped = min(8, len(others) - (count - first), len(even))
        others = sorted(even, key=lambda patch: -nearest[patch])[dropped:] + odd
    return sorted(kept + others[: count - first])
