"""Compress the visual tokens of images: layouts and features in, fewer features out.

This file does not depend on token ids, the KV cache or transformers. Any engine that has an image's layout and the
features of its views can call `compress`.

It uses four index spaces. Each belongs to one image and starts at 0:

* token: a visual token, counted through all views of the image (`Layout`); the separators follow after the tokens
* output: an output token of the compressor, counted through all views, in each view in the order of the token map
* feature: an output token in the order in which the LLM gets them (`Kept.features`)
* placeholder: a placeholder of the image in the prompt, before compression (`Plan.places`) or after it (`Plan.slots`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from vlmzip.compressor import ComparesViews, Compressor, Profile, keep_all
from vlmzip.errors import UserError
from vlmzip.models.layout import SEPARATOR, Encoded, Layout, Views, numbers_by_kind
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, Site, VisualTokens, frames_joined


@dataclass(frozen=True)
class Plan:
    """The result of compression for the tokens of one image, without their features."""

    layout: Layout
    """The layout of the tokens that the compressor saw: without the padding of tiles, unless it needs whole views."""
    token_map: TokenMap
    """The map from the image's tokens, followed by its separators, to the remaining placeholders; a batch of one."""
    order: Int[Tensor, " features"]
    """The output index of each feature. On the CPU, as `slots` is."""
    slots: Int[Tensor, " placeholders_left"]
    """The feature index of each remaining placeholder; `SEPARATOR` for a separator."""
    places: list[int]
    """The placeholder before compression that gives each remaining placeholder its position."""
    outputs: list[int]
    """The number of outputs of each view."""
    left: Layout | None
    """The layout of the remaining tokens if all of them remain; `None` otherwise."""


@dataclass(frozen=True)
class Kept:
    """The remaining tokens of one image."""

    features: Float[Tensor, "features dim"]
    """Features in the order in which the LLM gets them, without separators."""
    streams: tuple[Float[Tensor, "features stream_dim"], ...]
    """Further features of the same tokens."""
    seen: tuple[Float[Tensor, "_ dim"], ...] | None
    """The features of each view before compression, without gradients; `None` if the encoder merged its tokens."""
    plan: Plan


@dataclass(frozen=True, eq=False)
class ViewMaps:
    """The token maps and outputs of views that were compressed together, or of some of them."""

    token_map: TokenMap
    anchors: Int[Tensor, "views outputs"]
    """The index of each output's anchor in its view; -1 beyond a view's outputs. On the CPU."""
    outputs: tuple[Float[Tensor, "views outputs _"], ...]
    """Features and streams after the map."""

    def of(self, rows: Sequence[int], count: int) -> ViewMaps:
        """Return the same for some of the views, each of which has `count` outputs."""
        # Index evenly spaced rows, such as those of images with equally many tiles, with a slice: it makes no copy.
        step = rows[1] - rows[0] if len(rows) > 1 else 1
        regular = range(rows[0], rows[-1] + 1, step) if step > 0 else ()
        index = slice(rows[0], rows[-1] + 1, step) if list(rows) == list(regular) else torch.tensor(rows)
        on_device = index if isinstance(index, slice) else index.to(self.token_map.group.device)
        return ViewMaps(
            self.token_map.rows(on_device),
            self.anchors[index, :count],
            tuple(values[on_device, :count] for values in self.outputs),
        )


class ViewMap(NamedTuple):
    """The token map and outputs of one view: a row of `ViewMaps`."""

    together: ViewMaps
    row: int
    seen: Float[Tensor, "tokens dim"] | None
    """The features of the view before compression, without gradients; `None` if the encoder merged its tokens."""

    @property
    def length(self) -> int:
        """Return the number of outputs of the view."""
        return self.together.token_map.lengths[self.row]


def compress(
    layouts: Sequence[Layout], encoded: Encoded, compressor: Compressor | None, *, ascending: bool = False
) -> list[Kept]:
    """Apply `compressor` to every view of the images, and return the remaining tokens of each image.

    If `compressor` is `None`, keep all tokens. `encoded` holds all views of all images; if only plans are needed, their
    features may have width 0. A token count is divided among the views of an image. The remaining tokens are in the
    compressor's order or, with `ascending`, in the order of their anchors' placeholders, for tokens that keep their
    positions. In both cases, the tokens of a video's later frames follow those of earlier ones. Separators remain only
    if all tokens of their image do: after tokens are dropped or merged, there are no rows to separate.

    Raise `UserError` if no token of a view remains.
    """
    layouts, encoded = without_padding(layouts, encoded, compressor)
    if compressor is not None and compressor.sees_clip:
        layouts, encoded = as_clips(layouts, encoded)
    maps = _decide(layouts, encoded, compressor)
    numbers = view_numbers(layouts)
    kept: dict[int, Kept] = {}
    for images, views, plans in _plans(layouts, maps, compressor, ascending=ascending):
        order = torch.stack([plan.order for plan in plans])
        by_kind = [in_order(parts, order).unbind() for parts in zip(*(view.outputs for view in views), strict=True)]
        for image, plan, (features, *streams) in zip(images, plans, zip(*by_kind, strict=True), strict=True):
            seen = tuple(view for number in numbers[image] if (view := maps[number].seen) is not None)
            all_seen = seen if len(seen) == len(numbers[image]) else None
            kept[image] = Kept(features, tuple(streams), all_seen, plan)
    return [kept[image] for image in range(len(layouts))]


def _plans(
    layouts: Sequence[Layout], maps: Mapping[int, ViewMap], compressor: Compressor | None, *, ascending: bool
) -> Iterator[tuple[list[int], list[ViewMaps], list[Plan]]]:
    """Plan similar images together; yield their indices, the `ViewMaps` of each view, and a plan for each image.

    Images are similar if they share a layout, their views were compressed together, and corresponding views have
    equally many outputs. A batch of them takes as many tensor operations as one image.
    """
    numbers = view_numbers(layouts)
    kinds = [
        (layout, *((maps[number].together, maps[number].length) for number in of_image))
        for layout, of_image in zip(layouts, numbers, strict=True)
    ]
    for images in numbers_by_kind(kinds).values():
        together = []
        for views in zip(*([maps[number] for number in numbers[image]] for image in images), strict=True):
            together.append(views[0].together.of([view.row for view in views], views[0].length))
        yield images, together, _plan(layouts[images[0]], together, compressor, ascending=ascending)


def _plan(layout: Layout, views: Sequence[ViewMaps], compressor: Compressor | None, *, ascending: bool) -> list[Plan]:
    """Join the views' maps into one map for each image of this layout, and return the images' plans."""
    anchors = [start + view.anchors for start, view in zip(layout.starts, views, strict=False)]
    at = torch.cat([layout.places[numbers] for numbers in anchors], 1)
    whole = layout.is_seen_whole and at.shape[1] == layout.placeholders - layout.separators
    if compressor is None or ascending or (whole and len(views) > 1):
        order = at.argsort(dim=1, stable=True)
    elif layout.is_video:
        order = layout.frame_of(at).argsort(dim=1, stable=True)
    else:
        ranks = zip(*(layout.ranks[numbers].unbind() for numbers in anchors), strict=True)
        order = torch.stack([compressor.arrange(layout.views, layout.prefix, of_image) for of_image in ranks])
    slots, left = torch.arange(order.shape[1]).expand_as(order), at.gather(1, order)
    if whole and layout.separators:  # all tokens remain: keep each separator at its place
        both = torch.cat([left, layout.places[layout.tokens :].expand(len(left), -1)], 1)
        ranking = both.argsort(dim=1, stable=True)
        slots, left = torch.where(ranking < order.shape[1], ranking, SEPARATOR), both.gather(1, ranking)
    token_maps = _joined(layout, views, order, slots).split()
    outputs = [view.anchors.shape[1] for view in views]
    return [
        Plan(layout, token_map, features, placeholders, places, outputs, layout.as_seen if whole else None)
        for token_map, features, placeholders, places in zip(
            token_maps, order.unbind(), slots.unbind(), left.tolist(), strict=True
        )
    ]


def _joined(
    layout: Layout,
    views: Sequence[ViewMaps],
    order: Int[Tensor, "images features"],
    slots: Int[Tensor, "images left"],
) -> TokenMap:
    """Return the map from an image's tokens and separators to the remaining placeholders; one row for each image."""
    maps = [view.token_map for view in views]
    device = maps[0].group.device
    (images, features), left = order.shape, torch.arange(slots.shape[1])
    # The remaining placeholder that each output fills. An extra column receives the writes of separators.
    output = torch.where(slots < 0, features, order.gather(1, slots.clamp(min=0)))
    fills = torch.zeros(images, features + 1, dtype=torch.long).scatter(1, output, left.expand_as(slots))[:, :-1]
    if len(maps) == 1 and not layout.separators:
        return maps[0] if bool((fills == left).all()) else maps[0].rearranged(fills.to(device))
    starts = accumulate((view.anchors.shape[1] for view in views), initial=0)
    output = torch.cat([torch.where(m.group < 0, -1, m.group + s) for m, s in zip(maps, starts, strict=False)], 1)
    group = torch.where(output < 0, -1, fills.to(device).gather(1, output.clamp(min=0)))
    weight, anchor = torch.cat([m.weight for m in maps], 1), torch.cat([m.anchor for m in maps], 1)
    added = _added(maps, [view.anchors.shape[1] for view in views], fills.to(device), layout.separators)
    # Separators: all remain, each in a group of one, or none does.
    stay = left.expand_as(slots)[slots < 0].view(images, -1).to(device)
    standing = stay if stay.shape[1] else torch.full((images, layout.separators), -1, device=device)
    return TokenMap(
        torch.cat([group, standing], 1),
        torch.cat([weight, (standing >= 0).to(weight.dtype)], 1),
        torch.cat([anchor, standing >= 0], 1),
        torch.full((images,), len(left), device=device),
        added,
    )


def _added(
    maps: Sequence[TokenMap], outputs: Sequence[int], fills: Int[Tensor, "images features"], separators: int
) -> Float[Tensor, "images left tokens"] | None:
    """Return the added weights of the views' maps for an image's tokens and separators, or `None` if there are none.

    `outputs` has the number of outputs of each view, `fills` the remaining placeholder that each output fills.
    """
    if all(token_map.added is None for token_map in maps):
        return None
    left = int(fills.max()) + 1
    joined, output = [], 0
    for token_map, count in zip(maps, outputs, strict=True):
        values = maps[0].weight.new_zeros(len(fills), left, token_map.group.shape[1])
        if token_map.added is not None:
            of_outputs = token_map.added[:, :count]
            place = fills[:, output : output + count, None].expand_as(of_outputs)
            values = values.scatter(1, place, of_outputs)
        joined.append(values)
        output += count
    return pad(torch.cat(joined, 2), (0, separators))


def _decide(layouts: Sequence[Layout], encoded: Encoded, compressor: Compressor | None) -> dict[int, ViewMap]:
    """Return the token map of each view, and the features and streams after it, by view number."""
    shares: list[Callable[[VisualTokens], TokenMap]] = [keep_all] * sum(len(layout.views) for layout in layouts)
    if isinstance(compressor, ComparesViews) and compressor.compares_views:
        measured = {n: m for g in encoded.groups for n, m in zip(g.numbers, compressor.measured(g.tokens), strict=True)}
        shares = []
        for layout, numbers in zip(layouts, view_numbers(layouts), strict=True):
            views = [measured[number] for number in numbers]
            shares += compressor.shared_by_content(views, are_frames=layout.is_video)
    elif compressor is not None:
        shares = [share for layout in layouts for share in compressor.shared(layout.views)]
    maps: dict[int, ViewMap] = {}
    for group in encoded.groups:
        for share, rows in numbers_by_kind(shares[number] for number in group.numbers).items():
            views = group if len(rows) == len(group.numbers) else group.rows(rows)
            token_map = share(views.tokens) if views.merged is None else views.merged.token_map
            if compressor is not None and 0 in token_map.lengths:
                raise UserError(f"{compressor.name()} left no token of an image; it must keep at least one")
            if views.merged is None:
                outputs = [token_map.apply(x) for x in (views.tokens.features, *views.streams)]
            else:
                outputs = [views.merged.features]
            together = ViewMaps(token_map, token_map.anchor_index().cpu(), tuple(outputs))
            seen = views.tokens.features.detach().unbind()
            for row, number in enumerate(views.numbers):
                maps[number] = ViewMap(together, row, seen[row] if views.merged is None else None)
    return maps


def least_counts(layouts: Sequence[Layout], compressor: Compressor) -> list[int]:
    """Return for each image the fewest placeholders that can remain before the LLM, whatever the image shows."""
    if compressor.stages()[0].site is Site.IN_LLM:
        return [layout.placeholders for layout in layouts]
    both = zip(layouts, _seen_by(compressor, layouts), strict=True)
    return [_with_separators(layout, seen, compressor.least_count(seen.views)) for layout, seen in both]


def counts_by_layer(
    layouts: Sequence[Layout], compressor: Compressor, layers: int, first_layer: int = 1
) -> list[list[int] | None]:
    """Return for each image its visual tokens at each LLM layer; `None` if they depend on what the image shows.

    `first_layer` is the first layer that may see fewer tokens.
    """
    counts: list[list[int] | None] = []
    for layout, seen in zip(layouts, _seen_by(compressor, layouts), strict=True):
        first, *others = seen.views
        by_layer = compressor.tokens_by_layer(Profile(first, layers, tuple(others), first_layer))
        counts.append(by_layer and [_with_separators(layout, seen, count) for count in by_layer])
    return counts


def _seen_by(compressor: Compressor, layouts: Sequence[Layout]) -> Sequence[Layout]:
    """Return the layouts as the compressor sees them."""
    seen, _ = without_padding(layouts, Encoded([]), compressor)
    if compressor.stages()[0].sees_clip:
        seen, _ = as_clips(seen, Encoded([]))
    return seen


def _with_separators(layout: Layout, seen: Layout, count: int) -> int:
    """Return the placeholders that remain for `count` tokens: a compressor that keeps all leaves separators, too.

    `seen` is the layout as the compressor sees it.
    """
    whole = sum(grid.size for grid in seen.views)
    return layout.placeholders if count >= whole else min(count, layout.placeholders)


def without_padding(
    layouts: Sequence[Layout], encoded: Encoded, compressor: Compressor | None
) -> tuple[Sequence[Layout], Encoded]:
    """Return layouts and views as the compressor sees them: without the padding of tiles, unless it needs that."""
    if (compressor and compressor.whole_views) or all(layout.is_seen_whole for layout in layouts):
        return layouts, encoded
    unpadded = {layout: layout.unpadded() for layout in dict.fromkeys(layouts)}
    both = [unpadded[layout] for layout in layouts]
    windows = [window for _, of_image in both for window in of_image]
    grids = [grid for layout in layouts for grid in layout.views]
    new_number, numbers = 0, []
    for window in windows:
        numbers.append(None if window is None else new_number)
        new_number += window is not None
    groups: list[Views] = []
    for group in encoded.groups:
        for window, rows in numbers_by_kind(windows[number] for number in group.numbers).items():
            if window is None:
                continue
            views = group.rows(rows)
            tokens = window.tokens(grids[views.numbers[0]], views.tokens.prefix).to(views.tokens.features.device)
            groups.append(
                Views(
                    views.tokens.window(window.rows, window.cols),
                    [new for number in views.numbers if (new := numbers[number]) is not None],
                    tuple(stream[:, tokens] for stream in views.streams),
                    views.merged and views.merged.of_inputs(tokens),
                )
            )
    return [layout for layout, _ in both], replace(encoded, groups=groups)


def as_clips(layouts: Sequence[Layout], encoded: Encoded) -> tuple[Sequence[Layout], Encoded]:
    """Return layouts and views in which each video is one view of all its frames."""
    clips = [layout.as_clip for layout in layouts]
    # The numbers of the views that form each view of the result.
    numbers_of = {
        clip: range(start, start + len(before) // len(after))
        for before, after in zip(view_numbers(layouts), view_numbers(clips), strict=True)
        for clip, start in zip(after, range(before.start, before.stop, len(before) // len(after)), strict=True)
    }
    groups = []
    for group in encoded.groups:
        row_of = {number: row for row, number in enumerate(group.numbers)}
        inside = [clip for clip, numbers in numbers_of.items() if numbers[0] in row_of]
        for places in numbers_by_kind(len(numbers_of[clip]) for clip in inside).values():
            chosen = [inside[place] for place in places]
            rows = [[row_of[number] for number in numbers_of[clip]] for clip in chosen]
            index = torch.tensor(rows, device=group.tokens.features.device)
            prefix = group.tokens.prefix
            streams = tuple(frames_joined(stream[index], prefix) for stream in group.streams)
            groups.append(Views(group.tokens.clips(index), chosen, streams))
    return clips, replace(encoded, groups=groups)


def view_numbers(layouts: Sequence[Layout]) -> list[range]:
    """Return the view numbers of each image, counted through all images."""
    ends = list(accumulate(len(layout.views) for layout in layouts))
    return [range(end - len(layout.views), end) for layout, end in zip(layouts, ends, strict=True)]


def in_order(
    parts: Sequence[Float[Tensor, "*images _ dim"]], order: Int[Tensor, "*images features"]
) -> Float[Tensor, "*images features dim"]:
    """Join the outputs of all views of one or several images, and reorder them by `order`."""
    together = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-2)
    if bool((order == torch.arange(order.shape[-1])).all()):
        return together
    index = order.to(together.device)
    if order.ndim == 1:
        return together[index]
    return together[torch.arange(len(order), device=index.device)[:, None], index]


def encoded_again(
    features: Sequence[Float[Tensor, "_ dim"]],
    streams: Sequence[Sequence[Float[Tensor, "_ stream_dim"]]],
    left: Sequence[Layout | None],
) -> tuple[list[Layout], Encoded]:
    """Return the layouts and the views of the remaining tokens of images, for a further compressor.

    `left` has the layout of each image's remaining tokens. If it is `None`, they form one view without a grid. Images
    that share a layout form a batch.
    """
    counts = {len(tokens) for tokens, layout in zip(features, left, strict=True) if layout is None}
    without_grid = {count: Layout.of_one_view(Grid(1, 1, count)) for count in counts}
    layouts = [layout or without_grid[len(tokens)] for tokens, layout in zip(features, left, strict=True)]
    first_views, groups = [numbers[0] for numbers in view_numbers(layouts)], []
    for layout, images in numbers_by_kind(layouts).items():
        by_token = layout.slots[layout.slots >= 0].argsort().expand(len(images), -1)
        kinds = zip(*([features[image], *streams[image]] for image in images), strict=True)
        values, *others = (in_order([torch.stack(tensors)], by_token) for tensors in kinds)
        has_grid = left[images[0]] is not None
        for view, (grid, (start, end)) in enumerate(zip(layout.views, pairwise(layout.starts), strict=True)):
            tokens = VisualTokens(values[:, start:end], grid if has_grid else None, layout.prefix, passes_prefix=True)
            numbers = [first_views[image] + view for image in images]
            groups.append(Views(tokens, numbers, tuple(stream[:, start:end] for stream in others)))
    return layouts, Encoded(groups)
