"""Compress the visual tokens of images: layouts and features in, fewer features out.

This file knows no token ids, no KV cache and no transformers: any engine that has an image's layout and the features
of its views can call `compress`.

Four numberings meet here. All are of one image and count from 0:

* token: a visual token, counted through all views of the image (`Layout`); behind the tokens come the separators
* output: a token that a compressor puts out, counted through all views, in each view in the map's own order
* feature: an output again, in the order in which the LLM gets them (`Kept.features`)
* placeholder: a place in the prompt, before compression (`Kept.places`) or after it (`Kept.slots`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlmzip.compressor import Compressor, keep_all
from vlmzip.errors import UserError
from vlmzip.models.layout import SEPARATOR, Encoded, Layout, Views
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import VisualTokens


@dataclass(frozen=True)
class Plan:
    """What becomes of the tokens of one image, before anything is done to their features."""

    layout: Layout
    """Of the tokens that the compressor saw: without those in the padding of tiles, unless it wants whole views."""
    token_map: TokenMap
    """From the image's tokens and the separators behind them to the placeholders left; a batch of one."""
    order: Int[Tensor, " features"]
    """For each feature left the number of its output. On the CPU, as `slots`."""
    slots: Int[Tensor, " placeholders_left"]
    """For each placeholder left its feature; `SEPARATOR` for a separator."""
    places: list[int]
    """For each placeholder left the placeholder before compression that gives it its position."""
    outputs: list[int]
    """Outputs of each view."""
    left: Layout | None
    """Of what is left, if nothing is gone; `None` if the tokens left lie on no grid any more."""


@dataclass(frozen=True)
class Kept:
    """The tokens left of one image."""

    features: Float[Tensor, "features dim"]
    """In the order in which the LLM gets them, without separators."""
    streams: tuple[Float[Tensor, "features stream_dim"], ...]
    """Further features of the same tokens."""
    seen: tuple[Float[Tensor, "_ dim"], ...]
    """The features of each view before compression, without gradients."""
    plan: Plan


@dataclass(frozen=True)
class ViewMap:
    """The map of one view, a batch of one, and for each of its outputs the anchor's number in the view."""

    token_map: TokenMap
    anchors: Int[Tensor, " outputs"]
    outputs: tuple[Float[Tensor, "outputs _"], ...] = ()
    """Features and streams behind the map."""
    seen: Float[Tensor, "tokens dim"] | None = None
    """The features before it, without gradients."""


def compress(
    layouts: Sequence[Layout], encoded: Encoded, compressor: Compressor | None, *, ascending: bool = False
) -> list[Kept]:
    """Apply `compressor` to every view of some images; return what is left of each image, without one everything.

    `encoded` holds all views of all images. A count of tokens is shared out over the views of an image. The tokens
    left stand in the order that the compressor gives them, or with `ascending`, for tokens that keep their positions,
    in the order of the placeholders of their anchors. Separators stay only where all tokens of their image do: where
    tokens are dropped or merged there are no rows left to separate.

    Raises `UserError` if nothing is left of a view.
    """
    layouts, encoded = _as_seen(layouts, encoded, compressor)
    maps = _decide(layouts, encoded, compressor, apply=True)
    kept = []
    for layout, numbers in zip(layouts, view_numbers(layouts), strict=True):
        views = [maps[number] for number in numbers]
        plan = plan_image(layout, views, compressor, ascending=ascending)
        features, *streams = (in_order(parts, plan.order) for parts in zip(*(v.outputs for v in views), strict=True))
        seen = tuple(view.seen for view in views if view.seen is not None)
        kept.append(Kept(features, tuple(streams), seen, plan))
    return kept


def plan_views(
    layouts: Sequence[Layout], encoded: Encoded, compressor: Compressor, *, ascending: bool = False
) -> list[Plan]:
    """Decide as `compress` does, and leave the features alone: they may be without width."""
    layouts, encoded = _as_seen(layouts, encoded, compressor)
    maps = _decide(layouts, encoded, compressor, apply=False)
    return [
        plan_image(layout, [maps[number] for number in numbers], compressor, ascending=ascending)
        for layout, numbers in zip(layouts, view_numbers(layouts), strict=True)
    ]


def plan_image(layout: Layout, views: Sequence[ViewMap], compressor: Compressor | None, *, ascending: bool) -> Plan:
    """Join the maps of an image's views into one map of the image."""
    places = [layout.places[start + view.anchors] for start, view in zip(layout.starts, views, strict=False)]
    at = torch.cat(places)
    whole = layout.is_seen_whole and len(at) == layout.placeholders - layout.separators
    if compressor is None or ascending or (whole and len(views) > 1):
        order = at.argsort(stable=True)
    else:
        ranks = [layout.ranks[start + view.anchors] for start, view in zip(layout.starts, views, strict=False)]
        order = compressor.arrange(layout.views, layout.prefix, ranks)
    slots, left = torch.arange(len(order)), at[order]
    if whole and layout.separators:  # nothing is gone: each separator stands where it stood
        both = torch.cat([left, layout.places[layout.tokens :]])
        ranking = both.argsort(stable=True)
        slots, left = torch.where(ranking < len(order), ranking, SEPARATOR), both[ranking]
    return Plan(
        layout,
        _joined(layout, views, order, slots),
        order,
        slots,
        left.tolist(),
        outputs=[len(view.anchors) for view in views],
        left=layout.as_seen if whole else None,
    )


def _joined(
    layout: Layout, views: Sequence[ViewMap], order: Int[Tensor, " features"], slots: Int[Tensor, " left"]
) -> TokenMap:
    """The map from all tokens of an image, and its separators, to the placeholders left."""
    maps = [view.token_map for view in views]
    device = maps[0].group.device
    left = torch.arange(len(slots))
    # For each output the placeholder left that it fills.
    fills = torch.empty_like(order)
    fills[order[slots[slots >= 0]]] = left[slots >= 0]
    if len(maps) == 1 and not layout.separators:
        return maps[0] if torch.equal(fills, left) else maps[0].rearranged(fills[None].to(device))
    starts = accumulate((len(view.anchors) for view in views), initial=0)
    output = torch.cat([torch.where(m.group[0] < 0, -1, m.group[0] + s) for m, s in zip(maps, starts, strict=False)])
    group = torch.where(output < 0, -1, fills.to(device)[output.clamp(min=0)])
    weight, anchor = torch.cat([m.weight[0] for m in maps]), torch.cat([m.anchor[0] for m in maps])
    # Separators: all of them stay, each for itself, or none does.
    stay = left[slots < 0].to(device)
    standing = stay if len(stay) else torch.full((layout.separators,), -1, device=device)
    return TokenMap(
        torch.cat([group, standing])[None],
        torch.cat([weight, (standing >= 0).to(weight.dtype)])[None],
        torch.cat([anchor, standing >= 0])[None],
        torch.tensor([len(slots)], device=device),
    )


def _decide(
    layouts: Sequence[Layout], encoded: Encoded, compressor: Compressor | None, *, apply: bool
) -> dict[int, ViewMap]:
    """The map of each view by its number; with `apply`, features and streams behind it."""
    shares: list[Callable[[VisualTokens], TokenMap]] = [keep_all] * sum(len(layout.views) for layout in layouts)
    if compressor is not None:
        shares = [share for layout in layouts for share in compressor.shared(layout.views)]
    maps: dict[int, ViewMap] = {}
    for group in encoded.groups:
        for share in dict.fromkeys(shares[number] for number in group.numbers):
            rows = [row for row, number in enumerate(group.numbers) if shares[number] == share]
            some = group if len(rows) == len(group.numbers) else group.rows(rows)
            token_map = share(some.tokens)
            lengths, anchors = token_map.lengths, token_map.anchor_index().cpu()
            if compressor is not None and 0 in lengths:
                raise UserError(f"{compressor.name()} left no token of an image; it must keep at least one")
            outputs = [token_map.apply(x) for x in (some.tokens.features, *some.streams)] if apply else []
            for row, number in enumerate(some.numbers):
                maps[number] = ViewMap(
                    token_map.rows(slice(row, row + 1)),
                    anchors[row, : lengths[row]],
                    tuple(values[row, : lengths[row]] for values in outputs),
                    some.tokens.features[row].detach(),
                )
    return maps


def _as_seen(
    layouts: Sequence[Layout], encoded: Encoded, compressor: Compressor | None
) -> tuple[Sequence[Layout], Encoded]:
    """Cut off what lies in the padding of tiles, unless the compressor wants whole views."""
    if (compressor and compressor.whole_views) or all(layout.is_seen_whole for layout in layouts):
        return layouts, encoded
    both = [layout.unpadded() for layout in layouts]
    windows = [window for _, own in both for window in own]
    grids = [grid for layout in layouts for grid in layout.views]
    new_number, numbers = 0, []
    for window in windows:
        numbers.append(None if window is None else new_number)
        new_number += window is not None
    groups: list[Views] = []
    for group in encoded.groups:
        for window in dict.fromkeys(windows[number] for number in group.numbers):
            if window is None:
                continue
            some = group.rows([row for row, number in enumerate(group.numbers) if windows[number] == window])
            tokens = window.tokens(grids[some.numbers[0]], some.tokens.prefix).to(some.tokens.features.device)
            groups.append(
                Views(
                    some.tokens.window(window.rows, window.cols),
                    [new for number in some.numbers if (new := numbers[number]) is not None],
                    tuple(stream[:, tokens] for stream in some.streams),
                )
            )
    return [layout for layout, _ in both], Encoded(groups, encoded.separator)


def view_numbers(layouts: Sequence[Layout]) -> list[range]:
    """Return for each image the numbers of its views, counted through all images."""
    ends = list(accumulate(len(layout.views) for layout in layouts))
    return [range(end - len(layout.views), end) for layout, end in zip(layouts, ends, strict=True)]


def in_order(parts: Sequence[Float[Tensor, "_ dim"]], order: Int[Tensor, " features"]) -> Float[Tensor, "features dim"]:
    """Return the outputs of all views in the order in which the LLM gets them."""
    together = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    if torch.equal(order, torch.arange(len(order))):
        return together
    return together[order.to(together.device)]


def encoded_again(
    features: Float[Tensor, "features dim"], streams: Sequence[Float[Tensor, "features _"]], layout: Layout
) -> Encoded:
    """Return what is left of one image for a second compressor; the LLM sees all tokens of `layout`."""
    by_token = layout.slots[layout.slots >= 0].argsort()
    groups = []
    for number, (grid, start, end) in enumerate(zip(layout.views, layout.starts, layout.starts[1:], strict=False)):
        values, *others = (in_order([x], by_token)[None, start:end] for x in (features, *streams))
        tokens = VisualTokens(values, grid, layout.prefix, passes_prefix=True)
        groups.append(Views(tokens, [number], tuple(others)))
    return Encoded(groups)
