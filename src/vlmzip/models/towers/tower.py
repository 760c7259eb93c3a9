"""Vision encoders: queries and keys of their attention, and the scores and keys of visual tokens made from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlmzip.errors import UnfitMethod
from vlmzip.models.recording import Recording, attention_received, cls_attention_row, mean_over_heads, rotate
from vlmzip.visual_tokens import Grid, Signal

#: Names of the projections to queries, keys and values, by kind of attention. A fused projection returns all three.
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("qkv",))
#: Names of the projection after the attention.
OUTPUTS = ("out_proj", "o_proj", "proj", "projection_layer", "projection", "dense")
#: Names of the norms that some attentions apply to queries and keys.
NORMS = ("q_norm", "k_norm")
#: Names of the number of heads and of the factor of the scores, on the attention or its config.
HEADS = ("num_heads", "num_attention_heads", "n_heads")
SCALES = ("scale", "scaling")
#: What a message offers where the attention of an encoder cannot be read.
OTHER_METHODS = "choose a method that does not look at the encoder's attention"
#: The most tokens, such as CLS and registers, that encoders put before the patches of a view.
MOST_LEADING = 16


@dataclass(frozen=True)
class Attention:
    """The attention of one encoder layer: the modules that give queries, keys and values, its heads, and its scale."""

    layer: nn.Module
    module: nn.Module
    parts: tuple[nn.Module, ...]
    """The modules whose outputs are queries, keys and values, or the fused projection."""
    heads: int
    head_dim: int
    scale: float
    norms: tuple[Any, ...] = ()
    """The norms of queries and keys by head that follow a fused projection."""

    @classmethod
    def of(cls, layer: nn.Module) -> Attention | None:
        """Return the attention of a layer, or `None` if it has none of a known kind."""
        for module in layer.modules():
            heads = _first(module, HEADS) or _first(getattr(module, "config", None), HEADS)
            for names in PROJECTIONS:
                parts = [getattr(module, name, None) for name in names]
                if not heads or not all(isinstance(part, nn.Module) for part in parts):
                    continue
                width = getattr(module, "head_dim", None) or _width(parts[-1]) // heads
                norms = [getattr(module, name, None) for name in NORMS]
                if not all(isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity) for norm in norms):
                    norms = []
                elif len(parts) == 3:  # the norms' outputs are recorded instead of the projections'
                    parts, norms = [*norms, getattr(module, "v_norm", parts[2])], []
                modules = tuple(part for part in parts if isinstance(part, nn.Module))
                scale = float(_first(module, SCALES) or width**-0.5)
                return cls(layer, module, modules, heads, width, scale, tuple(norms))
        return None

    @property
    def output(self) -> nn.Module | None:
        """The projection after the attention."""
        module = _first(self.module, OUTPUTS)
        return module if isinstance(module, nn.Module) else None


class Merge(NamedTuple):
    """How squares of patches make visual tokens."""

    leading: int
    """The number of tokens, such as CLS, before the patches of each view."""
    side: int
    """The number of patches per side of a token's square."""


class Tower:
    """A vision encoder of several layers with attention, which runs over views or over a sequence of all patches.

    A score is the attention from CLS, or in encoders without CLS the attention received. Scores and keys of a visual
    token are means over heads and over the square of patches that the token is made from.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder: Any = encoder

    @cached_property
    def attentions(self) -> list[Attention]:
        """The attention of each layer. Raise `UserError` if the layers have no attention of a known kind."""
        lists = [module for module in self.encoder.modules() if isinstance(module, nn.ModuleList)]
        for layers in sorted(lists, key=len, reverse=True):
            attentions = [Attention.of(layer) for layer in layers]
            if attentions and None not in attentions:
                return [attention for attention in attentions if attention is not None]
        raise UnfitMethod(f"vlmzip does not know the attention of {type(self.encoder).__name__}: {OTHER_METHODS}")

    @property
    def depth(self) -> int:
        """The number of layers."""
        return len(self.attentions)

    def has_cls(self, recording: Recording, grids: Sequence[Grid], prefix: int) -> bool:
        """Return True if CLS precedes the patches of each view."""
        return prefix > 0 or self._leading(self.queries_and_keys(recording, 0)[1].shape[:2], grids) > 0

    def whose(self, layer: int, *, cls: bool) -> str:
        """Return in a few words which tokens attend in a layer."""
        return "CLS" if cls else "all tokens"

    def modules(
        self, layers: Iterable[int], *, values: bool = False
    ) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        """Return the modules for `record`: those whose outputs, and those whose arguments give queries and keys."""
        attentions = {layer: self.attentions[layer] for layer in layers}
        count = 3 if values else 2
        outputs = {f"{layer}.{n}": m for layer, each in attentions.items() for n, m in enumerate(each.parts[:count])}
        return outputs, {str(layer): attention.module for layer, attention in attentions.items()}

    @torch.no_grad()
    def signal(
        self,
        signal: Signal,
        recording: Recording,
        layer: int,
        grids: Sequence[Grid],
        prefix: int,
        of_patch: Int[Tensor, "rows length"] | None = None,
    ) -> Float[Tensor, " tokens *key_dim"]:
        """Return a signal of the encoder's attention for all tokens of all views, from a recorded layer.

        `prefix` tokens of each view precede its grid. They are tokens of the encoder and have scores, too. `of_patch`
        has the number of the token that each patch makes, -1 for none, if it does not follow from the grids.
        """
        if signal is Signal.CLS_ATTENTION:
            return self.scores(recording, layer, grids, prefix, of_patch)
        if signal is Signal.LAST_CLS_ATTENTION:
            return self.scores(recording, layer, grids, prefix, of_patch, joined=True)
        if signal is Signal.ATTENTION_RECEIVED:
            return self.received(recording, layer, grids, prefix, of_patch)
        _, key = self.queries_and_keys(recording, layer)
        keys = key if signal is Signal.LAST_KEYS else mean_over_heads(key, self.attentions[layer].heads)
        return self._of_tokens(keys, grids, prefix, of_patch)

    @torch.no_grad()
    def scores(
        self,
        recording: Recording,
        layer: int,
        grids: Sequence[Grid],
        prefix: int,
        of_patch: Int[Tensor, "rows length"] | None = None,
        *,
        joined: bool = False,
    ) -> Float[Tensor, " tokens"]:
        """Return the score of all tokens of all views, from a recorded layer.

        With `joined`, all heads count as one head of the layer's full width.
        """
        query, key = self.queries_and_keys(recording, layer)
        leads = self._leading(key.shape[:2], grids) if of_patch is None else bool((of_patch[:, 0] < 0).all())
        if prefix or leads:
            scores = cls_attention_row(query, key, *self._heads(layer, joined=joined))
            return self._of_tokens(scores, grids, prefix, of_patch)
        return self.received(recording, layer, grids, prefix, of_patch, joined=joined)

    @torch.no_grad()
    def received(
        self,
        recording: Recording,
        layer: int,
        grids: Sequence[Grid],
        prefix: int,
        of_patch: Int[Tensor, "rows length"] | None = None,
        *,
        joined: bool = False,
    ) -> Float[Tensor, " tokens"]:
        """Return the attention that all tokens of all views receive from their view, in a recorded layer."""
        query, key = self.queries_and_keys(recording, layer)
        heads, scale = self._heads(layer, joined=joined)
        if recording.arguments[str(layer)].get("cu_seqlens") is not None:
            # Multiply by the length of the sequence, so that windows and images of different sizes are comparable.
            lengths = self.sequences(recording, layer, key.shape[1])
            parts = zip(query.split(lengths, 1), key.split(lengths, 1), strict=True)
            scores = torch.cat([attention_received(q, k, heads, scale) * k.shape[1] for q, k in parts], 1)
        else:
            mask = self.mask(recording, layer)
            if mask is None and of_patch is None and len(key) < len(grids):
                raise UnfitMethod(
                    f"{type(self.encoder).__name__} joins images into one sequence in a way that vlmzip does not know:"
                    f" load the model with attn_implementation='sdpa', or {OTHER_METHODS}"
                )
            scores = attention_received(query, key, heads, scale, mask=mask)
        return self._of_tokens(scores, grids, prefix, of_patch)

    def _heads(self, layer: int, *, joined: bool) -> tuple[int, float]:
        """Return the number of heads of a layer and the factor of its scores."""
        attention = self.attentions[layer]
        return (1, (attention.heads * attention.head_dim) ** -0.5) if joined else (attention.heads, attention.scale)

    def _of_tokens(
        self,
        values: Float[Tensor, "rows length *key_dim"],
        grids: Sequence[Grid],
        prefix: int,
        of_patch: Int[Tensor, "rows length"] | None,
    ) -> Float[Tensor, " tokens *key_dim"]:
        """Return the mean of `values` over the patches of each token, for all views."""
        return self.by_token(values, grids, prefix) if of_patch is None else means(values, of_patch)

    def by_token(
        self, values: Float[Tensor, "rows length *key_dim"], grids: Sequence[Grid], prefix: int
    ) -> Float[Tensor, " tokens *key_dim"]:
        """Return the mean of `values` over the patches of each token, for all views.

        `values` has a row for each view, or one row for all patches of all views in raster order.
        """
        leading = 0 if prefix else self._leading(values.shape[:2], grids)
        side = self.patches_per_side(values.shape[:2], grids, prefix)
        patches = values[:, leading:].flatten(0, 1)
        if side == 1:
            return patches
        parts = patches.split([grid.size * side**2 for grid in grids])
        return torch.cat([self._merged(part, grid, side) for part, grid in zip(parts, grids, strict=True)])

    def _merged(self, patches: Tensor, grid: Grid, side: int) -> Tensor:
        """Return the mean over the squares of patches of one view."""
        squares = patches.unflatten(0, (grid.frames, grid.rows, side, grid.cols, side))
        merged: Tensor = squares.mean((2, 4)).flatten(0, 2)
        return merged

    def patches_per_side(self, shape: Sequence[int], grids: Sequence[Grid], prefix: int = 0) -> int:
        """Return the side of the square of patches that makes a token. Raise `UserError` if it is not known."""
        if (merge := self.merge(shape, grids, prefix)) is None:
            raise UnfitMethod(
                f"vlmzip does not know which patches of {type(self.encoder).__name__} make a visual token"
                f" ({math.prod(shape)} patches, {sum(grid.size for grid in grids)} tokens): {OTHER_METHODS}"
            )
        return merge.side

    def merge(self, shape: Sequence[int], grids: Sequence[Grid], prefix: int = 0) -> Merge | None:
        """Return how squares of patches make the tokens of these grids, or `None` if they do not fill them.

        `shape` is the number of rows of the encoder, one for each view or one for all, and the length of a row.
        """
        rows, length = shape
        leading = 0 if prefix else self._leading(shape, grids)
        tokens, patches = sum(prefix + grid.size for grid in grids), rows * (length - leading)
        side = math.isqrt(patches // tokens)
        return None if side**2 * tokens != patches or (prefix and side > 1) else Merge(leading, side)

    def _leading(self, shape: Sequence[int], grids: Sequence[Grid]) -> int:
        """Return the number of tokens, such as CLS, before the patches of each view."""
        rows, length = shape
        if rows == len(grids) and len({grid.size for grid in grids}) == 1:
            for leading in range(min(MOST_LEADING, length)):
                ratio, rest = divmod(length - leading, grids[0].size)
                if not rest and math.isqrt(ratio) ** 2 == ratio:
                    return leading
        return 0

    def queries_and_keys(
        self, recording: Recording, layer: int
    ) -> tuple[Float[Tensor, "rows length dim"], Float[Tensor, "rows length dim"]]:
        """Return the queries and keys of a recorded layer, with concatenated heads, as the encoder compares them."""
        attention = self.attentions[layer]
        query, key = (self.part(recording, layer, number) for number in (0, 1))
        arguments = recording.arguments[str(layer)]
        if (angles := arguments.get("position_embeddings")) is not None:
            # Each axis of the positions, such as columns and rows, may rotate a part of its own.
            positions = arguments.get("position_ids")
            axes = positions.shape[-1] if positions is not None and positions.ndim == 3 else 1
            cos, sin = (table.float()[..., None, :].chunk(axes, -1) for table in angles)
            by_head = (states.float().unflatten(-1, (attention.heads, -1)).chunk(axes, -1) for states in (query, key))
            query, key = (torch.cat(list(map(_rotated, parts, cos, sin)), -1).flatten(-2) for parts in by_head)
        return query, key

    def part(self, recording: Recording, layer: int, number: int) -> Float[Tensor, "rows length dim"]:
        """Return the queries (0), keys (1) or values (2) of a recorded layer as they were projected."""
        attention = self.attentions[layer]
        fused = len(attention.parts) == 1
        states: Tensor = recording[f"{layer}.0" if fused else f"{layer}.{number}"]
        if fused:
            queries = attention.heads * attention.head_dim
            keys = (states.shape[-1] - queries) // 2  # several query heads may share a key
            states = states.split([queries, keys, keys], dim=-1)[number]
            if attention.norms and number < 2:
                states = attention.norms[number](states.unflatten(-1, (-1, attention.head_dim))).flatten(-2)
        if states.ndim == 4:  # a norm by head
            states = (states if states.shape[2] == attention.heads else states.transpose(1, 2)).flatten(2)
        shared = attention.heads * attention.head_dim // states.shape[-1]
        if shared > 1:  # several query heads share a key
            states = states.unflatten(-1, (-1, attention.head_dim)).repeat_interleave(shared, -2).flatten(-2)
        return states if states.ndim == 3 else states[None]

    def shape(self, recording: Recording, layer: int) -> Sequence[int]:
        """Return the number of rows and the length of a row in a recorded layer."""
        return self.part(recording, layer, 1).shape[:2]

    def sequences(self, recording: Recording, layer: int, length: int) -> list[int]:
        """Return the lengths of the sequences that a row of `length` tokens consists of."""
        ends: Tensor | None = recording.arguments[str(layer)].get("cu_seqlens")
        return [length] if ends is None else ends.diff().tolist()

    def mask(self, recording: Recording, layer: int) -> Tensor | None:
        """Return what the attention of a recorded layer adds to its scores."""
        mask: Tensor | None = recording.arguments[str(layer)].get("attention_mask")
        if mask is None or mask.dtype != torch.bool:
            return mask
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)


def means(
    values: Float[Tensor, "rows length *key_dim"], of_patch: Int[Tensor, "rows length"]
) -> Float[Tensor, " tokens *key_dim"]:
    """Return the mean of `values` over the patches of each token; `of_patch` has the token of each patch, or -1."""
    of_patch = of_patch.to(values.device)
    used, tokens = of_patch >= 0, int(of_patch.max()) + 1
    total = values.new_zeros(tokens, *values.shape[2:]).index_add_(0, of_patch[used], values[used])
    return total / of_patch[used].bincount().view(-1, *[1] * (values.ndim - 2))


def _rotated(heads: Tensor, cos: Float[Tensor, "*batch rotary_dim"], sin: Float[Tensor, "*batch rotary_dim"]) -> Tensor:
    """Return queries or keys by head, with the leading entries rotated that `cos` and `sin` have angles for."""
    turned, rest = heads.split([cos.shape[-1], heads.shape[-1] - cos.shape[-1]], dim=-1)
    return torch.cat([rotate(turned, cos.expand_as(turned), sin.expand_as(turned)), rest], dim=-1)


def _first(owner: object, names: Sequence[str]) -> Any:
    """Return the first attribute that is set, or `None`."""
    return next((value for name in names if (value := getattr(owner, name, None)) is not None), None)


def _width(projection: Any) -> int:
    """Return the width of the features that a projection takes."""
    if (width := getattr(projection, "in_features", None)) is not None:
        return int(width)
    return int(next(parameter for parameter in projection.parameters() if parameter.ndim == 2).shape[-1])
