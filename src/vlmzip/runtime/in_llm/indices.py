"""Where tokens stand: the index spaces of this package, and the functions that lead from one to another.

A token has a number in each of four spaces. Columns and slots count padding, too; -1 stands for "padding" in values.

| space | counts | example: 5 cached tokens, a new prompt of 9, of which a layer dropped 2 |
| --- | --- | --- |
| conversation column | all tokens since the cache began | 5 to 13 |
| column | tokens that entered the LLM in this forward: conversation column - `past` | 0 to 8 |
| slot | tokens that are left at a layer: the length of its hidden states | 0 to 6 |
| number | tokens left of one image | 0, 1, … |

| name | has an entry for | which is its |
| --- | --- | --- |
| `Span.columns` | each token of an image in the prompt | conversation column |
| `Images.places` | each token of an image in the prompt | column |
| `LayerCut.source` | each token left at the layer (slot) | slot among the tokens that entered the layer |
| `LayerCut.here` | each token left at the layer (slot) | column |
| `LayerCut.keys` | each token in the layer's cache | conversation column |
| `LayerCut.places` | each token left of an image (number) | slot |
| `Choice.numbers` | each token that a compressor gets | number, before the layer acts |
| `Part.slots` | each token that a compressor gets | slot among the tokens that entered the layer |
| `Part.outputs` | each token that it puts out | slot of its anchor, before the layer acts |
| `Question.columns` | each text token of a row that may ask (query) | column |
| `Question.about` | each text token that asks about an image | query |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def compact(kept: Bool[Tensor, "batch length"], *, pad_right: bool) -> Int[Tensor, "batch kept"]:
    """Return where each row is true, in order, padded with -1 to the longest row."""
    counts = kept.sum(1)
    longest = int(counts.max()) if len(counts) else 0
    # A stable sort by "is not kept" brings the kept ones to the front, in their order.
    front = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    slot = torch.arange(longest, device=kept.device).expand(len(kept), -1)
    if not pad_right:
        slot = slot - (longest - counts)[:, None]
    valid = (slot >= 0) & (slot < counts[:, None])
    return torch.where(valid, front.gather(1, slot.clamp(0, max(longest - 1, 0))), -1)


# A GPU waits for the CPU at each small step. What can be done for all images of a batch at once is done so.


def tensors(lists: Sequence[Sequence[int]], device: torch.device) -> list[Int[Tensor, " _"]]:
    """Return each of the lists as a tensor; they go to the device together."""
    flat = torch.tensor([value for values in lists for value in values], dtype=torch.long, device=device)
    return list(flat.split([len(values) for values in lists]))


def row_and_slot(
    rows: Sequence[int], slots: Sequence[Int[Tensor, " _"]]
) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """Return the row and the slot of every token of all images, which index `[batch, length]`.

    `rows` has the row of each image, and `slots` the slots of its tokens.
    """
    counts = torch.tensor([len(some) for some in slots])
    return torch.tensor(rows).repeat_interleave(counts).to(slots[0].device), torch.cat(list(slots))


def follow(
    before: Sequence[Int[Tensor, " _"]], rows: Sequence[int], source: Int[Tensor, "batch kept"], length: int
) -> list[Int[Tensor, " _"]]:
    """Return the slots after a cut for slots `before` it, of tokens that the cut keeps: `source` the other way round.

    `length` counts the slots before the cut; `rows` has the row of each image.
    """
    # One column more than there are slots takes in what padding would write.
    after = torch.full((len(source), length + 1), -1, device=source.device)
    slot = torch.arange(source.shape[1], device=source.device).expand_as(source)
    after = after.scatter(1, torch.where(source < 0, length, source), slot)
    return list(after[row_and_slot(rows, before)].split([len(slots) for slots in before]))


def look_up(values: Int[Tensor, "rows length"], index: Int[Tensor, "batch kept"]) -> Int[Tensor, "batch kept"]:
    """Return `values` at `index`, -1 where that is -1."""
    return torch.where(index < 0, -1, values.expand(len(index), -1).gather(1, index.clamp(min=0)))
