"""One value for prune, merge, pool and cluster: which output token each visual token joins."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenMap:
    """Which output token each visual token joins, and with what weight.

    Output token `g` of a row is the weighted sum of the tokens whose `group` is `g`. Pruning is weight 1 or group -1;
    average pooling weight 1/window. The same map moves features, positions and labels, composes, and draws the image.

    Rows are padded on the right: tokens beyond a row's own have group -1, output tokens beyond `length` are zero.
    """

    group: Int[Tensor, "batch tokens"]
    """The output position that the token joins, 0-based; -1: dropped."""
    weight: Float[Tensor, "batch tokens"]
    anchor: Bool[Tensor, "batch tokens"]
    """One member of each group: it gives the output token its position and label."""
    length: Int[Tensor, " batch"]
    """Output tokens per row; rows may differ."""

    # --- ways to make one -------------------------------------------------------------------------------------

    @classmethod
    def keep(cls, kept: Bool[Tensor, "batch tokens"]) -> TokenMap:
        """Prunes: keeps the marked tokens in their order and drops the rest."""
        group = torch.where(kept, kept.cumsum(dim=1) - 1, -1)
        return cls(group, kept.to(torch.float32), kept, kept.sum(dim=1))

    @classmethod
    def merge(
        cls,
        group: Int[Tensor, "batch tokens"],
        weight: Float[Tensor, "batch tokens"] | None = None,
        anchor: Bool[Tensor, "batch tokens"] | None = None,
    ) -> TokenMap:
        """Merges tokens of equal `group`; by default their mean, anchored at the middle member.

        Every group from 0 to a row's largest must have a member.
        """
        if weight is None:
            sizes = _per_group(group, torch.ones_like(group, dtype=torch.float32))
            weight = torch.where(group >= 0, 1 / _look_up(sizes, group).clamp(min=1), 0.0)
        if anchor is None:
            anchor = _middle_member(group)
        return cls(group, weight, anchor, group.amax(dim=1) + 1)

    @classmethod
    def identity(cls, batch: int, tokens: int, device: torch.device | str | None = None) -> TokenMap:
        """Keeps everything as it is."""
        return cls.keep(torch.ones(batch, tokens, dtype=torch.bool, device=device))

    # --- what it does -----------------------------------------------------------------------------------------

    @cached_property
    def lengths(self) -> list[int]:
        """`length` as Python numbers; read from the device once."""
        return self.length.tolist()

    @property
    def max_length(self) -> int:
        return max(self.lengths, default=0)

    def apply(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch max_out dim"]:
        """The output tokens, zero-padded to the longest row. Sums run in at least float32; gradients flow to `x`."""
        batch, _, dim = x.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        # Only members are touched: dropped tokens may be many, or hold an infinity, which times 0 is not 0.
        row, token = (self.group >= 0).nonzero(as_tuple=True)
        weighted = x[row, token].to(wide) * self.weight[row, token].to(wide)[:, None]
        place = row * self.max_length + self.group[row, token]
        out = torch.zeros(batch * self.max_length, dim, dtype=wide, device=x.device).index_add(0, place, weighted)
        return out.view(batch, self.max_length, dim).to(x.dtype)

    def anchor_index(self) -> Int[Tensor, "batch max_out"]:
        """For each output token the index of its anchor among the input tokens; -1 beyond a row's length."""
        index = torch.arange(self.group.shape[1], device=self.group.device).expand_as(self.group)
        slot = torch.where(self.anchor & (self.group >= 0), self.group, self.max_length)
        out = torch.full((len(self.group), self.max_length + 1), -1, dtype=torch.long, device=self.group.device)
        return out.scatter(1, slot, torch.where(self.anchor, index, -1))[:, :-1]

    def in_anchor_order(self) -> TokenMap:
        """The same map with output tokens in the order of their anchors."""
        anchors = self.anchor_index()
        beyond = torch.where(anchors < 0, self.group.shape[1], anchors)
        return self.rearranged(beyond.argsort(dim=1).argsort(dim=1))

    def rearranged(self, place: Int[Tensor, "batch max_out"]) -> TokenMap:
        """Return the same map with output token `g` of each row at `place[row, g]`."""
        group = torch.where(self.group < 0, -1, _look_up(place, self.group))
        return TokenMap(group, self.weight, self.anchor, self.length)

    def then(self, second: TokenMap) -> TokenMap:
        """This map followed by `second`, which works on this map's (padded) output tokens. Associative."""
        if len(second.group) != len(self.group) or second.group.shape[1] < self.max_length:
            raise ValueError(f"a map of {tuple(second.group.shape)} cannot follow one with {self.max_length} outputs")
        gone = self.group < 0
        group = torch.where(gone, -1, _look_up(second.group, self.group))
        weight = torch.where(group >= 0, self.weight * _look_up(second.weight, self.group), 0.0)
        anchor = self.anchor & _look_up(second.anchor, self.group) & (group >= 0)
        return TokenMap(group, weight, anchor, second.length)

    def rows(self, index: Int[Tensor, " rows"] | slice) -> TokenMap:
        """The map of some rows of the batch."""
        return TokenMap(self.group[index], self.weight[index], self.anchor[index], self.length[index])

    def after_dropping(self, front: int) -> TokenMap:
        """The same map for inputs with `front` more tokens before them, all dropped."""
        batch, device = len(self.group), self.group.device
        none = torch.zeros(batch, front, device=device)
        return TokenMap(
            torch.cat([none.long() - 1, self.group], 1),
            torch.cat([none.to(self.weight.dtype), self.weight], 1),
            torch.cat([none.bool(), self.anchor], 1),
            self.length,
        )

    def check(self) -> None:
        """Raises `ValueError` if some output token has no member or not exactly one anchor."""
        if ((self.group >= self.length[:, None]) | (self.group < -1)).any():
            raise ValueError("a token's group lies outside the output")
        here = torch.arange(self.max_length, device=self.group.device) < self.length[:, None]
        anchors = _per_group(self.group, self.anchor.to(torch.float32))[:, : self.max_length]
        if (anchors[here] != 1).any() or (self.anchor & (self.group < 0)).any():
            raise ValueError("every output token needs exactly one anchor among its members")


def _per_group(group: Int[Tensor, "batch tokens"], value: Float[Tensor, "batch tokens"]) -> Float[Tensor, "batch g"]:
    """Sums `value` over the members of each group; as many groups as tokens, the last columns may be 0."""
    batch, tokens = group.shape
    out = torch.zeros(batch, tokens + 1, dtype=value.dtype, device=value.device)
    return out.scatter_add(1, torch.where(group >= 0, group, tokens), value)[:, :-1]


def _look_up(table: Tensor, group: Int[Tensor, "batch tokens"]) -> Tensor:
    """`table[row, group]` for every token; dropped tokens read column 0."""
    return table.gather(1, group.clamp(min=0)) if table.shape[1] else table.new_zeros(group.shape)


def _middle_member(group: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
    """Marks, of each group's n members in token order, number (n-1)//2."""
    batch, tokens = group.shape
    by_group = group.argsort(dim=1, stable=True)
    ordered = group.gather(1, by_group)
    place = torch.arange(tokens, device=group.device).expand(batch, tokens)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    rank = place - torch.where(new, place, 0).cummax(dim=1).values
    size = _look_up(_per_group(group, torch.ones(batch, tokens, device=group.device)), ordered)
    middle = (ordered >= 0) & (rank == (size.long() - 1) // 2)
    return torch.zeros_like(middle).scatter(1, by_group, middle)
