"""A reference for DART: loops over one image, by the rules of the authors' `get_retained_image_token`."""

import math


def dart(keys, states, text_keys, text_states, count, visual_pivots=4, text_pivots=4):
    """Return the kept tokens in raster order. All arguments are lists of lists of floats, one list per token."""

    def strongest(rows, number):
        norms = [sum(abs(value) for value in row) for row in rows]
        return sorted(range(len(rows)), key=lambda n: -norms[n])[:number]

    visual = strongest(keys, min(visual_pivots, count))
    pivots = [states[n] for n in visual] + [text_states[n] for n in strongest(text_keys, text_pivots)]
    kept, left = list(visual), [n for n in range(len(states)) if n not in visual]
    share, over = divmod(count - len(visual), len(pivots))
    for number, pivot in enumerate(pivots):
        left.sort(key=lambda n: (round(cosine(pivot, states[n]), 6), n))
        adds = share + (number < over)
        kept, left = kept + left[:adds], sorted(left[adds:])
    return sorted(kept)


def authors_count(count):
    """Return how many tokens the authors' code keeps for a budget, with 4 visual and 4 text pivots."""
    return 4 + 8 * (count // 8)


def cosine(a, b):
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / (math.hypot(*a) * math.hypot(*b))
