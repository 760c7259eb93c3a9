"""Hooks on the LLM and its layers, through which compressors inside it act. Without a running call they do nothing.

They stay on the model while a façade is attached, because gradient checkpointing may run layers again during backward.
The state of a forward is passed as an argument of the layers, so that a recomputation gets it, too, even in another
thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vlmzip.errors import UnfitMethod
from vlmzip.runtime.cache_names import cache_argument
from vlmzip.runtime.in_llm.restore import aside_of
from vlmzip.runtime.in_llm.state import InLLMState
from vlmzip.runtime.in_llm.step import Step
from vlmzip.runtime.other_methods import names_other_methods
from vlmzip.runtime.versions import argument

#: The keyword argument that passes the state of a forward from the LLM to its layers.
STEP = "vlmzip_step"

#: The attributes of modules in which torch keeps these hooks.
HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")

_running: ContextVar[InLLMState | None] = ContextVar("vlmzip_inside", default=None)
_lock = threading.Lock()


@contextmanager
def running(inside: InLLMState | None) -> Iterator[None]:
    """Make `inside` the running call for the block, in this thread only. `None` makes the hooks do nothing."""
    token = _running.set(inside)
    try:
        yield
    finally:
        _running.reset(token)


class LLMHook:
    """A hook that passes the state of the running call to the layers, before the LLM runs."""

    @torch.compiler.disable
    @names_other_methods
    def __call__(self, llm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inside = _running.get()
        if inside is None or inside.plan.family.llm is not llm:
            return None
        embeddings = argument(kwargs, "inputs_embeds", "the LLM")
        if embeddings is None:
            raise UnfitMethod(
                f"{type(llm).__name__} puts images into the prompt itself, so that compressors inside it cannot find"
                " them; choose a site before the LLM"
            )
        step = inside.step(embeddings, cache_argument(kwargs, "the LLM"))
        return None if step is None else (args, {**kwargs, STEP: step})


class LayerHook:
    """A hook that shortens the inputs of a decoder layer before it runs, if it gets the state of a forward."""

    def __init__(self, index: int) -> None:
        self.index = index

    @torch.compiler.disable
    @names_other_methods
    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step: Step | None = kwargs.pop(STEP, None)
        if step is None:
            return None
        kwargs = dict(kwargs)
        hidden = args[0] if args else argument(kwargs, "hidden_states", "a decoder layer")
        if hidden.ndim != 3:
            raise UnfitMethod(
                "the layers of this LLM pass several hidden states for each token, which cannot be dropped or merged"
                " yet; choose a site before the LLM"
            )
        hidden = step.enter(self.index, layer, hidden, kwargs)
        if args:
            return (hidden, *args[1:]), kwargs
        kwargs["hidden_states"] = hidden
        return args, kwargs


class RestoreHook:
    """A hook that restores the tokens after a decoder layer, if `LayerHook` set them aside."""

    @torch.compiler.disable
    def __call__(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        aside = aside_of(args[0] if args else kwargs.get("hidden_states"))
        if aside is None:
            return None
        if isinstance(output, tuple):
            return (aside.restored(output[0]), *output[1:])
        return aside.restored(output)


#: The number of façades that use the hooks of a module.
_users: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


class Hooks:
    """The hooks of a façade on a model. All façades of a model share them, and the last one to go removes them."""

    def __init__(self, llm: nn.Module | None, layers: Sequence[nn.Module] = ()) -> None:
        self._modules = [] if llm is None else [llm, *layers]
        with _lock:
            for number, module in enumerate(self._modules):
                hook: LayerHook | LLMHook = LayerHook(number - 1) if number else LLMHook()
                if not _ours(module):  # a copied model already has the hooks of the original
                    module.register_forward_pre_hook(hook, with_kwargs=True)
                    if number:
                        module.register_forward_hook(RestoreHook(), with_kwargs=True)
                _users[module] = _users.get(module, 0) + 1

    def remove(self) -> None:
        """Release the hooks; remove them from modules that no other façade uses. A second call does nothing."""
        with _lock:
            for module in self._modules:
                _users[module] -= 1
                if _users[module] == 0:
                    for number in _ours(module):
                        for hooks in HOOKS:
                            getattr(module, hooks).pop(number, None)
            self._modules = []


def _ours(module: nn.Module) -> list[int]:
    hooks = {**module._forward_pre_hooks, **module._forward_hooks}
    return [number for number, hook in hooks.items() if isinstance(hook, LLMHook | LayerHook | RestoreHook)]
