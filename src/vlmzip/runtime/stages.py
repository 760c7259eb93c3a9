"""The stages of an image before the LLM: encode, compress, project, compress again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmzip.compressor import Compressor, MergesInEncoder
from vlmzip.errors import ADD_A_FAMILY, UserError
from vlmzip.models.family import Family
from vlmzip.models.layout import Encoded, Layout, MergeTarget, Views, numbers_by_kind
from vlmzip.processor import InputDict, Inputs
from vlmzip.resampler import Resampler
from vlmzip.runtime.compress import Plan, compress, encoded_again, in_order, view_numbers
from vlmzip.runtime.fitting import before_the_llm
from vlmzip.runtime.other_methods import names_other_methods
from vlmzip.runtime.questions import with_questions
from vlmzip.runtime.report import CompressedImage, ImageReport, Stopwatch
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Signal, Site, VisualTokens


@names_other_methods
def compress_images(
    family: Family,
    inputs: Inputs,
    compressor: Compressor,
    watch: Stopwatch,
    resampler: nn.Module | None,
    *,
    ascending: bool = False,
) -> tuple[list[CompressedImage], Inputs | None]:
    """Encode, compress and project the images; the projector gets only the remaining tokens.

    `family` serves images or videos; a video is an image here, with its frames as views. Return the images in order of
    appearance. Also return the inputs of the encoder if a compressor at the pixel site
    made the images smaller, otherwise `None`. `ascending`: tokens keep their positions, so the output tokens of each
    compressor are in the order of their anchors.
    """
    stages = before_the_llm(compressor)
    first, later = stages[0] if stages else None, stages[1:]
    smaller = None
    layouts = family.layouts(inputs)
    if isinstance(first, Resampler):
        images, separator = _resample(family, inputs, layouts, first, resampler, watch), None
    elif first is not None and first.drops_patches:
        images, separator = _encode_part(family, inputs, layouts, first, watch, ascending=ascending), None
    elif first is not None and first.site is Site.PIXELS:
        images, separator, smaller = _encode_smaller(family, inputs, layouts, first, watch, ascending=ascending)
    else:
        images, separator = _encode_and_compress(family, inputs, layouts, first, watch, ascending=ascending)
    for stage in later:
        with watch.time("selection"):
            images = _compress_projected(stage, images, ascending=ascending)
    with watch.time("bookkeeping"):
        return [image.with_separators(separator) for image in images], smaller


def encode(
    family: Family, inputs: Inputs, site: Site, compressor: Compressor | None, layouts: Sequence[Layout]
) -> Encoded:
    """Return the visual tokens of all images at `site`, with the signals that `compressor` needs."""
    if compressor is None:
        return family.encode(inputs, site, frozenset())
    if site is Site.ENCODER:
        if not isinstance(compressor, MergesInEncoder):
            raise UserError(
                f"{compressor.name()} cannot act at site 'encoder': it lacks the methods counts_by_layer and join"
            )
        return family.encode_merging(inputs, compressor, _merge_targets(compressor, layouts))
    encoded = family.encode(inputs, site, compressor.needs, compressor.encoder_layers)
    return with_questions(encoded, family, inputs, layouts) if Signal.TEXT_FEATURES in compressor.needs else encoded


def _merge_targets(compressor: Compressor, layouts: Sequence[Layout]) -> list[MergeTarget | None]:
    """Return what the encoder is to leave of each view of all images; `None` for views that are padding."""
    targets: list[MergeTarget | None] = []
    for layout in layouts:
        seen, windows = layout.unpadded()
        both = zip(compressor.shared(seen.views), seen.views, strict=True)
        counts = ((grid.size, share.token_count(grid)) for share, grid in both)
        for window in windows:
            if window is None:
                targets.append(None)
                continue
            size, left = next(counts)
            targets.append(MergeTarget(window, size, size if left is None else min(left, size)))
    return targets


def encoder_outputs(family: Family, images: Sequence[CompressedImage]) -> dict[str, BaseModelOutputWithPooling]:
    """Return `mm_encoder_outputs` for images and videos in order of appearance."""
    outputs: dict[str, BaseModelOutputWithPooling] = {}
    for each in family.modalities:
        mine = [image for image in images if image.report.modality == each.modality]
        if mine:
            features, streams = [image.features for image in mine], [image.streams for image in mine]
            outputs |= each.encoder_outputs(features, streams, mine[0].further)
    return outputs


def _encode_and_compress(
    family: Family,
    inputs: Inputs,
    layouts: Sequence[Layout],
    compressor: Compressor | None,
    watch: Stopwatch,
    *,
    ascending: bool,
) -> tuple[list[CompressedImage], Float[Tensor, " llm_dim"] | None]:
    """Return the images after the first compressor and the projector, and the feature of a separator."""
    site = Site.PRE_PROJECTOR if compressor is None else compressor.site
    with watch.time("encoder"):
        encoded = encode(family, inputs, site, compressor, layouts)
    with watch.time("selection"):
        kept = compress(layouts, encoded, compressor, ascending=ascending)
    features = _project(family, [image.features for image in kept], site, watch)
    with watch.time("bookkeeping"):
        images = [
            _compressed(family, layout, image.plan, projected, image.streams, image.seen, encoded)
            for layout, image, projected in zip(layouts, kept, features, strict=True)
        ]
    return images, encoded.separator


def _project(
    family: Family, features: Sequence[Float[Tensor, "_ dim"]], site: Site, watch: Stopwatch
) -> Sequence[Float[Tensor, "_ llm_dim"]]:
    """Project the tokens of all images in one call of the projector; return those of each image."""
    with watch.time("projector"):
        return family.project(torch.cat(list(features)), site).split([len(values) for values in features])


def _compressed(
    family: Family,
    layout: Layout,
    plan: Plan,
    features: Float[Tensor, "_ llm_dim"],
    streams: Sequence[Tensor],
    seen: tuple[Float[Tensor, "_ dim"], ...] | None,
    encoded: Encoded,
) -> CompressedImage:
    """Return an image with its projected tokens. The row of its report is -1 until its placeholders are found."""
    after = len(plan.places)
    report = ImageReport(
        row=-1,
        before=layout.placeholders,
        after=after,
        by_layer=(after,) * len(family.decoder_layers),
        token_map=plan.token_map,
        layout=plan.layout,
        view_features=seen,
        modality=family.modality,
    )
    return CompressedImage(features, tuple(streams), plan.slots, plan.places, report, plan.left, encoded.further)


def _encode_smaller(
    family: Family,
    inputs: Inputs,
    layouts: Sequence[Layout],
    compressor: Compressor,
    watch: Stopwatch,
    *,
    ascending: bool,
) -> tuple[list[CompressedImage], Float[Tensor, " llm_dim"] | None, InputDict]:
    """Return the projected tokens of smaller views, the feature of a separator, and `inputs` with the smaller views.

    The full-size views are never encoded, so the compressor makes its map from tokens without features.
    """
    grids = [grid for layout in layouts for grid in layout.views]
    shares = [share for layout in layouts for share in compressor.shared(layout.views)]
    with watch.time("selection"):
        targets = [share.smaller(grid) for share, grid in zip(shares, grids, strict=True)]
    if targets == grids:
        images, separator = _encode_and_compress(family, inputs, layouts, None, watch, ascending=ascending)
        return images, separator, dict(inputs)
    with watch.time("selection"):
        smaller = {**inputs, **family.downsample(inputs, targets)}
    grid_of = {n: grid for batch in family.batches(smaller) for n, grid in zip(batch.numbers, batch.grids, strict=True)}
    if [grid_of[number] for number in sorted(grid_of)] != targets:
        raise UserError(
            f"{type(family).__name__}.layouts does not return the grids to which its downsample resized the images:"
            " it must follow the shapes of the pixels, not the placeholders of the prompt; see"
            f" {ADD_A_FAMILY}"
        )
    with watch.time("encoder"):
        encoded = family.encode(smaller, Site.PRE_PROJECTOR, frozenset())
    with watch.time("bookkeeping"):
        kept = compress(layouts, _without_features(layouts, encoded), compressor, ascending=ascending)
        plans = [image.plan for image in kept]
        by_view = {
            number: [values[row] for values in (group.tokens.features, *group.streams)]
            for group in encoded.groups
            for row, number in enumerate(group.numbers)
        }
        left = []
        for numbers, plan in zip(view_numbers(layouts), plans, strict=True):
            # The prefix comes first. The last `count` tokens leave it out if the plan has no outputs for it.
            views = [
                [values[len(values) - count :] for values in by_view[number]]
                for number, count in zip(numbers, plan.outputs, strict=True)
            ]
            left.append([in_order(parts, plan.order) for parts in zip(*views, strict=True)])
    projected = _project(family, [features for features, *_ in left], Site.PRE_PROJECTOR, watch)
    images = [
        _compressed(family, layout, plan, features, streams, None, encoded)
        for layout, plan, features, (_, *streams) in zip(layouts, plans, projected, left, strict=True)
    ]
    return images, encoded.separator, smaller


def _encode_part(
    family: Family,
    inputs: Inputs,
    layouts: Sequence[Layout],
    compressor: Compressor,
    watch: Stopwatch,
    *,
    ascending: bool,
) -> list[CompressedImage]:
    """Return the projected tokens that remain by their pixels. The encoder gets only their patches."""
    with watch.time("selection"):
        kept = compress(layouts, family.token_pixels(inputs), compressor, ascending=ascending)
        plans = [image.plan for image in kept]
        marks = [plan.token_map.anchor[0] for plan in plans]
    with watch.time("encoder"):
        encoded = family.encode_part(inputs, torch.cat(marks))
    with watch.time("bookkeeping"):
        left = []
        for plan, mark, group in zip(plans, marks, encoded.groups, strict=True):
            # The encoder returns the kept tokens in the order of their places; put them into that of the plan.
            order = (mark.cumsum(0) - 1)[plan.token_map.anchor_index()[0]]
            left.append([values[0, order] for values in (group.tokens.features, *group.streams)])
    projected = _project(family, [features for features, *_ in left], Site.PRE_PROJECTOR, watch)
    return [
        _compressed(family, layout, plan, features, streams, None, encoded)
        for layout, plan, features, (_, *streams) in zip(layouts, plans, projected, left, strict=True)
    ]


def _without_features(layouts: Sequence[Layout], encoded: Encoded) -> Encoded:
    """Return all views at full size, with features of width 0."""
    like = encoded.groups[0].tokens
    kinds = [(grid, layout.prefix, layout.passes_prefix) for layout in layouts for grid in layout.views]
    return Encoded(
        [
            Views(
                VisualTokens(
                    like.features.new_zeros(len(numbers), prefix + grid.size, 0), grid, prefix, passes_prefix=passed
                ),
                numbers,
            )
            for (grid, prefix, passed), numbers in numbers_by_kind(kinds).items()
        ]
    )


def _compress_projected(
    compressor: Compressor, images: Sequence[CompressedImage], *, ascending: bool
) -> list[CompressedImage]:
    """Return the images after a further compressor, which acts after the projector."""
    layouts, encoded = encoded_again(
        [image.features for image in images], [image.streams for image in images], [image.left for image in images]
    )
    kept = compress(layouts, encoded, compressor, ascending=ascending)
    token_maps = _followed(images, [image.plan for image in kept], layouts)
    compressed = []
    for image, after, token_map in zip(images, kept, token_maps, strict=True):
        plan, count = after.plan, len(after.plan.places)
        report = replace(image.report, after=count, by_layer=(count,) * len(image.report.by_layer), token_map=token_map)
        places = [image.places[place] for place in plan.places]
        compressed.append(
            CompressedImage(
                after.features, after.streams, plan.slots, places, report, image.left and plan.left, image.further
            )
        )
    return compressed


def _followed(
    images: Sequence[CompressedImage], plans: Sequence[Plan], layouts: Sequence[Layout]
) -> list[TokenMap | None]:
    """Return the map of each image followed by the map of its plan; `None` after a resampler, which has no map.

    Images with equally many tokens before and after the first compressor take as many tensor operations as one.
    """
    followed: list[TokenMap | None] = [None] * len(images)
    befores = [image.report.token_map for image in images]
    kinds = [(layout, before and before.group.shape[1]) for layout, before in zip(layouts, befores, strict=True)]
    for numbers in numbers_by_kind(kinds).values():
        maps = [before for number in numbers if (before := befores[number]) is not None]
        if maps:
            second = TokenMap.stack([plans[number].token_map for number in numbers])
            second = second.of_inputs(plans[numbers[0]].layout.numbers)  # the plan's layout may join frames to a clip
            for number, token_map in zip(numbers, TokenMap.stack(maps).then(second).split(), strict=True):
                followed[number] = token_map
    return followed


def _resample(
    family: Family,
    inputs: Inputs,
    layouts: Sequence[Layout],
    compressor: Resampler,
    resampler: nn.Module | None,
    watch: Stopwatch,
) -> list[CompressedImage]:
    """Return the images with every view encoded and resampled. The model's projector is not used."""
    if resampler is None:
        raise UserError(f"{compressor.name()} has weights: use what vlmzip.attach returns, which holds them")
    with watch.time("encoder"):
        encoded = family.encode(inputs, compressor.site, compressor.needs)
    by_view: dict[int, Tensor] = {}
    widths = [stream.shape[-1] for stream in encoded.groups[0].streams]
    for group in encoded.groups:
        with watch.time("selection"):
            by_view |= dict(zip(group.numbers, resampler(group.tokens.features), strict=True))
    images = []
    for layout, numbers in zip(layouts, view_numbers(layouts), strict=True):
        features = torch.cat([by_view[number] for number in numbers])
        before, after = layout.placeholders, len(features)
        # Spread the tokens evenly over the placeholders, so that `report.source` is defined. Positions ignore it.
        places = [n * before // after for n in range(after)]
        report = ImageReport(
            -1, before, after, (after,) * len(family.decoder_layers), None, layout, None, family.modality
        )
        nothing = tuple(features.new_zeros(after, width) for width in widths)  # later layers of the LLM add these zeros
        images.append(CompressedImage(features, nothing, torch.arange(after), places, report, None, encoded.further))
    return images
