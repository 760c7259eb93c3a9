"""A reference for FasterVLM: a loop over the patches of one image, from the paper."""


def fastervlm(attention, count):
    """Return the kept patches in raster order. `attention` has the attention from CLS to each patch."""
    kept = []
    while len(kept) < count:
        best = None
        for patch, score in enumerate(attention):
            if patch not in kept and (best is None or score > attention[best]):
                best = patch
        kept.append(best)
    return sorted(kept)
