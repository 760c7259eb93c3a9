"""InLLMState the LLM: what the compressors decide at their layers, and what every later layer sees of it.

At layer K the hidden states of dropped tokens go, and merged states are written at their group's anchor. From there on
hidden states, position tables, mask and KV cache are shorter; tokens keep their positions. Outside the LLM everything
keeps its full length: prompt, mask, and the cache of the layers before K, from which transformers counts positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.models.adapter import ModelAdapter
from vlmzip.models.layout import Layout
from vlmzip.models.recording import attention_rows
from vlmzip.runtime.masks import shrink_mask
from vlmzip.runtime.prompt import PER_TOKEN, Span, gather
from vlmzip.runtime.report import Report, Stopwatch
from vlmzip.runtime.versions import argument
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, Signal, VisualTokens


@dataclass(frozen=True)
class Prompt:
    """The part of a prompt that goes through the LLM in one call, as far as compressors inside it need to know."""

    spans: list[Span]
    """Its images; columns count from the beginning of the conversation."""
    real: Bool[Tensor, "batch length"]
    """Which tokens of the conversation are no padding."""
    question_ends: list[int]
    """For each image the column of its question's last token: the one before the next label, or the last of all."""

    def row(self, row: int) -> Prompt:
        """One row as a prompt of its own."""
        own = [n for n, span in enumerate(self.spans) if span.row == row]
        spans = [replace(self.spans[n], row=0) for n in own]
        return Prompt(spans, self.real[row : row + 1], [self.question_ends[n] for n in own])


@dataclass
class LayerCut:
    """What became of the tokens that entered one layer."""

    merges: list[tuple[Int[Tensor, " images"], Int[Tensor, "images tokens"], TokenMap]]
    """Rows, columns and map of the images, by groups of equal grid and count."""
    source: Int[Tensor, "batch kept"]
    """For each token left its column among those that entered the layer; -1: padding."""
    here: Int[Tensor, "batch kept"]
    """For each token left its column among those that entered the LLM in this forward; -1: padding."""
    keys: Int[Tensor, "batch all_kept"]
    """Column in the conversation of every token in the layer's cache; -1: padding."""
    places: list[Int[Tensor, " tokens"]]
    """For each image the columns of what is left of it."""
    padded: bool
    tables: dict[str, Any] = field(default_factory=dict)
    """Mask and positions for the layers behind; they are the same for all, and made once."""


@dataclass
class Part:
    """Tokens on which a compressor acts together at one layer: a view of an image, or all that is left of the image."""

    image: int
    compressor: Compressor
    inside: Int[Tensor, " tokens"]
    """Which of what is left of the image they are."""
    columns: Int[Tensor, " tokens"]
    """Their columns among the tokens that entered the layer."""
    grid: Grid | None
    prefix: int
    entered: int
    """Tokens of the whole image as it entered the LLM."""
    token_map: TokenMap = field(init=False)
    """What becomes of them, in the order of anchors."""


class InLLMState:
    """One call of the model: carries the decisions from layer to layer, and from step to step of `generate`."""

    def __init__(
        self,
        adapter: ModelAdapter,
        compressors: Sequence[Compressor],
        prompt: Prompt | None,
        watch: Stopwatch,
        keys: dict[int, Tensor] | None = None,
    ) -> None:
        self.adapter, self.watch = adapter, watch
        self.at = {layer: compressor for compressor in compressors for layer in compressor.layers}
        self.watched = {layer - 1 for layer, c in self.at.items() if Signal.TEXT_ATTENTION in c.needs}
        self.prompt = prompt
        self.keys = dict(keys or {})
        """For each compressing layer, what its cache holds (see `LayerCut.keys`)."""
        self.cache: Any = None
        """The KV cache of the call; it stays `None` if the call runs without one."""
        self.started = False
        self.first: LayerState | None = None
        """The step that took in the images."""

    def row(self, row: int) -> InLLMState:
        """The same for one row of the prompt alone."""
        prompt = None if self.prompt is None else self.prompt.row(row)
        keys = {layer: own[row : row + 1] for layer, own in self.keys.items()}
        return InLLMState(self.adapter, list(dict.fromkeys(self.at.values())), prompt, self.watch, keys)

    def step(self, embeddings: Float[Tensor, "batch length dim"], cache: Any) -> LayerState | None:
        """The state of one forward of the LLM, `None` where no layer has anything to do."""
        if self.started and cache is not self.cache:
            _refuse_part_of_another_cache(cache)
            return None  # a logits processor, such as that of guidance_scale, asks the model something else
        past = 0 if cache is None else cache.get_seq_length()
        prompt = self._prompt_for(embeddings.shape[1], past)
        self.started, self.cache = True, cache
        if past == 0:
            self.keys = {}
        if prompt is None and not self.keys:
            return None
        _refuse_other_caches(cache)
        step = LayerState(self, prompt, embeddings.detach(), past, cache)
        if prompt is not None and prompt.spans and self.first is None:
            self.first = step
        return step

    def _prompt_for(self, length: int, past: int) -> Prompt | None:
        """The prompt that this forward takes in; without a KV cache that is all of it, at every step."""
        if not self.started:
            return self.prompt
        if past or self.prompt is None:
            return None
        new = length - self.prompt.real.shape[1]
        if new < 0:
            raise UserError(
                "the KV cache was not filled, so this answer cannot go on: call model.eval() before generate, or"
                " switch off gradient checkpointing"
            )
        return replace(self.prompt, real=nn.functional.pad(self.prompt.real, (0, new), value=True))


class LayerState:
    """One forward of the LLM. It travels with the arguments of the layers, also into a recomputation of them."""

    def __init__(self, inside: InLLMState, prompt: Prompt | None, embeddings: Tensor, past: int, cache: Any) -> None:
        self.inside, self.past, self.cache, self.embeddings = inside, past, cache, embeddings
        self.batch, self.length = embeddings.shape[:2]
        rows = self.batch if prompt is None else len(prompt.real)
        self.copies = self.batch // rows
        """`generate` repeats the rows of a prompt for beams and several sequences."""
        spans = [] if prompt is None else prompt.spans
        self.spans = [replace(s, row=s.row * self.copies + c) for s in spans for c in range(self.copies)]
        device = embeddings.device
        if prompt is not None:
            self.real = prompt.real[:, past : past + self.length].to(device).repeat_interleave(self.copies, 0)
            self.ends = [end - past for end in prompt.question_ends for _ in range(self.copies)]
        self.places = [torch.tensor(span.columns, device=device) - past for span in self.spans]
        self.decided: dict[int, LayerCut | None] = {}
        self.layouts: list[Layout | None] = [span.layout for span in self.spans]
        """For each image how what is left of it lies on the grids of its views, if nothing is gone."""
        self.maps: list[list[tuple[int, TokenMap]]] = [[] for _ in self.spans]
        """For each image the maps of the layers, in order."""
        self.attention: dict[int, Float[Tensor, "batch queries kept"]] = {}
        """For each watched layer the attention of the question to the tokens of this forward."""
        if self.spans:
            self.is_text = self.real.clone()
            for span, columns in zip(self.spans, self.places, strict=True):
                self.is_text[span.row, columns] = False
            self.queries = self._queries()

    # --- at a layer -------------------------------------------------------------------------------------------

    def enter(
        self, index: int, layer: nn.Module, hidden: Float[Tensor, "batch length dim"], arguments: dict[str, Any]
    ) -> Float[Tensor, "batch kept dim"]:
        """The hidden states for layer `index`; shortens mask and positions in `arguments` to match."""
        if index in self.inside.at:
            if index not in self.decided:  # a recomputation finds the decision of the first run
                with torch.no_grad(), self._timed():
                    self.decided[index] = self._decide(index, hidden)
            hidden = _merge_and_drop(hidden, self.decided[index])
        decision = self._latest(index)
        if decision is not None:
            self._shorten_arguments(decision, hidden, arguments)
        if index in self.inside.watched and index + 1 not in self.decided and self.spans:
            with torch.no_grad(), self._timed():
                self.attention[index] = self._attention(index, layer, hidden, arguments)
        return hidden

    def _timed(self) -> AbstractContextManager[None]:
        """Selection is where images come in; what later steps do is to follow it."""
        return self.inside.watch.time("selection") if self.spans else nullcontext()

    def _latest(self, index: int) -> LayerCut | None:
        layers = [layer for layer in self.decided if layer <= index]
        return self.decided[max(layers)] if layers else None

    def _decide(self, index: int, hidden: Float[Tensor, "batch length dim"]) -> LayerCut | None:
        before = self._latest(index)
        past_keys = self.inside.keys.get(index)
        if not self.spans and past_keys is None:
            return None
        batch, length, device = *hidden.shape[:2], hidden.device
        if self.spans:
            merges, kept, targets = self._compress(index, hidden, before)
            source = _compact(kept, self._pad_right)
            places = _follow(targets, [span.row for span in self.spans], source, length)
        else:
            merges, places = [], []
            source = torch.arange(length, device=device).expand(batch, -1)
        here = source if before is None else _gather(before.here, source)
        past_keys = torch.arange(self.past, device=device).expand(batch, -1) if past_keys is None else past_keys
        keys = torch.cat([past_keys, torch.where(here < 0, -1, here + self.past)], 1)
        self.inside.keys[index] = keys
        return LayerCut(merges, source, here, keys, places, padded=bool((keys < 0).any()))

    def _compress(
        self, index: int, hidden: Float[Tensor, "batch length dim"], before: LayerCut | None
    ) -> tuple[list[Any], Bool[Tensor, "batch length"], list[Tensor]]:
        """Maps for all images; which tokens stay; for each image the columns of its output tokens."""
        kept = self.real.clone() if before is None else before.here >= 0
        places = self.places if before is None else before.places
        parts = self._parts(index, places)
        merges: list[tuple[Tensor, Tensor, TokenMap]] = []
        for group in _alike(parts):
            rows = torch.tensor([self.spans[part.image].row for part in group], device=hidden.device)
            columns = torch.stack([part.columns for part in group])
            token_map = group[0].compressor(self._tokens(index, group, rows, columns, hidden, before))
            token_map = token_map.in_anchor_order()
            if 0 in token_map.lengths:
                name = self.inside.at[index].name()
                raise UserError(f"{name} left no token of an image; it must keep at least one")
            for n, part in enumerate(group):
                part.token_map = token_map.rows(slice(n, n + 1))
            merges.append((rows, columns, token_map))
        targets = []
        for image, columns in enumerate(places):
            own = [part for part in parts if part.image == image]
            whole = sum(part.token_map.lengths[0] for part in own) == sum(len(part.inside) for part in own)
            if not whole:
                self.layouts[image] = None
            image_map = _joined(own, len(columns), separators_stay=whole)
            self.maps[image].append((index, image_map))
            anchors = image_map.anchor_index()[0]
            kept[self.spans[image].row, columns] = False
            kept[self.spans[image].row, columns[anchors]] = True
            targets.append(columns[anchors])
        return merges, kept, targets

    def _parts(self, index: int, places: list[Tensor]) -> list[Part]:
        """What the compressor at layer `index` acts on: views of images, or images as a whole."""
        compressor, parts = self.inside.at[index], []
        for image, (columns, layout) in enumerate(zip(places, self.layouts, strict=True)):
            choices: list[tuple[Compressor, Tensor, Grid | None, int]] = []
            if layout is None:
                choices.append((compressor, torch.arange(len(columns)), None, 0))
            elif len(layout.views) > 1 and not compressor.by_view:
                choices.append((compressor, (layout.slots >= 0).nonzero()[:, 0], None, 0))
            else:
                for n, share in enumerate(compressor.shared(layout.views)):
                    choices.append((share, layout.placeholders_of(n), layout.views[n], layout.prefix))
            for share, inside, grid, prefix in choices:
                inside = inside.to(columns.device)
                parts.append(Part(image, share, inside, columns[inside], grid, prefix, len(self.places[image])))
        return parts

    def _tokens(
        self, index: int, parts: list[Part], rows: Tensor, columns: Tensor, hidden: Tensor, before: LayerCut | None
    ) -> VisualTokens:
        """What the compressor at layer `index` may look at, for parts that are alike."""
        needs = self.inside.at[index].needs
        images = [part.image for part in parts]
        optional: dict[str, Any] = {}
        if needs:
            asks = _compact(self._question(images, rows), pad_right=False)
            optional["query_mask"] = asks >= 0
        if Signal.TEXT_ATTENTION in needs:
            attention = self.attention[index - 1][rows[:, None], asks.clamp(min=0)]
            optional["text_attention"] = attention.gather(2, columns[:, None].expand(-1, asks.shape[1], -1))
        if Signal.TEXT_FEATURES in needs:
            optional["text_features"] = self.embeddings[rows[:, None], self.queries[rows].gather(1, asks.clamp(min=0))]
            optional["llm_input"] = torch.stack([self.embeddings[self.spans[n].row, self.places[n]] for n in images])
        features = hidden[rows[:, None], columns].detach()
        grid, prefix = parts[0].grid, parts[0].prefix
        return VisualTokens(features, grid, prefix, layer=index, passes_prefix=True, **optional)

    # --- what travels along -----------------------------------------------------------------------------------

    def _shorten_arguments(self, decision: LayerCut, hidden: Tensor, arguments: dict[str, Any]) -> None:
        tables = decision.tables
        given = argument(arguments, "attention_mask", "a decoder layer")
        if "mask" not in tables or tables["mask_given"] is not given:
            flash = "flash" in (self.inside.adapter.llm_config._attn_implementation or "")
            tables["mask_given"] = given
            tables["mask"] = shrink_mask(given, decision.here, decision.keys, self.past, decision.padded, flash=flash)
        arguments["attention_mask"] = tables["mask"]
        cos_sin = argument(arguments, "position_embeddings", "a decoder layer")
        if "positions" not in tables or tables["positions_given"] is not cos_sin:
            here = decision.here.clamp(min=0)
            tables["positions_given"] = cos_sin
            tables["positions"] = tuple(
                table.expand(self.batch, -1, -1).gather(1, here[..., None].expand(-1, -1, table.shape[-1]))
                for table in cos_sin
            )
            ids = argument(arguments, "position_ids", "a decoder layer")
            tables["ids"] = None if ids is None else ids.expand(self.batch, -1).gather(1, here)
        arguments["position_embeddings"], arguments["position_ids"] = tables["positions"], tables["ids"]

    def _queries(self) -> Int[Tensor, "batch queries"]:
        """The columns of the text behind each row's first image, and of the ends of questions; -1: padding."""
        device = self.real.device
        first = torch.full((self.batch,), self.length, device=device)
        last = torch.full((self.batch,), -1, device=device)
        ends = torch.zeros_like(self.real)
        for span, columns, end in zip(self.spans, self.places, self.ends, strict=True):
            ends[span.row, end] = True
            first[span.row] = torch.minimum(first[span.row], columns[0])
            last[span.row] = last[span.row].clamp(min=end)
        column = torch.arange(self.length, device=device)
        asks = self.is_text & (column > first[:, None]) & (column <= last[:, None]) | ends
        return _compact(asks, pad_right=False)

    def _question(self, images: list[int], rows: Int[Tensor, " images"]) -> Bool[Tensor, "images queries"]:
        """Which of their row's queries ask about each image: the text behind it, up to the end of its question.

        Where no text follows the image, the end alone, whatever it is.
        """
        queries = self.queries[rows]
        ends = torch.tensor([self.ends[p] for p in images], device=queries.device)[:, None]
        asks = (queries > torch.stack([self.places[p][-1] for p in images])[:, None]) & (queries <= ends)
        asks &= self.is_text[rows].gather(1, queries.clamp(min=0))
        return asks | ((queries == ends) & ~asks.any(1, keepdim=True))

    def _attention(
        self, index: int, layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]
    ) -> Float[Tensor, "batch queries kept"]:
        """The question's attention at layer `index` to the tokens of this forward, mean over heads."""
        decision = self._latest(index)
        here = torch.arange(self.length, device=hidden.device).expand(self.batch, -1)
        keys = torch.arange(self.past + self.length, device=hidden.device).expand(self.batch, -1)
        if decision is not None:
            here, keys = decision.here, decision.keys
        # Where the question's tokens stand now. Text is never dropped; an image's last token may be: the one before.
        slot = torch.arange(here.shape[1], device=here.device)
        standing = (here >= 0)[:, None] & (here[:, None] <= self.queries.clamp(min=0)[..., None])
        queries = torch.where(standing, slot, 0).amax(-1)
        query, key = self.inside.adapter.queries_and_keys(layer, hidden, arguments["position_embeddings"], queries)
        if self.past:
            key = torch.cat([self.cache.layers[index].keys.to(key.device), key], dim=2)
        mask = argument(arguments, "attention_mask", "a decoder layer")
        if mask is None or mask.ndim == 2:
            real = (keys >= 0) if mask is None else mask.bool()
            column = _gather(here, queries) + self.past
            allowed = real[:, None] & (keys[:, None] <= column[..., None])
        else:
            rows = mask.expand(self.batch, 1, -1, -1)[:, 0]
            rows = rows.gather(1, queries[..., None].expand(-1, -1, rows.shape[-1]))
            allowed = rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2
        rows = attention_rows(query, key, allowed, query.shape[-1] ** -0.5)
        return rows[..., -hidden.shape[1] :]

    @property
    def _pad_right(self) -> bool:
        return bool((~self.real[:, -1]).any())

    def here(self) -> Int[Tensor, "batch kept"] | None:
        """For each token behind the last layer its column in this forward, without the copies of rows."""
        last = self._latest(len(self.inside.adapter.decoder_layers))
        return None if last is None else last.here[:: self.copies]


def _alike(parts: list[Part]) -> list[list[Part]]:
    """Parts whose tokens form one `VisualTokens`."""
    groups: dict[Any, list[Part]] = {}
    for part in parts:
        kind = (part.compressor, part.grid, part.prefix, part.entered, len(part.columns))
        groups.setdefault(kind, []).append(part)
    return list(groups.values())


def _joined(parts: list[Part], count: int, *, separators_stay: bool) -> TokenMap:
    """The map of the `count` tokens left of an image from the maps of its parts, in the order of anchors.

    Tokens in no part are separators: they stay only where nothing else goes.
    """
    (first, *others) = parts
    if not others and len(first.inside) == count:
        return first.token_map
    device = first.inside.device
    group = torch.full((count,), -1, device=device)
    weight, anchor = torch.zeros(count, device=device), torch.zeros(count, dtype=torch.bool, device=device)
    outputs = 0
    for part in parts:
        own = part.token_map
        group[part.inside] = torch.where(own.group[0] < 0, -1, own.group[0] + outputs)
        weight[part.inside] = own.weight[0]
        anchor[part.inside] = own.anchor[0]
        outputs += own.lengths[0]
    if separators_stay:
        alone = torch.ones(count, dtype=torch.bool, device=device)
        alone[torch.cat([part.inside for part in parts])] = False
        group[alone] = outputs + torch.arange(int(alone.sum()), device=device)
        weight[alone], anchor[alone] = 1.0, True
        outputs += int(alone.sum())
    joined = TokenMap(group[None], weight[None], anchor[None], torch.tensor([outputs], device=device))
    return joined.in_anchor_order()


def extend(report: Report, steps: Sequence[LayerState]) -> Report:
    """The report with what happened inside the LLM in one step, or in a step for each row in turn.

    Behind one step, `source` follows to the tokens of the last layer.
    """
    maps = [own for step in steps for own in step.maps[:: step.copies]]
    images = []
    for image, own_maps in zip(report.images, maps, strict=True):
        by_layer, token_map = list(image.by_layer), image.token_map
        for layer, own in own_maps:
            by_layer[layer:] = [own.lengths[0]] * (len(by_layer) - layer)
            token_map = token_map and token_map.then(own)
        images.append(replace(image, by_layer=tuple(by_layer), token_map=token_map))
    source, here = report.source, steps[0].here()
    if len(steps) == 1 and source is not None and here is not None:
        source = _gather(source[:, -steps[0].length :], here)
    return replace(report, images=images, source=source)


def prompt_of(spans: list[Span], compressed: Mapping[str, Any]) -> Prompt | None:
    """The prompt that goes into the LLM with `compressed`; `None` where it brings no images."""
    if not spans:
        return None
    real = compressed["attention_mask"].bool()
    last = (real.long() * torch.arange(1, real.shape[1] + 1, device=real.device)).argmax(1).tolist()
    ends = [last[span.row] for span in spans]
    if (labels := compressed.get("labels")) is not None:
        known = real.shape[1] - labels.shape[1]
        answers = [(row != -100).nonzero()[:, 0] + known for row in labels.cpu()]
        for n, span in enumerate(spans):  # in training, every image is asked about by the question before its answer
            following = answers[span.row][answers[span.row] > span.columns[-1]]
            ends[n] = int(following[0]) - 1 if len(following) else ends[n]
    return Prompt(spans, real, ends)


def loss_behind(in_llm: InLLMState, out: Any, labels: Int[Tensor, "batch length"], arguments: Mapping[str, Any]) -> Any:
    """Return the output `out` of a model with its loss on the tokens behind the last layer.

    `labels` are of the prompt that went into the LLM; `arguments` are the call's.
    """
    here = None if in_llm.first is None else in_llm.first.here()
    left = labels if here is None else gather(labels, here, PER_TOKEN["labels"])
    as_tuple = isinstance(out, tuple)
    loss = in_llm.adapter.model.loss_function(
        logits=out[0] if as_tuple else out.logits,
        labels=left,
        vocab_size=in_llm.adapter.llm_config.vocab_size,
        **{name: arguments[name] for name in ("num_items_in_batch",) if name in arguments},
    )
    if as_tuple:
        return (loss, *out)
    return type(out)(**{"loss": loss, **{name: value for name, value in out.items() if name != "loss"}})


def _refuse_other_caches(cache: Any) -> None:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if cache is None:
        return
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise UserError(
            f"compressors inside the LLM need a DynamicCache of full-attention layers, not {type(cache).__name__}:"
            " layers hold different numbers of tokens"
        )


def _refuse_part_of_another_cache(cache: Any) -> None:
    """Raises `UserError` for a cache with fewer tokens in some layers, where this call has filled another one."""
    if cache is None:
        return
    if len({cache.get_seq_length(layer) for layer in range(len(cache.layers))}) > 1:
        raise UserError(
            "a compressor inside the LLM goes on with the KV cache that it has filled, not with a copy of it:"
            " use generate without custom_generate, or a compressor before the LLM"
        )


def _merge_and_drop(hidden: Float[Tensor, "batch length dim"], decision: LayerCut | None) -> Tensor:
    """Writes merged states at their anchors, and leaves the rest of each group out."""
    if decision is None:
        return hidden
    for rows, columns, token_map in decision.merges:
        merged = token_map.apply(hidden[rows[:, None], columns])
        anchors = token_map.anchor_index()
        image, output = (anchors >= 0).nonzero(as_tuple=True)
        place = (rows[image], columns[image, anchors[image, output]])
        hidden = hidden.index_put(place, merged[image, output])
    index = decision.source.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index)


def _compact(kept: Bool[Tensor, "batch length"], pad_right: bool) -> Int[Tensor, "batch kept"]:
    """The columns of the kept tokens of each row in order, padded with -1 to the longest row."""
    counts = kept.sum(1)
    longest = int(counts.max()) if len(counts) else 0
    front = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    slot = torch.arange(longest, device=kept.device).expand(len(kept), -1)
    if not pad_right:
        slot = slot - (longest - counts)[:, None]
    valid = (slot >= 0) & (slot < counts[:, None])
    return torch.where(valid, front.gather(1, slot.clamp(0, max(longest - 1, 0))), -1)


def _follow(columns: list[Tensor], rows: list[int], source: Int[Tensor, "batch kept"], length: int) -> list[Tensor]:
    """Where tokens stand after a decision that kept them all."""
    place = torch.full((len(source), length + 1), -1, device=source.device)
    slot = torch.arange(source.shape[1], device=source.device).expand_as(source)
    place = place.scatter(1, torch.where(source < 0, length, source), slot)
    return [place[row, own] for row, own in zip(rows, columns, strict=True)]


def _gather(values: Int[Tensor, "batch length"], index: Int[Tensor, "batch kept"]) -> Int[Tensor, "batch kept"]:
    return torch.where(index < 0, -1, values.expand(len(index), -1).gather(1, index.clamp(min=0)))
