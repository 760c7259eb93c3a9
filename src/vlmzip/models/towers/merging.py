"""Merge tokens inside a vision encoder, between attention and MLP of its layers. The encoder does not change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlmzip.errors import UnfitMethod
from vlmzip.models.recording import mean_over_heads
from vlmzip.models.towers.tower import Attention, Tower
from vlmzip.processor import InputDict
from vlmzip.token_map import TokenMap, means_by_size, rows_at

P = ParamSpec("P")
T = TypeVar("T")

#: A function from the keys and sizes of a layer's tokens, the number of tokens in front that stay alone, and the number
#: of tokens to leave behind them, to the group of each token; see `MergesInEncoder.join`.
Join = Callable[
    [Float[Tensor, "rows tokens key_dim"], Float[Tensor, "rows tokens"], int, int], Int[Tensor, "rows tokens"]
]
#: The norm between attention and MLP of a layer, and the MLP (CLIP, SigLIP).
BETWEEN, MLP = "layer_norm2", "mlp"
#: Attention implementations that add a mask to the scores.
ADD_A_MASK = ("sdpa", "eager")
#: What a message offers where tokens cannot be merged inside an encoder.
BEHIND = "choose a method or a site behind the encoder"

#: The merging of the current thread. Hooks run in every thread's forward, so each acts only in its own run.
_merging: ContextVar[Merging | None] = ContextVar("vlmzip_merging", default=None)


@dataclass(frozen=True)
class Layer:
    """The parts of an encoder layer that merging needs."""

    module: nn.Module
    attention: Attention
    between: nn.Module
    mlp: nn.Module

    @classmethod
    def of(cls, attention: Attention) -> Layer | None:
        """Return the parts of a layer, or `None` if it is not of a known kind."""
        between, mlp = (getattr(attention.layer, name, None) for name in (BETWEEN, MLP))
        if not isinstance(between, nn.Module) or not isinstance(mlp, nn.Module) or len(attention.parts) != 3:
            return None
        return cls(attention.layer, attention, between, mlp)


def layers_of(tower: Tower, count: int) -> list[Layer]:
    """Return the first `count` layers of an encoder. Raise `UserError` if tokens cannot be merged inside them."""
    name = type(tower.encoder).__name__
    layers = [Layer.of(attention) for attention in tower.attentions[:count]]
    if None in layers:
        raise UnfitMethod(f"vlmzip does not know where tokens can be merged in the layers of {name}: {BEHIND}")
    if tower.encoder.config._attn_implementation not in ADD_A_MASK:
        raise UnfitMethod(
            f"merged tokens need a term in the attention scores of {name}: load the model with"
            f" attn_implementation='sdpa', or {BEHIND}"
        )
    return [layer for layer in layers if layer is not None]


class Merging:
    """One run of an encoder that merges tokens: how many each layer leaves, and what has been merged so far.

    A layer computes x + attention(x), and then y + MLP(norm(y)). The norm gets the merged tokens. What the MLP returns
    for a merged token is added to each of its members y, and the result of the layer is merged: the mean of the members
    is their mean before the MLP, plus what the MLP returned.
    """

    def __init__(
        self,
        counts: Sequence[int],
        join: Join,
        order: Int[Tensor, " tokens"],
        front: int = 0,
        sizes: Float[Tensor, "rows tokens"] | None = None,
    ) -> None:
        self.counts = counts
        """The number of tokens after each layer, beside those that stay alone."""
        self.join = join
        self.order = order
        """The numbers of the first layer's tokens. Those that stay alone, such as CLS and padding, come first."""
        self.front = front
        """The number of tokens that stay alone."""
        self.sizes = sizes
        """The number of patches of each token; `None` before tokens are merged."""
        self.group: Int[Tensor, "rows tokens"] | None = None
        """The present token that each of the first layer's tokens has joined."""
        self._keys: Tensor | None = None
        self._step: Int[Tensor, "rows tokens"] | None = None

    def begin(self, arguments: InputDict, number: int) -> InputDict:
        """Return the arguments of a layer's attention, with log s on the scores of tokens of s patches."""
        states: Tensor = arguments["hidden_states"]
        if number == 0 and states.shape[1] != len(self.order):
            raise UnfitMethod(
                f"the model makes {len(self.order)} visual tokens of {states.shape[1]} tokens of its encoder, which"
                f" therefore cannot be merged inside it: {BEHIND}"
            )
        if self.sizes is None:
            return arguments
        if arguments.get("attention_mask") is not None:
            raise UnfitMethod(f"this encoder masks its attention, so that its tokens cannot be merged: {BEHIND}")
        return {**arguments, "attention_mask": self.sizes.log().to(states)[:, None, None]}

    def keep_keys(self, keys: Tensor, heads: int) -> None:
        """Keep the keys of a layer, mean over heads."""
        self._keys = mean_over_heads(keys.detach(), heads)

    def merge(self, states: Float[Tensor, "rows tokens dim"], number: int) -> Float[Tensor, "rows left dim"]:
        """Decide what is merged in a layer, and return the merged tokens."""
        rows, tokens, _ = states.shape
        if self.counts[number] == tokens - self.front:
            self._step = None
            return states
        with torch.no_grad():
            assert self._keys is not None
            sizes = states.new_ones(rows, tokens, dtype=torch.float32) if self.sizes is None else self.sizes
            self.sizes = sizes.to(states.device)
            # Once tokens have been merged, those that stay alone are the first ones.
            order = self.order.to(states.device) if self.group is None else torch.arange(tokens, device=states.device)
            step = self.join(self._keys[:, order], self.sizes[:, order], self.front, self.counts[number])
            self._step = step[:, order.argsort()]
            self.group = self._step if self.group is None else self._step.gather(1, self.group.to(states.device))
        return self._merged(states, number)[0]

    def spread(self, states: Float[Tensor, "rows left dim"]) -> Float[Tensor, "rows tokens dim"]:
        """Return what the MLP returned for the token that each of the layer's tokens has joined."""
        if self._step is None:
            return states
        return rows_at(states, self._step)

    def end(self, states: Float[Tensor, "rows tokens dim"], number: int) -> Float[Tensor, "rows left dim"]:
        """Return the result of a layer with its tokens merged."""
        self._keys = None
        if self._step is None:
            return states
        states, self.sizes = self._merged(states, number)
        self._step = None
        return states

    def _merged(self, states: Tensor, number: int) -> tuple[Tensor, Tensor]:
        assert self._step is not None
        assert self.sizes is not None
        return means_by_size(states, self._step, self.sizes, self.front + self.counts[number])

    def result(self, states: Float[Tensor, "rows end dim"]) -> tuple[TokenMap, Float[Tensor, "rows left dim"]]:
        """Return the map of the whole run and the tokens after it, in the order of their anchors.

        The tokens that stayed alone are dropped.
        """
        assert self.group is not None
        token_map = TokenMap.merge(torch.where(self.group < self.front, -1, self.group - self.front))
        order = token_map.anchor_index().argsort(dim=1)
        features = rows_at(states[:, self.front :], order)
        return token_map.in_anchor_order(), features


def alone_first(chosen: Int[Tensor, " some"], prefix: int, tokens: int) -> Int[Tensor, " tokens"]:
    """Return the numbers of a view's tokens with those of `chosen`, beside the prefix, behind all others."""
    is_last = torch.zeros(tokens, dtype=torch.bool)
    is_last[chosen[prefix:]] = True
    return is_last.to(torch.uint8).argsort(stable=True)


@contextmanager
def merging_inside(tower: Tower, merging: Merging) -> Iterator[None]:
    """Merge tokens in the run of an encoder inside the block. Other threads' runs are not affected.

    All hooks are removed at the end.
    """
    layers = layers_of(tower, len(merging.counts))
    token = _merging.set(merging)
    try:
        with ExitStack() as stack:
            for number, layer in enumerate(layers):
                for handle in _hooks(merging, layer, number):
                    stack.callback(handle.remove)
                stack.enter_context(_without_checkpointing(layer.module))
            yield
    finally:
        _merging.reset(token)


def _hooks(merging: Merging, layer: Layer, number: int) -> Iterator[Any]:
    """Put the hooks of one layer, and yield their handles."""

    def here(hook: Callable[P, T]) -> Callable[P, T | None]:
        @wraps(hook)
        def of_this_run(*args: P.args, **keywords: P.kwargs) -> T | None:
            return hook(*args, **keywords) if _merging.get() is merging else None

        return of_this_run

    def begin(_module: nn.Module, args: tuple[Any, ...], keywords: InputDict) -> tuple[tuple[Any, ...], InputDict]:
        named = dict(zip(("hidden_states", "attention_mask"), args, strict=False))
        return (), merging.begin({**named, **keywords}, number)

    def after_keys(_module: nn.Module, _args: object, output: Tensor) -> None:
        merging.keep_keys(output, layer.attention.heads)

    def between(_module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        return merging.merge(args[0], number)

    def after_mlp(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return merging.spread(output)

    def end(_module: nn.Module, _args: object, output: Any) -> Any:
        if isinstance(output, tuple):
            return (merging.end(output[0], number), *output[1:])
        return merging.end(output, number)

    # Before the hooks of a recording, which then sees the arguments that the attention gets.
    yield layer.attention.module.register_forward_pre_hook(here(begin), prepend=True, with_kwargs=True)
    yield layer.attention.parts[1].register_forward_hook(here(after_keys))
    yield layer.between.register_forward_pre_hook(here(between))
    yield layer.mlp.register_forward_hook(here(after_mlp))
    yield layer.module.register_forward_hook(here(end))


@contextmanager
def _without_checkpointing(module: Any) -> Iterator[None]:
    """Turn off gradient checkpointing in a layer: it would run the layer again when the hooks are gone."""
    if not getattr(module, "gradient_checkpointing", False):
        yield
        return
    module.gradient_checkpointing = False
    try:
        yield
    finally:
        module.gradient_checkpointing = True
