"""One forward of the LLM: the work of compressors before each of its layers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlmzip.models.llm_attention import counted_from
from vlmzip.processor import InputDict
from vlmzip.runtime.in_llm.cut import LayerCut
from vlmzip.runtime.in_llm.images import Images
from vlmzip.runtime.in_llm.indices import compact, follow, look_up
from vlmzip.runtime.in_llm.plan import Plan
from vlmzip.runtime.in_llm.prompt import Prompt
from vlmzip.runtime.in_llm.restore import set_aside, stand_ins
from vlmzip.token_map import TokenMap


class Step:
    """The state of one forward of the LLM. Layers get it as an argument, even if they are recomputed."""

    def __init__(
        self,
        plan: Plan,
        keys: dict[int, Int[Tensor, "batch _"]],
        sizes: dict[int, Int[Tensor, "batch _"]],
        prompt: Prompt | None,
        embeddings: Float[Tensor, "batch length dim"],
        cache: Any,
        past: int,
    ) -> None:
        self.plan, self.cache, self.past = plan, cache, past
        self._keys = keys
        """The conversation columns in each compressing layer's cache (see `LayerCut.keys`); shared with the call."""
        self._sizes = sizes
        """The number of tokens that each of these stands for, if tokens are restored after layers."""
        self.batch, self.length = embeddings.shape[:2]
        self.copies = self.batch // (self.batch if prompt is None else len(prompt.real))
        """The number of copies of each prompt row: `generate` repeats rows for beams and for several sequences."""
        self.images: Images | None = None
        if prompt is not None and prompt.spans:
            self.images = Images(plan.family, prompt, embeddings, past, self.copies)
        self._cuts: dict[int, LayerCut | None] = {}

    def enter(
        self, index: int, layer: nn.Module, hidden: Float[Tensor, "batch length dim"], arguments: InputDict
    ) -> Float[Tensor, "batch kept dim"]:
        """Return the hidden states for layer `index`; shorten mask and positions in `arguments` to match."""
        # 1. Run the compressor before this layer. A recomputation reuses the cut of the first run.
        if index in self.plan.at:
            if index not in self._cuts:
                with torch.no_grad(), self._timed():
                    if self.images is not None and index in self.plan.asked:
                        self.images.attention[index] = self._attention_before_cut(
                            self.images, index, layer, hidden, arguments
                        )
                    self._cuts[index] = self._decide(index, layer, hidden, arguments)
            cut = self._cuts[index]
            if cut is not None:
                whole, hidden = hidden, cut.merge_and_drop(hidden)
                if cut.stand_in is not None:
                    set_aside(hidden, whole, cut.stand_in)
        # 2. Shorten mask and positions to the tokens that the latest compressor kept.
        tables = arguments.get("position_embeddings")
        cut = self._latest(index)
        if cut is not None:
            cut.shorten(type(layer), arguments, length=self.length, past=self.past, flash=self.plan.flash)
        # 3. Compute what the compressor before the next layer needs of this layer's attention.
        if self.images is not None and index + 1 not in self._cuts:
            if index in self.plan.watched:
                with torch.no_grad(), self._timed():
                    attention = self._attention(self.images, index, layer, hidden, arguments, cut)
                    self.images.attention[index + 1] = attention
            if index in self.plan.keyed:
                with torch.no_grad(), self._timed():
                    self.images.keys[index + 1] = self._keys_at(self.images, layer, hidden, arguments, tables)
        return hidden

    def _timed(self) -> AbstractContextManager[None]:
        """Return a context that times the block as selection, if this forward has images."""
        return nullcontext() if self.images is None else self.plan.watch.time("selection")

    def _latest(self, index: int) -> LayerCut | None:
        """Return the cut that applies to layer `index`: that of the last compressing layer up to and including it.

        If tokens are restored after each layer, only the cut of the layer itself applies.
        """
        layers = [layer for layer in self._cuts if layer == index or (layer < index and not self.plan.restores)]
        return self._cuts[max(layers)] if layers else None

    def _decide(
        self, index: int, layer: nn.Module, hidden: Float[Tensor, "batch length dim"], arguments: InputDict
    ) -> LayerCut | None:
        """Return the cut before layer `index`; `None` if there is nothing to do."""
        before = self._latest(index)
        if self.images is None and index not in self._keys:
            return None
        length, device = hidden.shape[1], hidden.device
        if self.images is None:  # text after compressed images: all of it is kept
            merges, places = [], []
            source = torch.arange(length, device=device).expand(self.batch, -1)
        else:
            entered = torch.arange(length, device=device).expand(self.batch, -1) if before is None else before.here
            candidate_attention = partial(
                self.images.question.attention_to, self.plan.family, layer, hidden, arguments, entered, self.length
            )
            compressed = self.images.compress(index, self.plan.at[index], hidden, before, candidate_attention)
            merges = compressed.merges
            source = compact(compressed.kept, pad_right=self.images.pad_right)
            places = follow(compressed.outputs, self.images.rows, source, length)
        here = source if before is None else look_up(before.here, source)
        self._keys[index] = keys = self._keys_with(index, here)
        if not self.plan.restores:
            return LayerCut(merges, source, here, keys, places, padded=bool((keys < 0).any()))
        # A mask is made in any case, with or without padding. Do not make the CPU wait for the device at each layer.
        cut = LayerCut(merges, source, here, keys, places, padded=True)
        self._restore_after(index, cut, hidden)
        return cut

    def _restore_after(self, index: int, cut: LayerCut, hidden: Float[Tensor, "batch length dim"]) -> None:
        """Prepare the cut before layer `index`, which `hidden` enters, to restore the tokens after the layer.

        A token that stands for m tokens gets log m more on its attention logits.
        """
        sizes = torch.ones_like(cut.source)
        if cut.merges:
            cut.stand_in, sizes = stand_ins(cut.merges, cut.source, hidden.shape[1])
        cached = self._sizes.get(index)
        if cached is None:
            cached = sizes.new_ones(self.batch, cut.keys.shape[1] - sizes.shape[1])
        self._sizes[index] = torch.cat([cached, sizes], 1)
        cut.added = self._sizes[index].log().to(hidden.dtype)

    def _keys_with(self, index: int, here: Int[Tensor, "batch kept"]) -> Int[Tensor, "batch all_kept"]:
        """Return the conversation columns in the cache of layer `index` after it ran on the tokens `here`."""
        cached = self._keys.get(index)
        if cached is None:  # earlier forwards kept all tokens
            cached = torch.arange(self.past, device=here.device).expand(self.batch, -1)
        return torch.cat([cached, torch.where(here < 0, -1, here + self.past)], 1)

    def _attention_before_cut(
        self, images: Images, index: int, layer: nn.Module, hidden: Tensor, arguments: InputDict
    ) -> Float[Tensor, "batch queries length"]:
        """Return the attention of the queries at layer `index` as if the compressor before it kept all tokens."""
        before = self._latest(index)
        if before is None and index not in self._keys:
            return self._attention(images, index, layer, hidden, arguments, None)
        slots = torch.arange(hidden.shape[1], device=hidden.device).expand(self.batch, -1)
        here = slots if before is None else before.here
        keys = self._keys_with(index, here)
        whole = LayerCut([], slots, here, keys, [], padded=bool((keys < 0).any()))
        shortened = dict(arguments)
        whole.shorten(type(layer), shortened, length=self.length, past=self.past, flash=self.plan.flash)
        return self._attention(images, index, layer, hidden, shortened, whole)

    def _attention(
        self,
        images: Images,
        index: int,
        layer: nn.Module,
        hidden: Tensor,
        arguments: InputDict,
        cut: LayerCut | None,
    ) -> Float[Tensor, "batch queries kept"]:
        """Return the attention of the queries at layer `index` to the tokens that enter it."""
        if cut is None:
            here = torch.arange(self.length, device=hidden.device).expand(self.batch, -1)
            keys = torch.arange(self.past + self.length, device=hidden.device).expand(self.batch, -1)
        else:
            here, keys = cut.here, cut.keys
        cached = self.cache.layers[index].keys if self.past else None
        return images.question.attention(self.plan.family, layer, hidden, arguments, here, keys, self.past, cached)

    def _keys_at(
        self, images: Images, layer: nn.Module, hidden: Tensor, arguments: InputDict, tables: Any
    ) -> Float[Tensor, "batch kept key_dim"]:
        """Return the attention keys of a layer, with the heads joined. `tables` has the angles of all columns.

        Positions count from 0 at the first token of a prompt. Those of `forward` can count the padding on its left.
        """
        if self.past == 0 and isinstance(tables, tuple) and tables[0].ndim == 3:
            row, first = torch.arange(self.batch, device=hidden.device), images.real.int().argmax(1)
            cos, sin = (table.expand(self.batch, -1, -1)[row, first, None] for table in tables)
            arguments = {**arguments, "position_embeddings": counted_from(arguments["position_embeddings"], (cos, sin))}
        no_rows = torch.empty(self.batch, 0, dtype=torch.long, device=hidden.device)
        keys = self.plan.family.queries_and_keys(layer, hidden, arguments, no_rows).key
        return keys.transpose(1, 2).flatten(2)

    # --- results ----------------------------------------------------------------------------------------------

    def here(self) -> Int[Tensor, "rows kept"] | None:
        """Return the columns of the tokens at the last layer, without copies of rows; `None` if no layer has a cut."""
        last = self._latest(len(self.plan.family.decoder_layers))
        return None if last is None else last.here[:: self.copies]

    def maps(self) -> list[list[tuple[int, TokenMap]]]:
        """Return `Images.maps` without the copies of images: the layers and maps of each image."""
        return [] if self.images is None else self.images.maps[:: self.copies]
