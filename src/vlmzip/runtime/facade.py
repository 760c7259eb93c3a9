"""The façade that `attach` returns: a model with a compressor, used like the model itself."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from vlmzip import spec
from vlmzip.compressor_file import write_compressor
from vlmzip.errors import UserError
from vlmzip.models import family_of
from vlmzip.noise import silence_pipeline
from vlmzip.processor import Inputs
from vlmzip.runtime.cache_names import cache_name, cache_of, returned_cache, with_cache_named
from vlmzip.runtime.call import CompressedCall, compress_call
from vlmzip.runtime.conversation import Conversations
from vlmzip.runtime.fitting import fitted, inside_the_llm, warn_if_nothing_to_do
from vlmzip.runtime.generation import Generated, Generation
from vlmzip.runtime.in_llm.hooks import Hooks, running
from vlmzip.runtime.in_llm.outcome import extend, loss_behind
from vlmzip.runtime.in_llm.state import InLLMState
from vlmzip.runtime.report import Report, last_report, publish
from vlmzip.runtime.resample import build_resampler, resampling, write_weights
from vlmzip.runtime.signature import names_inputs

#: The methods that switch gradient checkpointing, which transformers 5.23 calls "activation checkpointing".
CHECKPOINTING = {f"{kind}_checkpointing_{to}" for kind in ("gradient", "activation") for to in ("enable", "disable")}


class CompressedModel(nn.Module):
    """A vision-language model whose images go through a compressor. The original model is `inner`.

    `forward` and `generate` take the model's own arguments, by name. Other attributes are looked up on `inner`.

    `Trainer` can train it and resume training, but `Trainer.save_model` and checkpoints contain only weights: save with
    `trainer.model.save_pretrained(folder)`. `Trainer.predict` returns predictions for the compressed sequence, but
    labels for the prompt. To align them, call `report.lined_up` in `preprocess_logits_for_metrics`.
    """

    def __init__(self, model: nn.Module, compressor: spec.CompressorLike) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise UserError(
                f"model must be a loaded model, got {model!r}; load it first, or use"
                " vlmzip.from_pretrained(folder, compressor)"
            )
        if any(isinstance(module, CompressedModel) for module in model.modules()):
            raise UserError("this model already has a compressor: detach() it first, or attach to the plain model")
        self._family = family_of(model)
        compressor = fitted(compressor, self._family)
        self.inner: Any = model
        self.compressor = compressor
        #: The module with the weights of the method; `None` for a method without weights.
        self.resampler: nn.Module | None = build_resampler(self._family, compressor)
        self._conversations = Conversations()
        self._detached = False
        self._put_hooks()
        self.training = model.training  # not train(): parts of the model may be in another mode
        if self.resampler is not None:
            self.resampler.train(model.training)
        warn_if_nothing_to_do(compressor, self._family)

    # --- attached or not --------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._refuse_detached()
        return self

    def __exit__(self, *_error: object) -> None:
        self.detach()

    def detach(self) -> nn.Module:
        """Remove the compressor and return the plain model. Calling this again is harmless."""
        self._detached = True
        self._hooks.remove()
        return self.inner

    def switch(self, compressor: spec.CompressorLike) -> None:
        """Replace the compressor, for training in stages. Parameters and wrappers around this model stay the same.

        `compressor` is as in `attach`, but no weights are loaded. KV caches filled before the switch cannot be
        continued. Raise `UserError` if the compressor cannot act in the model, or if its method with weights is not the
        attached one.
        """
        compressor = fitted(compressor, self._family)
        if resampling(compressor) != resampling(self.compressor):
            raise UserError(
                "switch cannot add, remove or replace a method with weights; detach the model, then attach the new one"
            )
        moved = bool(inside_the_llm(compressor)) != bool(inside_the_llm(self.compressor))
        self.compressor = compressor
        self._conversations = Conversations()
        if moved:
            self._hooks.remove()
            self._put_hooks()

    def _put_hooks(self) -> None:
        """Put hooks on the LLM if a compressor acts inside it. `detach` or the end of the façade removes them."""
        inside = inside_the_llm(self.compressor) and not self._detached
        self._hooks = Hooks(self._family.llm, list(self._family.decoder_layers)) if inside else Hooks(None)
        weakref.finalize(self, self._hooks.remove).atexit = False

    def _refuse_detached(self) -> None:
        if self._detached:
            raise UserError("this model was detached; call vlmzip.attach(model, compressor) again")

    # --- calls ------------------------------------------------------------------------------------------------

    @property
    def report(self) -> Report:
        """Return the report of the last call of `forward` or `generate` in this thread, else in any thread.

        A call that continues a KV cache without new images does not replace the report.

        Raise `UserError` before the first call.
        """
        return last_report(self)

    @names_inputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: object = None,
        cache: object = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        pack_rows: bool = False,
        longest: int | None = None,
        **kwargs: object,
    ) -> Any:
        """Run the model's own `forward` on the compressed inputs; logits cover the compressed sequence.

        With `pack_rows`, which is for training, short rows are joined if possible: the same loss with less padding.
        With `longest`, nothing is learned from rows that have more tokens after compression.

        The named arguments are those that processors return and trainers look for; all others pass through unchanged.
        `forward` and `generate` can continue a KV cache that was filled here. Pass it as `past_key_values` or `cache`:
        both names work with every supported version of transformers. The inputs of a later turn are as in `generate`.
        """
        named = dict(
            input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, labels=labels,
            position_ids=position_ids, past_key_values=past_key_values, cache=cache, inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids, mm_token_type_ids=mm_token_type_ids,
        )  # fmt: skip
        arguments = {**{name: value for name, value in named.items() if value is not None}, **kwargs}
        arguments = with_cache_named(arguments, cache_name(self._family.model))
        call = self._compress(arguments, generating=False, pack_rows=pack_rows, longest=longest)
        out = self.inner(**call.inputs) if call.in_llm is None else self._forward_inside(call, call.in_llm)
        filled = cache_of(arguments)
        filled = returned_cache(out) if filled is None else filled  # not `or`: an empty cache can be falsy
        if filled is not None:
            self._remember(filled, call)
        return out

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config: object = None, **kwargs: object) -> Any:
        """Run the model's own `generate`; return the original prompt followed by the new tokens.

        To continue a cache that this model has filled, give the whole conversation or only its new part as the prompt.
        Your logits processors and stopping criteria see the compressed prompt.
        """
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        generation = Generation(self.inner, self._family, kwargs)
        call = self._compress(generation.arguments, generating=True)
        generation.refuse(call)
        if generation.arguments.get("input_ids") is None:  # from embeddings, `generate` returns only new tokens
            return self.inner.generate(**call.inputs)
        generated = generation.run(call)
        self._report_inside(call.report, generated.in_llm)
        if generated.cache is not None:
            self._remember(generated.cache, call, generated)
        generated.warn_beyond_positions(call)
        return generated.output

    @torch.compiler.disable  # copies counts from the device and loops over lists; later code is compiled
    def _compress(
        self, arguments: Inputs, *, generating: bool, pack_rows: bool = False, longest: int | None = None
    ) -> CompressedCall:
        self._refuse_detached()
        call = compress_call(
            self.inner, self._family, self.compressor, self.resampler, self._conversations, arguments,
            generating=generating, pack_rows=pack_rows, longest=longest,
        )  # fmt: skip
        # Later calls in a loop over new tokens keep the report of the images.
        if call.report.images or call.later_turn is None:
            publish(self, call.report)
        return call

    @torch.compiler.disable(recursive=False)  # the code around the LLM; each layer is compiled separately
    def _forward_inside(self, call: CompressedCall, in_llm: InLLMState) -> object:
        """Run `forward` with compressors inside the LLM; compute the loss on the tokens that the last layer sees."""
        labels = call.inputs.pop("labels", None) if call.inputs.spans else None
        with running(in_llm):
            out = self.inner(**call.inputs)
        self._report_inside(call.report, [in_llm])
        return out if labels is None else loss_behind(in_llm, out, labels, call.inputs)

    def _report_inside(self, report: Report, states: Sequence[InLLMState]) -> None:
        """Publish the report again with the compression inside the LLM, if the LLM took in images."""
        steps = [state.first for state in states if state.first is not None]
        if steps:
            publish(self, extend(report, steps))

    @torch.compiler.disable  # as `_compress`
    def _remember(self, cache: object, call: CompressedCall, generated: Generated | None = None) -> None:
        """Remember the state of `cache` after the call, if it is known."""
        if call.can_be_continued:
            state = call.cache_state()
            if generated is not None:
                state = state.and_generated(generated.new_tokens, generated.filler)
            self._conversations.remember(cache, state)

    # --- saving -----------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the inner model, and the compressor as `compressor.json`.

        The inner model keeps its own names, so that transformers alone can load it. The weights of a method with
        weights are written to `resampler.safetensors`.
        """
        if kwargs.get("push_to_hub"):
            self.push_to_hub()
        state = kwargs.get("state_dict")
        if state is not None:  # trainers pass the state dict of the façade
            kwargs["state_dict"] = {
                name.removeprefix("inner."): value for name, value in state.items() if not name.startswith("resampler.")
            }
        self.inner.save_pretrained(folder, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        if self.resampler is not None:
            write_weights(self.resampler.state_dict() if state is None else _under("resampler.", state), folder)
        write_compressor(self.compressor, folder)

    def push_to_hub(self, *_args: object, **_kwargs: object) -> NoReturn:
        """Raise `UserError`: transformers would upload the model without its compressor."""
        raise UserError("call save_pretrained(folder) first, then upload the folder with huggingface_hub.upload_folder")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state dict, with the inner model's names under `inner.`.

        Tied weights are copied, because safetensors does not save shared tensors.
        """
        state = super().state_dict(*args, **kwargs)
        seen: set[int] = set()
        for name, value in state.items():
            if isinstance(value, Tensor) and value.numel():
                if value.data_ptr() in seen:
                    state[name] = value.clone()
                seen.add(value.data_ptr())
        return state

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_hooks"}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self._put_hooks()

    # --- like the model itself --------------------------------------------------------------------------------

    @property
    def generation_config(self) -> GenerationConfig:
        """Return the generation config of the inner model. Setting it here sets it there."""
        return self.inner.generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        self.inner.generation_config = config

    def _switch_checkpointing(self, name: str, *args: object, **kwargs: object) -> None:
        """Switch gradient checkpointing in the model, and in the parts of the resampler that support it."""
        getattr(self.inner, name)(*args, **kwargs)
        for module in () if self.resampler is None else self.resampler.modules():
            if getattr(module, "supports_gradient_checkpointing", False):
                getattr(module, name)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner":
                raise
            value = getattr(self.inner, name)
            return partial(self._switch_checkpointing, name) if name in CHECKPOINTING else value


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of a state dict whose names begin with `prefix`, and remove it from the names."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


silence_pipeline(CompressedModel.__name__)
