"""What a compressor did to the tokens that entered one layer, and what this layer and the later ones get of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from vlmzip.runtime.in_llm.masks import shrink_mask
from vlmzip.runtime.versions import argument
from vlmzip.token_map import TokenMap


class Merge(NamedTuple):
    """Parts of equal size that were compressed together (see `images.Part`)."""

    rows: Int[Tensor, " parts"]
    slots: Int[Tensor, "parts tokens"]
    token_map: TokenMap


@dataclass
class LayerCut:
    """What became of the tokens that entered one layer. `indices` explains slots and columns."""

    merges: list[Merge]
    source: Int[Tensor, "batch kept"]
    """For each token left its slot among those that entered the layer; -1: padding."""
    here: Int[Tensor, "batch kept"]
    """For each token left its column; -1: padding."""
    keys: Int[Tensor, "batch all_kept"]
    """For every token in the layer's cache its conversation column; -1: padding."""
    places: list[Int[Tensor, " _"]]
    """For each image the slots of what is left of it."""
    padded: bool
    _short: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Arguments of the layers, as given and as shortened: all get the same ones, so they are shortened once."""

    def merge_and_drop(self, hidden: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch kept dim"]:
        """Write merged states at their anchors, and leave the rest of each group out."""
        for rows, slots, token_map in self.merges:
            merged = token_map.apply(hidden[rows[:, None], slots])
            anchors = token_map.anchor_index()
            part, output = (anchors >= 0).nonzero(as_tuple=True)
            place = (rows[part], slots[part, anchors[part, output]])
            hidden = hidden.index_put(place, merged[part, output])
        index = self.source.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, index)

    def shorten(self, arguments: dict[str, Any], *, past: int, flash: bool) -> None:
        """Replace mask and positions among a decoder layer's `arguments` by those of the tokens left."""
        mask = argument(arguments, "attention_mask", "a decoder layer")
        if self._changed("attention_mask", mask):
            short = shrink_mask(mask, self.here, self.keys, past, self.padded, flash=flash)
            self._short["attention_mask"] = mask, short
        tables = argument(arguments, "position_embeddings", "a decoder layer")
        if self._changed("position_embeddings", tables):
            column = self.here.clamp(min=0)
            short = tuple(
                table.expand(len(column), -1, -1).gather(1, column[..., None].expand(-1, -1, table.shape[-1]))
                for table in tables
            )
            self._short["position_embeddings"] = tables, short
            ids = argument(arguments, "position_ids", "a decoder layer")
            self._short["position_ids"] = ids, None if ids is None else ids.expand(len(column), -1).gather(1, column)
        arguments |= {name: short for name, (_, short) in self._short.items()}

    def _changed(self, name: str, given: object) -> bool:
        """Whether an argument is another object than the one that was shortened last."""
        return name not in self._short or self._short[name][0] is not given
