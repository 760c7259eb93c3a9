"""A reference for PyramidDrop: loops over one image, by the rule of the authors' `pdrop_rank_drop`."""


def left_after(tokens, share, stages):
    """Return the tokens that each stage leaves. The authors take `share` to the power of the stage of all tokens."""
    return [max(1, int(tokens * share ** (stage + 1))) for stage in range(stages)]


def pyramiddrop(attention, count):
    """Return the kept tokens in raster order. `attention` has the last question token's attention to each token."""
    ranking = sorted(range(len(attention)), key=lambda token: -attention[token])
    return sorted(ranking[:count])
