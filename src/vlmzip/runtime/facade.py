"""What `attach` returns: the model with a compressor before or inside its LLM, used like the model itself."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from vlmzip.compressor import Compressor
from vlmzip.compressor_file import write_compressor
from vlmzip.errors import UserError
from vlmzip.models import family_of
from vlmzip.processor import Inputs
from vlmzip.runtime import pipelines
from vlmzip.runtime.cache import cache_name, cache_of, returned_cache, with_cache_named
from vlmzip.runtime.call import CompressedCall, compress_call
from vlmzip.runtime.conversation import Conversations
from vlmzip.runtime.generation import Generated, Generation
from vlmzip.runtime.in_llm.hooks import Hooks, running
from vlmzip.runtime.in_llm.outcome import extend, loss_behind
from vlmzip.runtime.in_llm.state import InLLMState
from vlmzip.runtime.last_report import last_report, publish
from vlmzip.runtime.place import check_place, inside_the_llm, warn_if_nothing_to_do
from vlmzip.runtime.report import Report
from vlmzip.runtime.resample import build_resampler, resampling, write_weights
from vlmzip.runtime.signature import names_image_inputs

#: The switches of gradient checkpointing: "activation" is what transformers 5.23 calls it.
CHECKPOINTING = {f"{kind}_checkpointing_{to}" for kind in ("gradient", "activation") for to in ("enable", "disable")}


class CompressedModel(nn.Module):
    """A vision-language model whose images go through a compressor; holds the model as `inner`.

    `forward` and `generate` take what the model takes, by name. What is not defined here is looked up on the model.

    `Trainer` trains it and resumes it, but `Trainer.save_model` and checkpoints write weights alone: save with
    `trainer.model.save_pretrained(folder)`. What `Trainer.predict` returns covers the compressed sequence, the labels
    beside it the prompt; `report.lined_up`, called in `preprocess_logits_for_metrics`, brings them together.
    """

    def __init__(self, model: nn.Module, compressor: Compressor) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise UserError(f"{model!r} is no model: load it first, or use vlmzip.from_pretrained(folder, compressor)")
        if any(isinstance(module, CompressedModel) for module in model.modules()):
            raise UserError("this model already has a compressor: detach() it first, or attach to the plain model")
        self._family = family_of(model)
        check_place(compressor, self._family)
        self.inner: Any = model
        self.compressor = compressor
        #: The weights of a method that has some, else `None`.
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
        """End the façade and return the plain model. Detaching twice is harmless."""
        self._detached = True
        self._hooks.remove()
        return self.inner

    def switch(self, compressor: Compressor) -> None:
        """Go on with another compressor; parameters, and whatever is wrapped around this façade, stay as they are.

        For training in stages. What a KV cache has seen, it has seen: begin new ones. Raise `UserError` for a
        compressor that has no place in the model, or that brings or needs other weights of its own.
        """
        check_place(compressor, self._family)
        if resampling(compressor) != resampling(self.compressor):
            raise UserError("a method with weights of its own cannot be switched on or off: attach it anew")
        moved = bool(inside_the_llm(compressor)) != bool(inside_the_llm(self.compressor))
        self.compressor = compressor
        self._conversations = Conversations()
        if moved:
            self._hooks.remove()
            self._put_hooks()

    def _put_hooks(self) -> None:
        """Put hooks on the LLM if a compressor acts inside it; they go with `detach` or with the façade itself."""
        inside = inside_the_llm(self.compressor) and not self._detached
        self._hooks = Hooks(self._family.llm, list(self._family.decoder_layers)) if inside else Hooks(None)
        weakref.finalize(self, self._hooks.remove).atexit = False

    def _refuse_detached(self) -> None:
        if self._detached:
            raise UserError("this model was detached; call vlmzip.attach(model, compressor) again")

    # --- calls ------------------------------------------------------------------------------------------------

    @property
    def report(self) -> Report:
        """What the last `forward` or `generate` did: in this thread, or in any if there was none here.

        Calls that continue a KV cache without new images leave it as it is.

        Raises `UserError` before the first.
        """
        return last_report(self)

    @names_image_inputs
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
        **kwargs: object,
    ) -> Any:
        """Run the model's own `forward` on the compressed inputs; logits cover the compressed sequence.

        With `pack_rows`, for training, short rows stand side by side where they can: the same loss from less padding.

        The named arguments are those that processors return and trainers look for; every other goes through as it is.
        A KV cache filled here can be continued by `forward` (new tokens only) and by `generate`. It goes by
        `past_key_values` or `cache`, whichever of the two this transformers uses.
        """
        named = dict(
            input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, labels=labels,
            position_ids=position_ids, past_key_values=past_key_values, cache=cache, inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids, mm_token_type_ids=mm_token_type_ids,
        )  # fmt: skip
        arguments = {**{name: value for name, value in named.items() if value is not None}, **kwargs}
        arguments = with_cache_named(arguments, cache_name(self._family.model))
        call = self._compress(arguments, generating=False, pack_rows=pack_rows)
        out = self.inner(**call.inputs) if call.in_llm is None else self._forward_inside(call, call.in_llm)
        filled = cache_of(arguments)
        filled = returned_cache(out) if filled is None else filled  # not `or`: an empty cache is false
        if filled is not None:
            self._remember(filled, call)
        return out

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config: object = None, **kwargs: object) -> Any:
        """Run the model's own `generate`; return the original prompt followed by the new tokens.

        With a cache that this model has filled, the prompt is the whole conversation or its new part alone. Logits
        processors and stopping criteria of your own see the compressed prompt.
        """
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        generation = Generation(self.inner, self._family, kwargs)
        call = self._compress(generation.arguments, generating=True)
        generation.refuse(call)
        if generation.arguments.get("input_ids") is None:  # embeddings come back without a prompt
            return self.inner.generate(**call.inputs)
        generated = generation.run(call)
        self._report_inside(call.report, generated.in_llm)
        if generated.cache is not None:
            self._remember(generated.cache, call, generated)
        generated.warn_beyond_positions(call)
        return generated.output

    @torch.compiler.disable  # reads counts off the device and walks Python lists; what follows it is compiled
    def _compress(self, arguments: Inputs, *, generating: bool, pack_rows: bool = False) -> CompressedCall:
        self._refuse_detached()
        call = compress_call(
            self.inner, self._family, self.compressor, self.resampler, self._conversations, arguments,
            generating=generating, pack_rows=pack_rows,
        )  # fmt: skip
        # A loop over new tokens keeps the report of its images.
        if call.report.images or call.later_turn is None:
            publish(self, call.report)
        return call

    @torch.compiler.disable(recursive=False)  # what is around the LLM; its layers are compiled each for itself
    def _forward_inside(self, call: CompressedCall, in_llm: InLLMState) -> object:
        """Run `forward` with compressors inside the LLM; the loss is taken on the tokens of the last layer."""
        labels = call.inputs.pop("labels", None) if call.inputs.spans else None
        with running(in_llm):
            out = self.inner(**call.inputs)
        self._report_inside(call.report, [in_llm])
        return out if labels is None else loss_behind(in_llm, out, labels, call.inputs)

    def _report_inside(self, report: Report, states: Sequence[InLLMState]) -> None:
        """Publish the report again with what happened inside the LLM, if images came in."""
        steps = [state.first for state in states if state.first is not None]
        if steps:
            publish(self, extend(report, steps))

    @torch.compiler.disable  # as `_compress`
    def _remember(self, cache: object, call: CompressedCall, generated: Generated | None = None) -> None:
        """Remember what the call has put into `cache`, if that is known."""
        if call.can_be_continued:
            state = call.cache_state()
            if generated is not None:
                state = state.and_generated(generated.new_tokens, generated.filler)
            self._conversations.remember(cache, state)

    # --- saving -----------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the inner model under its own names, so that transformers alone loads it, and `compressor.json`.

        The weights of a method that has some go into `resampler.safetensors`.
        """
        if kwargs.get("push_to_hub"):
            self.push_to_hub()
        state = kwargs.get("state_dict")
        if state is not None:  # trainers pass the façade's own
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
        """Refuse: transformers would upload the model without its compressor."""
        raise UserError("save_pretrained(folder) first, then upload the folder: huggingface_hub.upload_folder")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the inner model's state under `inner.`; tied weights are copies: safetensors saves no shared ones."""
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
        """The inner model's; setting it here sets it there."""
        return self.inner.generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        self.inner.generation_config = config

    def _switch_checkpointing(self, name: str, *args: object, **kwargs: object) -> None:
        """Switch it in the model and in what a resampler has of transformers, which alone knows these switches."""
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
    """Return the part of a state dict whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


pipelines.expect(CompressedModel.__name__)
