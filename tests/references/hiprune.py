"""A reference for HiPrune: loops over the patches of one image, from the paper and a description of the code."""


def hiprune(middle, deep, rows, cols, count, alpha=0.1):
    """Return the kept patches in raster order.

    `middle` and `deep` have the attention that each patch receives in the object layer and in the features' layer.
    """
    patches = range(rows * cols)
    anchors = sorted(patches, key=lambda n: -middle[n])[: round(count * alpha / 5)]
    buffers = set()
    for anchor in anchors:
        row, col = anchor // cols, anchor % cols
        for r, c in ((row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1)):
            if 0 <= r < rows and 0 <= c < cols:
                buffers.add(r * cols + c)
    kept = anchors + sorted(buffers - set(anchors))
    registers = sorted((n for n in patches if n not in kept), key=lambda n: -deep[n])
    return sorted((kept + registers)[:count])
