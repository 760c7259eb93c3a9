"""The index spaces of this package, and the functions that convert between them.

A token has an index in each of four spaces. Columns and slots also count padding. The value -1 means padding.

| space | counts | example: 5 cached tokens, a new prompt of 9, of which a layer dropped 2 |
| --- | --- | --- |
| conversation column | all tokens since the cache began | 5 to 13 |
| column | tokens that entered the LLM in this forward: conversation column - `past` | 0 to 8 |
| slot | tokens that remain at a layer: the length of its hidden states | 0 to 6 |
| number | remaining tokens of one image | 0, 1, … |

| name | one entry for | value of the entry |
| --- | --- | --- |
| `Span.columns` | each token of an image in the prompt | conversation column |
| `Images.places` | each token of an image in the prompt | column |
| `LayerCut.source` | each remaining token at the layer (slot) | slot among the tokens that entered the layer |
| `LayerCut.here` | each remaining token at the layer (slot) | column |
| `LayerCut.keys` | each token in the layer's cache | conversation column |
| `LayerCut.stand_in` | each token that entered the layer | slot of the token that stands in for it |
| `LayerCut.places` | each remaining token of an image (number) | slot |
| `Choice.numbers` | each token that a compressor gets | number, before the compressor acts |
| `Part.image_slots` | each remaining token of an image (number) | slot among the tokens that entered the layer |
| `Merge.slots` | each token that a compressor gets | slot among the tokens that entered the layer |
| `Part.outputs` | each output token of the compressor | slot of its anchor, before the compressor acts |
| `Candidates.anchors` | each token that a question may attend to | slot of its anchor, before the compressor acts |
| `Question.columns` | each token of a row that may belong to a question (query) | column |
| `Question.about` | each token of the question about an image | query |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def compact(kept: Bool[Tensor, "batch length"], *, pad_right: bool) -> Int[Tensor, "batch kept"]:
    """Return the indices of the True values of each row, in order, padded with -1 to the longest row."""
    counts = kept.sum(1)
    longest = int(counts.max()) if len(counts) else 0
    # A stable sort by `~kept` moves the kept indices to the front, in their order.
    front = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    slot = torch.arange(longest, device=kept.device).expand(len(kept), -1)
    if not pad_right:
        slot = slot - (longest - counts)[:, None]
    valid = (slot >= 0) & (slot < counts[:, None])
    return torch.where(valid, front.gather(1, slot.clamp(0, max(longest - 1, 0))), -1)


# On a GPU, every small operation waits for the CPU. So the functions below handle all images of a batch at once.


def tensors(lists: Sequence[Sequence[int]], device: torch.device) -> list[Int[Tensor, " _"]]:
    """Return each list as a tensor on `device`. They are copied there together."""
    flat = torch.tensor([value for values in lists for value in values], dtype=torch.long, device=device)
    return list(flat.split([len(values) for values in lists]))


def row_and_slot(
    rows: Sequence[int], slots: Sequence[Int[Tensor, " _"]]
) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """Return the rows and slots of all tokens of all images, as an index into tensors of shape [batch, length].

    `rows` has the row of each image, and `slots` has the slots of its tokens.
    """
    counts = torch.tensor([len(image_slots) for image_slots in slots])
    return torch.tensor(rows).repeat_interleave(counts).to(slots[0].device), torch.cat(list(slots))


def follow(
    before: Sequence[Int[Tensor, " _"]], rows: Sequence[int], source: Int[Tensor, "batch kept"], length: int
) -> list[Int[Tensor, " _"]]:
    """Return the slots after a cut of the tokens at the slots `before` it, which the cut must keep.

    This inverts `source`. `length` is the number of slots before the cut, and `rows` has the row of each image.
    """
    # The extra last column receives the values of padding.
    after = torch.full((len(source), length + 1), -1, device=source.device)
    slot = torch.arange(source.shape[1], device=source.device).expand_as(source)
    after = after.scatter(1, torch.where(source < 0, length, source), slot)
    return list(after[row_and_slot(rows, before)].split([len(slots) for slots in before]))


def look_up(values: Int[Tensor, "rows length"], index: Int[Tensor, "batch kept"]) -> Int[Tensor, "batch kept"]:
    """Return `values` at `index`, and -1 for indices of -1."""
    return torch.where(index < 0, -1, values.expand(len(index), -1).gather(1, index.clamp(min=0)))
