"""The effect of a compressor before one layer, and the shortened inputs of that layer and later ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from vlmzip.runtime.in_llm.masks import shrink_mask
from vlmzip.runtime.versions import argument
from vlmzip.token_map import TokenMap


class Merge(NamedTuple):
    """The token map of parts of equal size that were compressed together (see `images.Part`)."""

    rows: Int[Tensor, " parts"]
    slots: Int[Tensor, "parts tokens"]
    token_map: TokenMap


@dataclass
class LayerCut:
    """The tokens that remain after a compressor before one layer. `indices` explains slots and columns."""

    merges: list[Merge]
    source: Int[Tensor, "batch kept"]
    """The slot of each remaining token among the tokens that entered the layer; -1 for padding."""
    here: Int[Tensor, "batch kept"]
    """The column of each remaining token; -1 for padding."""
    keys: Int[Tensor, "batch all_kept"]
    """The conversation column of each token in the layer's cache; -1 for padding."""
    places: list[Int[Tensor, " _"]]
    """The slots of the remaining tokens of each image."""
    padded: bool
    _short: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """The original and the shortened value of layer arguments, by name. All layers get the same, so we shorten once."""

    def merge_and_drop(self, hidden: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch kept dim"]:
        """Write merged states at their anchors, and remove the tokens that are not kept."""
        for rows, slots, token_map in self.merges:
            merged = token_map.apply(hidden[rows[:, None], slots])
            anchors = token_map.anchor_index()
            part, output = (anchors >= 0).nonzero(as_tuple=True)
            place = (rows[part], slots[part, anchors[part, output]])
            hidden = hidden.index_put(place, merged[part, output])
        index = self.source.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, index)

    def shorten(self, arguments: dict[str, Any], *, past: int, flash: bool) -> None:
        """Replace the mask and positions in a decoder layer's `arguments` by those of the remaining tokens."""
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

    def _changed(self, name: str, value: object) -> bool:
        """Return True if an argument is not the object that was last shortened under this name."""
        return name not in self._short or self._short[name][0] is not value
