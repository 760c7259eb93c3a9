"""A reference for DFMR: loops over one image's windows and channels, from a description of the paper's rule."""

from statistics import fmean, pstdev


def dfmr(features, rows, cols, tau, max_factor):
    """Return the factor and the pooled tokens. `features` has a normalised list of floats per token."""
    factor = 1
    for s in range(2, max_factor + 1):
        if rows % s == 0 and cols % s == 0 and deviation(features, rows, cols, s) < tau:
            factor = s
    return factor, [mean(window) for window in windows(features, rows, cols, factor)]


def deviation(features, rows, cols, side):
    found = []
    for window in windows(features, rows, cols, side):
        found.append(fmean(pstdev(channel) for channel in zip(*window, strict=True)))
    return fmean(found)


def windows(features, rows, cols, side):
    for top in range(0, rows, side):
        for left in range(0, cols, side):
            yield [features[r * cols + c] for r in range(top, top + side) for c in range(left, left + side)]


def mean(window):
    return [fmean(channel) for channel in zip(*window, strict=True)]


def layer_normalised(token):
    spread = (pstdev(token) ** 2 + 1e-5) ** 0.5
    return [(value - fmean(token)) / spread for value in token]
