"""The effect of a compressor before one layer, and the shortened inputs of that layer and later ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from vlmzip.errors import UnfitMethod
from vlmzip.processor import InputDict
from vlmzip.runtime.in_llm.masks import shrink_mask
from vlmzip.runtime.versions import argument
from vlmzip.token_map import TokenMap

#: The names under which decoder layers take positions: tables of cosines and sines, and numbers.
POSITIONS = ("position_embeddings", "position_ids")


@cache
def _positions_of(forward: Callable[..., object]) -> list[str]:
    """Return the names under which the `forward` of a layer takes positions."""
    names = [name for name in POSITIONS if name in inspect.signature(forward).parameters]
    return names or [POSITIONS[0]]


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
    stand_in: Int[Tensor, "batch length"] | None = None
    """The slot of the token that stands in for each token that entered the layer; -1 for none. `None` if the tokens are
    not restored after the layer."""
    added: Float[Tensor, "batch all_kept"] | None = None
    """The value to add to the attention logits of each token in the layer's cache; `None` if it is 0 for all."""
    _short: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """The original and the shortened value of layer arguments, by name. Layers get the same, so we shorten once."""

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

    def shorten(self, layer: type[nn.Module], arguments: InputDict, *, length: int, past: int, flash: bool) -> None:
        """Replace what a decoder layer's `arguments` have for each token by that of the remaining tokens.

        `layer` is the class of the layer, and `length` is the number of tokens that entered the LLM. Raise `UserError`
        if a mask or positions are missing, or if an argument has values for each token in a form that vlmzip does not
        know.
        """
        mask = argument(arguments, "attention_mask", "a decoder layer")
        for name in _positions_of(layer.forward):
            argument(arguments, name, "a decoder layer")
        if self._changed("attention_mask", mask):
            short = shrink_mask(mask, self.here, self.keys, past, self.padded, flash=flash, added=self.added)
            self._short["attention_mask"] = mask, short
        for name, value in arguments.items():
            if name != "attention_mask" and isinstance(value, Tensor | tuple) and self._changed(name, value):
                self._short[name] = value, of_tokens(name, value, self.here, length)
        arguments |= {name: short for name, (_, short) in self._short.items() if name in arguments}
        if self.added is not None:  # the cut of one layer only
            self._short = {}

    def _changed(self, name: str, value: object) -> bool:
        """Return True if an argument is not the object that was last shortened under this name."""
        return name not in self._short or self._short[name][0] is not value


def of_tokens(
    name: str,
    value: Any,
    columns: Int[Tensor, "parts tokens"],
    length: int,
    rows: Int[Tensor, " parts"] | None = None,
) -> Any:
    """Return an argument of a decoder layer for the tokens at `columns`, where -1 is padding.

    `length` is the number of tokens that entered the LLM. `rows` has the row of each part, if parts are not rows. Raise
    `UserError` if the argument has values for each token in a form that vlmzip does not know.
    """
    if isinstance(value, tuple):
        return tuple(of_tokens(name, part, columns, length, rows) for part in value)
    if not isinstance(value, Tensor) or length not in value.shape:
        return value
    parts, column = len(columns), columns.clamp(min=0)
    if name == "position_embeddings" and value.shape[-2] == length:  # a table of cosines, sines, or both
        axes, width = value.shape[:-3], value.shape[-1]
        index = column[..., None].expand(*axes, -1, -1, width)
        return _of_rows(value, rows, -3).expand(*axes, parts, -1, -1).gather(-2, index)
    if value.shape[-1] == length and (name == "position_ids" or value.ndim == 2):  # a value for each token
        axes = value.shape[:-2]
        return _of_rows(value, rows, -2).expand(*axes, parts, -1).gather(-1, column.expand(*axes, -1, -1))
    raise UnfitMethod(
        f"the layers of this LLM get {name} for each token in a form that vlmzip does not know;"
        " choose a site before the LLM"
    )


def _of_rows(value: Tensor, rows: Int[Tensor, " parts"] | None, axis: int) -> Tensor:
    """Return the rows of a value along `axis`. A single row is for all rows."""
    return value if rows is None or value.shape[axis] == 1 else value.index_select(axis, rows)
