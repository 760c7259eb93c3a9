"""The token map: one value that describes prune, merge, pool and cluster alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, eq=False)
class TokenMap:
    """The output token that each visual token joins, and its weight there.

    Output token `g` of a row is the weighted sum of the tokens whose `group` is `g`. Pruning has weight 1 for kept
    tokens and group -1 for the rest; average pooling has weight 1/window. The same map moves features, positions and
    labels. Maps compose, and can be drawn over the image.

    Rows are padded on the right: padding tokens have group -1, and output tokens beyond `length` are zero.
    """

    group: Int[Tensor, "batch tokens"]
    """The 0-based index of the output token that the token joins; -1 if it is dropped."""
    weight: Float[Tensor, "batch tokens"]
    anchor: Bool[Tensor, "batch tokens"]
    """True for one member of each group, which gives the output token its position and label."""
    length: Int[Tensor, " batch"]
    """Output tokens of each row."""
    added: Float[Tensor, "batch outputs tokens"] | None = None
    """Weights with which tokens also enter output tokens that are not their group's, if the method adds a token to
    several. It has a row for each output token, and may have further rows of zeros. Only for maps before the LLM."""

    # --- constructors -----------------------------------------------------------------------------------------

    @classmethod
    def keep(cls, kept: Bool[Tensor, "batch tokens"]) -> TokenMap:
        """Return the map that keeps the marked tokens in order and drops the rest."""
        group = torch.where(kept, kept.cumsum(dim=1) - 1, -1)
        return cls(group, kept.to(torch.float32), kept, kept.sum(dim=1))

    @classmethod
    def merge(
        cls,
        group: Int[Tensor, "batch tokens"],
        weight: Float[Tensor, "batch tokens"] | None = None,
        anchor: Bool[Tensor, "batch tokens"] | None = None,
    ) -> TokenMap:
        """Return the map that merges tokens of equal `group`.

        By default it merges them into their mean, anchored at the middle member. Every group from 0 to a row's largest
        must have a member.
        """
        if weight is None:
            sizes = _per_group(group, torch.ones_like(group, dtype=torch.float32))
            weight = torch.where(group >= 0, 1 / _look_up(sizes, group).clamp(min=1), 0.0)
        if anchor is None:
            anchor = _middle_member(group)
        return cls(group, weight, anchor, group.amax(dim=1) + 1)

    @classmethod
    def identity(cls, batch: int, tokens: int, device: torch.device | str | None = None) -> TokenMap:
        """Return the map that keeps every token."""
        return cls.keep(torch.ones(batch, tokens, dtype=torch.bool, device=device))

    # --- use --------------------------------------------------------------------------------------------------

    @cached_property
    def lengths(self) -> list[int]:
        """Return `length` as Python integers; they are copied from the device once."""
        return self.length.tolist()

    @property
    def max_length(self) -> int:
        return max(self.lengths, default=0)

    def apply(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch max_out dim"]:
        """Return the output tokens, zero-padded to the longest row.

        Sums are computed in at least float32. Gradients flow to `x`.
        """
        batch, _, dim = x.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        # Read only members: dropped tokens can be many, or contain an infinity, and 0 * infinity is not 0.
        row, token = (self.group >= 0).nonzero(as_tuple=True)
        weighted = x[row, token].to(wide) * self.weight[row, token].to(wide)[:, None]
        place = row * self.max_length + self.group[row, token]
        out = torch.zeros(batch * self.max_length, dim, dtype=wide, device=x.device).index_add(0, place, weighted)
        out = out.view(batch, self.max_length, dim)
        if (added := self._added()) is not None:
            used = (added != 0).any(dim=1)[..., None]
            out = out + added.to(wide) @ torch.where(used, x, 0).to(wide)
        return out.to(x.dtype)

    def anchor_index(self) -> Int[Tensor, "batch max_out"]:
        """Return the index of each output token's anchor among the input tokens; -1 beyond a row's length."""
        index = torch.arange(self.group.shape[1], device=self.group.device).expand_as(self.group)
        slot = torch.where(self.anchor & (self.group >= 0), self.group, self.max_length)
        out = torch.full((len(self.group), self.max_length + 1), -1, dtype=torch.long, device=self.group.device)
        return out.scatter(1, slot, torch.where(self.anchor, index, -1))[:, :-1]

    def in_anchor_order(self) -> TokenMap:
        """Return the same map with output tokens in the order of their anchors."""
        anchors = self.anchor_index()
        beyond = torch.where(anchors < 0, self.group.shape[1], anchors)
        return self.rearranged(beyond.argsort(dim=1).argsort(dim=1))

    def rearranged(self, place: Int[Tensor, "batch max_out"]) -> TokenMap:
        """Return the same map with output token `g` of each row at `place[row, g]`."""
        group = torch.where(self.group < 0, -1, _look_up(place, self.group))
        if (added := self._added()) is not None:
            added = torch.zeros_like(added).scatter(1, place[..., None].expand_as(added), added)
        return TokenMap(group, self.weight, self.anchor, self.length, added)._with_lengths(vars(self).get("lengths"))

    def then(self, second: TokenMap) -> TokenMap:
        """Return this map followed by `second`, whose inputs are this map's (padded) output tokens. Associative."""
        if len(second.group) != len(self.group) or second.group.shape[1] < self.max_length:
            shape = tuple(second.group.shape)
            raise ValueError(f"a map of shape {shape} cannot follow a map with {self.max_length} output tokens")
        dropped = self.group < 0
        group = torch.where(dropped, -1, _look_up(second.group, self.group))
        weight = torch.where(group >= 0, self.weight * _look_up(second.weight, self.group), 0.0)
        anchor = self.anchor & _look_up(second.anchor, self.group) & (group >= 0)
        added = self._added_before(second)
        return TokenMap(group, weight, anchor, second.length, added)._with_lengths(vars(second).get("lengths"))

    def of_inputs(self, index: Int[Tensor, " tokens"]) -> TokenMap:
        """Return the map of some inputs, or of all in another order: input `n` is this map's `index[n]`."""
        index = index.to(self.group.device)
        added = None if self.added is None else self.added[..., index]
        return TokenMap(self.group[:, index], self.weight[:, index], self.anchor[:, index], self.length, added)

    def rows(self, index: Int[Tensor, " rows"] | slice) -> TokenMap:
        """Return the map of the selected rows of the batch."""
        added = None if self.added is None else self.added[index]
        chosen = TokenMap(self.group[index], self.weight[index], self.anchor[index], self.length[index], added)
        lengths = vars(self).get("lengths")
        return chosen._with_lengths(lengths[index]) if lengths and isinstance(index, slice) else chosen

    def split(self) -> list[TokenMap]:
        """Return the map of each row. The lengths are read from the device once for all of them."""
        values = (self.group, self.weight, self.anchor, self.length)
        added = [None] * len(self.group) if self.added is None else self.added.split(1)
        parts = zip(*(value.split(1) for value in values), added, strict=True)
        return [TokenMap(*part)._with_lengths([length]) for part, length in zip(parts, self.lengths, strict=True)]

    @classmethod
    def stack(cls, maps: Sequence[TokenMap]) -> TokenMap:
        """Return maps of equally many tokens as one: the reverse of `split`."""
        if len(maps) == 1:
            return maps[0]
        stacked = cls(
            torch.cat([token_map.group for token_map in maps]),
            torch.cat([token_map.weight for token_map in maps]),
            torch.cat([token_map.anchor for token_map in maps]),
            torch.cat([token_map.length for token_map in maps]),
            cls._stacked([token_map._added() for token_map in maps], maps),
        )
        return stacked._with_lengths([length for token_map in maps for length in token_map.lengths])

    def after_dropping(self, front: int) -> TokenMap:
        """Return the same map for rows with `front` more tokens at the front, all of which it drops."""
        batch, device = len(self.group), self.group.device
        zeros = torch.zeros(batch, front, device=device)
        return TokenMap(
            torch.cat([zeros.long() - 1, self.group], 1),
            torch.cat([zeros.to(self.weight.dtype), self.weight], 1),
            torch.cat([zeros.bool(), self.anchor], 1),
            self.length,
            None if self.added is None else pad(self.added, (front, 0)),
        )

    def _added(self) -> Float[Tensor, "batch max_out tokens"] | None:
        """Return `added` without rows beyond the longest row."""
        return None if self.added is None else self.added[:, : self.max_length]

    def _added_before(self, second: TokenMap) -> Float[Tensor, "batch max_out tokens"] | None:
        """Return the added weights of this map followed by `second`."""
        if self.added is None and second.added is None:
            return None
        added = torch.zeros(len(self.group), second.max_length, self.group.shape[1], device=self.group.device)
        if (first := self._added()) is not None:
            added = added + second._matrix()[..., : self.max_length] @ first
        if (then := second._added()) is not None:
            first = self._matrix() if first is None else self._matrix() + first
            added = added + then[..., : self.max_length] @ first
        return added

    def _matrix(self) -> Float[Tensor, "batch max_out tokens"]:
        """Return the weight of each token in each output token, without `added`."""
        shape = (len(self.group), self.max_length + 1, self.group.shape[1])
        slot = torch.where(self.group < 0, self.max_length, self.group)[:, None]
        return torch.zeros(shape, device=self.group.device).scatter(1, slot, self.weight[:, None].float())[:, :-1]

    @staticmethod
    def _stacked(
        added: Sequence[Float[Tensor, "rows _ tokens"] | None], maps: Sequence[TokenMap]
    ) -> Float[Tensor, "batch max_out tokens"] | None:
        """Return the added weights of several maps of equally many tokens, or `None` if no map has any."""
        if all(values is None for values in added):
            return None
        longest = max(token_map.max_length for token_map in maps)
        return torch.cat([
            token_map.weight.new_zeros(len(token_map.group), longest, token_map.group.shape[1])
            if values is None
            else pad(values, (0, 0, 0, longest - values.shape[1]))
            for values, token_map in zip(added, maps, strict=True)
        ])  # fmt: skip

    def _with_lengths(self, lengths: list[int] | None) -> TokenMap:
        """Return this map, which takes `lengths` from here instead of reading them from the device."""
        if lengths is not None:
            vars(self)["lengths"] = lengths
        return self

    def check(self) -> None:
        """Raise `ValueError` if a group lies outside the output or an output token lacks exactly one anchor."""
        if ((self.group >= self.length[:, None]) | (self.group < -1)).any():
            raise ValueError("a token's group lies outside the output")
        within_length = torch.arange(self.max_length, device=self.group.device) < self.length[:, None]
        anchors = _per_group(self.group, self.anchor.to(torch.float32))[:, : self.max_length]
        if (anchors[within_length] != 1).any() or (self.anchor & (self.group < 0)).any():
            raise ValueError("every output token needs exactly one anchor among its members")


def highest(score: Float[Tensor, "batch tokens"], count: int) -> Bool[Tensor, "batch tokens"]:
    """Mark the `count` tokens of each row with the highest scores. Of equal scores, the first tokens win.

    `torch.topk` alone breaks ties differently on different devices. A stable sort would take longer: 1.4 instead of
    0.2 ms for 8 x 2880 scores on one CPU core.
    """
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    score = score.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # NaN is the highest, as in topk
    least = score.topk(count, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above, equal = score > least, score == least
    return above | (equal & (equal.cumsum(dim=1) <= count - above.sum(dim=1, keepdim=True)))


def means_by_size(
    x: Float[Tensor, "batch tokens dim"],
    group: Int[Tensor, "batch tokens"],
    sizes: Float[Tensor, "batch tokens"],
    count: int,
) -> tuple[Float[Tensor, "batch count dim"], Float[Tensor, "batch count"]]:
    """Return the mean of each of `count` groups, in which a token counts `sizes` times, and the groups' sizes.

    Every group must have a member. Sums are computed in at least float32. Gradients flow to `x`.
    """
    batch, _, dim = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    place = (torch.arange(batch, device=x.device)[:, None] * count + group).flatten()
    weighted = (x.to(wide) * sizes.to(wide)[..., None]).flatten(0, 1)
    total = torch.zeros(batch * count, dim, dtype=wide, device=x.device).index_add(0, place, weighted)
    size = torch.zeros(batch * count, dtype=sizes.dtype, device=x.device).index_add(0, place, sizes.flatten())
    return (total / size.to(wide)[:, None]).view(batch, count, dim).to(x.dtype), size.view(batch, count)


def rows_at(
    values: Shaped[Tensor, "batch tokens dim"], index: Int[Tensor, "batch some"]
) -> Shaped[Tensor, "batch some dim"]:
    """Return the tokens at the indices of each row of the batch."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def _per_group(group: Int[Tensor, "batch tokens"], value: Float[Tensor, "batch tokens"]) -> Float[Tensor, "batch g"]:
    """Sum `value` over the members of each group. The result has one column per token; unused groups are 0."""
    batch, tokens = group.shape
    out = torch.zeros(batch, tokens + 1, dtype=value.dtype, device=value.device)
    return out.scatter_add(1, torch.where(group >= 0, group, tokens), value)[:, :-1]


def _look_up(table: Tensor, group: Int[Tensor, "batch tokens"]) -> Tensor:
    """Return `table[row, group]` for every token; dropped tokens read column 0."""
    return table.gather(1, group.clamp(min=0)) if table.shape[1] else table.new_zeros(group.shape)


def _middle_member(group: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
    """Mark one member of each group: index (n - 1) // 2 of its n members in token order."""
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
