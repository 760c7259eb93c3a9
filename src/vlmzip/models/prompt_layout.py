"""The sizes of images, found by the placeholders of a prompt and by what the inputs say about sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Int
from torch import Tensor

from vlmzip.models.towers.qwen import grids_of
from vlmzip.visual_tokens import Grid

#: The most tokens between two parts of one image in a prompt.
MOST_BETWEEN = 8


def square_of(tokens: int) -> Grid:
    """Return the square grid of this number of tokens, or a grid of one row if the number is not a square."""
    side = math.isqrt(tokens)
    return Grid(1, side, side) if side * side == tokens else Grid(1, 1, tokens)


def grids_by_prompt(sizes: Int[Tensor, "images 3"], side: int, placeholders: int) -> list[Grid]:
    """Return the grid of each image by its frames, rows and columns of patches.

    If the number of placeholders shows how many patches per side become one token, it comes before `side`.
    """
    patches = int(sizes.prod(-1).sum())
    by_prompt = math.isqrt(patches // max(placeholders, 1))
    return grids_of(sizes, by_prompt if by_prompt**2 * placeholders == patches else side)


def with_joined_frames(grids: list[Grid], placeholders: int) -> list[Grid]:
    """Return the grids of videos as the LLM sees them: some models join frames, as the number of placeholders shows."""
    joined = sum(grid.size for grid in grids) // max(placeholders, 1)
    if joined < 2 or any(grid.frames % joined for grid in grids):
        return grids
    return [grid._replace(frames=grid.frames // joined) for grid in grids]


def views_of_images(grids: Sequence[Grid], counts: Sequence[int]) -> list[tuple[Grid, ...]]:
    """Return the grids of the views of each image, from those of all views.

    `counts` has the placeholders of each image, which the views fill one after another. The result is empty if the
    views do not fill whole images.
    """
    images: list[tuple[Grid, ...]] = []
    left = list(grids)
    for count in counts:
        ends = list(accumulate(grid.size for grid in left))
        if count not in ends:
            return []
        views = ends.index(count) + 1
        images.append(tuple(left[:views]))
        left = left[views:]
    return [] if left else images


def placeholders_of_images(is_placeholder: Tensor, images: int | None) -> list[int]:
    """Return the number of placeholders of each image in a prompt, from a boolean mask of [batch, length].

    A run of placeholders is one image. If `images` are fewer than the runs, each of them has several runs: a token ends
    each row or surrounds each view. Images are further apart than the parts of an image.
    """
    rows = is_placeholder.long().cpu()
    edges = [torch.nn.functional.pad(row, (1, 1)).diff().nonzero()[:, 0].tolist() for row in rows]
    runs = [list(zip(row[::2], row[1::2], strict=True)) for row in edges]
    parts = [[end - start for start, end in row] for row in runs]
    if images is not None and sum(map(len, parts)) > images:
        for between in range(1, MOST_BETWEEN + 1):
            joined = [placeholders_of_groups(row, between) for row in runs]
            if sum(map(len, joined)) == images:
                parts = joined
    return [count for row in parts for count in row]


def placeholders_of_groups(runs: Sequence[tuple[int, int]], between: int) -> list[int]:
    """Return the number of placeholders in each group of runs that have at most `between` tokens between them."""
    counts: list[int] = []
    last_end = -math.inf
    for start, end in runs:
        if start - last_end <= between:
            counts[-1] += end - start
        else:
            counts.append(end - start)
        last_end = end
    return counts


def tokens_of_view(pixels: object, counts: Sequence[int]) -> int | None:
    """Return the number of tokens of each view if the pixels are a batch of views that can fill the placeholders.

    `counts` has the placeholders of each image. Some models, such as InternVL, put those of all tiles of an image in
    one run. Return `None` if the pixels are not such a batch, or if views do not fill whole images.
    """
    if not isinstance(pixels, Tensor) or pixels.ndim != 4:
        return None
    tokens, rest = divmod(sum(counts), len(pixels))
    return tokens if tokens and not rest and not any(n % tokens for n in counts) else None
