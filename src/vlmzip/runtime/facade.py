"""What `attach` returns: the model with a compressor before its LLM, used like the model itself."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, Self
from weakref import WeakKeyDictionary

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import Cache

from vlmzip import spec
from vlmzip.compressor import Compressor
from vlmzip.compressor_file import write_compressor
from vlmzip.errors import UserError, closest
from vlmzip.methods import NoCompression
from vlmzip.models import adapter_for
from vlmzip.models.adapter import ModelAdapter
from vlmzip.runtime import pipelines
from vlmzip.runtime.cache import cache_name, cache_of, with_cache_named
from vlmzip.runtime.compressed_inputs import CompressedInputs
from vlmzip.runtime.decoder_hooks import Hooks, running
from vlmzip.runtime.in_llm import InLLMState, check_place, extend, prompt_of
from vlmzip.runtime.inputs import compress_inputs, positions_of
from vlmzip.runtime.positions import positions_taken, warn_beyond
from vlmzip.runtime.prompt import PER_TOKEN, gather, pad_id
from vlmzip.runtime.report import Report
from vlmzip.runtime.resample import build_resampler, read_weights, resampling, write_weights
from vlmzip.runtime.turns import CacheState, Conversations, first_turn, next_turn
from vlmzip.runtime.versions import warn_if_untested
from vlmzip.visual_tokens import Site

#: Whether chunked prefill gives each chunk its own part of the images' features.
CAN_CUT_FEATURES = hasattr(transformers.generation.utils, "_slice_mm_encoder_output")

#: The switches of gradient checkpointing: "activation" is what transformers 5.23 calls it.
CHECKPOINTING = {f"{kind}_checkpointing_{to}" for kind in ("gradient", "activation") for to in ("enable", "disable")}

#: Inputs with one row for each prompt.
ONE_A_ROW = {"input_ids", *PER_TOKEN}

_per_thread = threading.local()
_latest: WeakKeyDictionary[CompressedModel, Report] = WeakKeyDictionary()


def attach(
    model: nn.Module, compressor: Compressor | str, *, weights: str | os.PathLike[str] | None = None
) -> CompressedModel:
    """Return the same model, answering with fewer visual tokens.

    Used in a `with` statement, the result is detached at the end of the block, also after an error.

    `model` answers as before: it can be used beside the result, and in several of them with different compressors. A
    compressor inside the LLM puts hooks on its layers, which act in calls of the result alone; `detach` takes them off.

    `compressor` may be written as on the command line: `"visionzip(keep=64)"`, `"dfmr(tau=0.3)+fastv(layer=3)"`, or the
    path of a saved `compressor.json` or of its folder. `weights` is a folder that `save_pretrained` wrote, from which a
    method with weights takes them; left out, it is the folder of a saved compressor, else the weights are untrained.

    Raise `UserError` for a model that vlmzip cannot compress, a compressor that has no place in it, or weights that are
    missing or do not fit.
    """
    if isinstance(compressor, str):
        if weights is None and spec.is_saved(compressor):
            weights = spec.saved_folder(compressor)
        compressor = spec.read(compressor)
    compressed = CompressedModel(model, compressor)
    warn_if_untested()
    if compressed.resampler is not None:
        if weights is None:
            _warn_if_untrained(compressed)
        else:
            read_weights(compressed.resampler, weights)
    return compressed


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
        adapter = adapter_for(model)
        _check(compressor, adapter)
        self.inner: Any = model
        self.compressor = compressor
        #: The weights of a method that has some, else `None`.
        self.resampler: nn.Module | None = build_resampler(adapter, compressor)
        self._turns = Conversations()
        self._detached = False
        self._put_hooks()
        self.training = model.training  # not train(): parts of the model may be in another mode
        if self.resampler is not None:
            self.resampler.train(model.training)
        _warn_if_nothing_to_do(compressor, adapter)

    @property
    def report(self) -> Report:
        """What the last `forward` or `generate` did: in this thread, or in any if there was none here.

        Calls that continue a KV cache without new images leave it as it is.

        Raises `UserError` before the first.
        """
        report = _reports().get(self) or _latest.get(self)
        if report is None:
            raise UserError("there is no report yet: call the model first")
        return report

    def switch(self, compressor: Compressor) -> None:
        """Goes on with another compressor; parameters, and whatever is wrapped around this façade, stay as they are.

        For training in stages. What a KV cache has seen, it has seen: begin new ones. Raises `UserError` for a
        compressor that has no place in the model, or that brings or needs other weights of its own.
        """
        adapter = adapter_for(self.inner)
        _check(compressor, adapter)
        if resampling(compressor) != resampling(self.compressor):
            raise UserError("a method with weights of its own cannot be switched on or off: attach it anew")
        moved = bool(_inside_the_llm(compressor)) != bool(_inside_the_llm(self.compressor))
        self.compressor = compressor
        self._turns = Conversations()
        if moved:
            self._hooks.remove()
            self._put_hooks()

    def __enter__(self) -> Self:
        self._refuse_detached()
        return self

    def __exit__(self, *_error: object) -> None:
        self.detach()

    def _refuse_detached(self) -> None:
        if self._detached:
            raise UserError("this model was detached; call vlmzip.attach(model, compressor) again")

    def detach(self) -> nn.Module:
        """End the façade and return the plain model. Detaching twice is harmless."""
        self._detached = True
        self._hooks.remove()
        return self.inner

    @property
    def generation_config(self) -> Any:
        """The inner model's; setting it here sets it there."""
        return self.inner.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.inner.generation_config = config

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pack_rows: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The model's own `forward` on the compressed inputs; logits cover the compressed sequence.

        With `pack_rows`, for training, short rows stand side by side where they can: the same loss from less padding.

        The named arguments are those that processors return and trainers look for; every other goes through as it is.
        A KV cache filled here can be continued by `forward` (new tokens only) and by `generate`. It goes by
        `past_key_values` or `cache`, whichever of the two this transformers uses.
        """
        named = dict(
            input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, labels=labels,
            position_ids=position_ids, past_key_values=past_key_values, cache=cache, inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids, mm_token_type_ids=mm_token_type_ids, image_grid_thw=image_grid_thw,
        )  # fmt: skip
        inputs = {**{name: value for name, value in named.items() if value is not None}, **kwargs}
        inputs = with_cache_named(inputs, cache_name(adapter_for(self.inner).model))
        compressed, seen, inside = self._compress(inputs, generating=False, pack_rows=pack_rows)
        out = self.inner(**compressed) if inside is None else self._forward_inside(compressed, inside)
        filled = cache_of(inputs)
        filled = _cache_in(out) if filled is None else filled  # not `or`: an empty cache is false
        if seen is not None and filled is not None:
            self._remember(filled, seen, inside)
        return out

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """The model's own `generate`; returns the original prompt followed by the new tokens.

        With a cache that this model has filled, the prompt is the whole conversation or its new part alone. Logits
        processors and stopping criteria of your own see the compressed prompt.
        """
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        repeating = self._setting(kwargs, "num_beams", 1) > 1 or self._setting(kwargs, "num_return_sequences", 1) > 1
        kwargs = with_cache_named(kwargs, cache_name(adapter_for(self.inner).model))
        cache = cache_of(kwargs)
        if repeating and cache is not None:
            raise UserError("a cache can be neither filled nor continued with beams or several sequences a prompt")
        if cache is not None and self._setting(kwargs, "use_cache", True) is False:
            raise UserError("use_cache=False with a KV cache gives wrong answers: leave one of the two out")
        self._infer_mask(kwargs)
        if kwargs.get("assistant_model") is not None or self._setting(kwargs, "assistant_early_exit", None):
            raise UserError("assisted decoding is not supported: the assistant would need the compressed prompt too")
        compressed, seen, inside = self._compress(kwargs, generating=True)
        self._refuse_wrong_chunks(compressed)
        if repeating:
            self._refuse_wrong_copies(compressed)
        self._refuse_inside(compressed, inside)
        if seen is None:
            return self.inner.generate(**compressed)
        prompt: Tensor = kwargs["input_ids"]
        short = compressed["input_ids"].shape[1]
        self._keep_length_limits(compressed, prompt.shape[1], short)
        if compressed.get("streamer") is not None:
            compressed["streamer"] = _PromptStreamer(compressed["streamer"], prompt)
        if repeating and not adapter_for(self.inner).features_as_list:
            return self._row_by_row(prompt, compressed, inside)
        with running(inside):
            out = self.inner.generate(**compressed)
        self._report_inside(compressed.report, [inside])
        sequences = out if isinstance(out, Tensor) else out.sequences
        new_tokens = sequences[:, short:]
        copies = len(new_tokens) // len(prompt)
        if cache is None and not isinstance(out, Tensor):
            cache = cache_of(out)
        if cache is not None and not repeating:
            answered = partial(seen().and_generated, new_tokens, self._filler(new_tokens, kwargs))
            self._remember(cache, answered, inside)
        whole = torch.cat([prompt.to(new_tokens.device).repeat_interleave(copies, dim=0), new_tokens], dim=1)
        self._warn_of_long_answers(compressed.report, new_tokens, kwargs)
        if isinstance(out, Tensor):
            return whole
        out.sequences = whole
        return out

    def save_pretrained(self, folder: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes the inner model under its own names, so that transformers alone loads it, and `compressor.json`.

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

    def push_to_hub(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refused: transformers would upload the model without its compressor."""
        raise UserError("save_pretrained(folder) first, then upload the folder: huggingface_hub.upload_folder")

    @torch.compiler.disable  # reads counts off the device and walks Python lists; what follows it is compiled
    def _compress(
        self, inputs: dict[str, Any], *, generating: bool, pack_rows: bool = False
    ) -> tuple[CompressedInputs, Callable[[], CacheState] | None, InLLMState | None]:
        """The inputs for the inner model; what tells what its cache holds, `None` where there are no token ids; and
        what acts inside the LLM, `None` where nothing does."""
        self._refuse_detached()
        adapter = adapter_for(self.inner)
        before = self._turns.recall(cache_of(inputs))
        if before is not None and inputs.get("input_ids") is None:
            raise UserError("a filled KV cache is continued by input_ids: embeddings do not tell what was said")
        if isinstance(inputs.get("logits_to_keep"), Tensor):
            raise UserError("logits_to_keep as a tensor names tokens of the uncompressed prompt: give a number")
        if before is not None and inputs.get("position_ids") is not None:
            raise UserError("position_ids cannot be given with a filled cache: this model counts positions itself")
        seen: Callable[[], CacheState] | None = None
        if before is not None:
            compressed, after = next_turn(
                self.inner, adapter, inputs, self.compressor, before, generating=generating, resampler=self.resampler
            )
            seen = partial(replace, after)
        else:
            compressed = compress_inputs(
                self.inner, inputs, self.compressor, generating=generating, adapter=adapter, resampler=self.resampler,
                pack_rows=pack_rows,
            )  # fmt: skip
            # Positions that the user chose are not continued: a cache with them is not remembered.
            if inputs.get("input_ids") is not None and (generating or inputs.get("position_ids") is None):
                # Counting positions takes time, and training keeps no cache: done only when one comes back.
                seen = partial(first_turn, adapter, inputs, compressed, self.compressor, generating=generating)
        compressed.report = replace(
            compressed.report, positions=positions_taken(adapter, compressed, generating=generating)
        )
        self._warn_beyond_positions(compressed.report.positions)
        if compressed.report.images or before is None:  # a loop over new tokens keeps the report of its images
            _reports()[self] = _latest[self] = compressed.report
        inside = None
        if compressors := _inside_the_llm(self.compressor):
            keys = before.keys if before else None
            inside = InLLMState(
                adapter, compressors, prompt_of(compressed.spans, compressed), compressed.report.stopwatch, keys
            )
        return compressed, seen, inside

    @torch.compiler.disable(recursive=False)  # what is around the LLM; its layers are compiled each for itself
    def _forward_inside(self, compressed: CompressedInputs, inside: InLLMState) -> Any:
        """The model's `forward` with compressors inside its LLM; the loss is taken on the tokens of the last layer."""
        labels = compressed.pop("labels", None) if compressed.spans else None
        with running(inside):
            out = self.inner(**compressed)
        self._report_inside(compressed.report, [inside])
        if labels is None:
            return out
        assert inside.first is not None  # labels were taken out because there are images
        here = inside.first.here()
        short = labels if here is None else gather(labels, here, PER_TOKEN["labels"])
        given = {name: compressed[name] for name in ("num_items_in_batch",) if name in compressed}
        model = adapter_for(self.inner).model
        as_tuple = isinstance(out, tuple)
        logits = out[0] if as_tuple else out.logits
        loss = model.loss_function(logits=logits, labels=short, vocab_size=self._vocabulary, **given)
        return (
            (loss, *out) if as_tuple else type(out)(**{"loss": loss, **{k: v for k, v in out.items() if k != "loss"}})
        )

    @property
    def _vocabulary(self) -> int:
        return adapter_for(self.inner).llm_config.vocab_size

    def _report_inside(self, report: Report, calls: list[InLLMState | None]) -> None:
        steps = [call.first for call in calls if call is not None and call.first is not None]
        if steps:
            _reports()[self] = _latest[self] = extend(report, steps)

    def _put_hooks(self) -> None:
        """Hooks on the LLM, where a compressor acts inside it; they go with `detach` or with the façade itself."""
        adapter = adapter_for(self.inner)
        inside = _inside_the_llm(self.compressor) and not self._detached
        self._hooks = Hooks(adapter.llm, list(adapter.decoder_layers)) if inside else Hooks(None)
        weakref.finalize(self, self._hooks.remove).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_hooks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._put_hooks()

    def _refuse_inside(self, arguments: CompressedInputs, inside: InLLMState | None) -> None:
        """What `generate` would do with a cache whose layers differ, without an error."""
        if inside is None:
            return
        for name in ("prefill_chunk_size", "prompt_lookup_num_tokens"):
            if self._setting(arguments, name, None):
                raise UserError(f"{name} does not go with a compressor inside the LLM; leave it out")
        guided = self._setting(arguments, "guidance_scale", 1) != 1
        if guided and self._setting(arguments, "use_cache", True) is False:
            # Without a cache nothing tells the forwards of the answer from those of the negative prompt.
            raise UserError("guidance_scale with a compressor inside the LLM needs use_cache=True")

    @torch.compiler.disable  # as `_compress`
    def _remember(self, cache: Any, seen: Callable[[], CacheState], inside: InLLMState | None) -> None:
        self._turns.remember(cache, seen() if inside is None else replace(seen(), keys=inside.keys))

    def _refuse_wrong_chunks(self, arguments: CompressedInputs) -> None:
        """Older transformers prefill in chunks without cutting the images' features to match: wrong, and no error."""
        if (
            self._setting(arguments, "prefill_chunk_size", None)
            and "mm_encoder_outputs" in arguments
            and not CAN_CUT_FEATURES
        ):
            version = transformers.__version__
            raise UserError(f"prefill_chunk_size with images gives wrong answers in transformers {version}; update it")

    def _refuse_wrong_copies(self, compressed: CompressedInputs) -> None:
        """Before 5.19 transformers gives the copies of a row the images of its neighbours, and no error."""
        rows = [image.row for image in compressed.report.images]
        if len(rows) != len(set(rows)) and Version(transformers.__version__) < Version("5.19"):
            raise UserError(
                "beams and several sequences of prompts with several images give wrong answers in transformers"
                f" {transformers.__version__}; update it"
            )

    def _row_by_row(self, prompt: Tensor, compressed: CompressedInputs, inside: InLLMState | None) -> Tensor:
        """`generate` for each row alone, where `generate` itself would repeat images of different rows wrongly.

        It repeats rows for beams image by image; features that are one tensor have no images to tell apart.
        """
        refused = ("return_dict_in_generate", "streamer", "prefix_allowed_tokens_fn")
        if any(self._setting(compressed, name, None) for name in refused):
            raise UserError(
                f"beams and several sequences a prompt do not go with {' or '.join(refused)} in this family"
            )
        features = compressed["mm_encoder_outputs"]["image"].pooler_output[0] if compressed.report.images else None
        rows, at, calls = [], 0, []
        for row in range(len(prompt)):
            calls.append(None if inside is None else inside.row(row))
            one = {name: value[row : row + 1] if name in ONE_A_ROW else value for name, value in compressed.items()}
            if features is not None:
                count = sum(image.after for image in compressed.report.images if image.row == row)
                one["mm_encoder_outputs"] = adapter_for(self.inner).encoder_outputs([features[at : at + count]])
                at += count
                if count == 0:
                    del one["mm_encoder_outputs"]
            with running(calls[-1]):
                out = self.inner.generate(**one)[:, compressed["input_ids"].shape[1] :]
            rows += list(torch.cat([prompt[row].to(out.device).expand(len(out), -1), out], dim=1))
        self._report_inside(compressed.report, calls)
        whole = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._pad(compressed))
        self._warn_of_long_answers(compressed.report, whole[:, prompt.shape[1] :], compressed)
        return whole

    def _warn_beyond_positions(self, taken: Sequence[int], *, answered: bool = False) -> None:
        adapter = adapter_for(self.inner)
        original = positions_of(self.compressor, adapter) == "original"
        warn_beyond(adapter, self.compressor, taken, original=original, answered=answered)

    def _warn_of_long_answers(self, report: Report, new_tokens: Tensor, arguments: dict[str, Any]) -> None:
        """Warn where answers grow beyond the LLM's positions; the last token of each has not been through the LLM."""
        written = (~self._filler(new_tokens, arguments)).sum(1).tolist()
        copies = len(written) // len(report.positions)
        taken = [report.positions[row // copies] + count - 1 for row, count in enumerate(written)]
        self._warn_beyond_positions(taken, answered=True)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The inner model's state under `inner.`; tied weights are copies, since safetensors saves no shared ones."""
        state = super().state_dict(*args, **kwargs)
        seen: set[int] = set()
        for name, value in state.items():
            if isinstance(value, Tensor) and value.numel():
                if value.data_ptr() in seen:
                    state[name] = value.clone()
                seen.add(value.data_ptr())
        return state

    def _setting(self, arguments: dict[str, Any], name: str, default: Any) -> Any:
        """A setting of `generate`: as an argument, in the given generation config or in the model's own."""
        configs = (arguments.get("generation_config"), getattr(self.inner, "generation_config", None))
        values = (arguments.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), default)

    def _ends(self, arguments: dict[str, Any]) -> list[int]:
        """The tokens that end an answer."""
        ends = self._setting(arguments, "eos_token_id", None)
        return [] if ends is None else torch.as_tensor(ends).flatten().tolist()

    def _pad(self, arguments: dict[str, Any]) -> int:
        """What `generate` writes behind the end of a row: without a pad token the first end, as transformers does."""
        pad = self._setting(arguments, "pad_token_id", None)
        return pad if pad is not None else (*self._ends(arguments), pad_id(adapter_for(self.inner)))[0]

    def _infer_mask(self, arguments: dict[str, Any]) -> None:
        """Without `attention_mask`, `generate` takes pad tokens for padding; so do we, before counting tokens."""
        ids, pad = arguments.get("input_ids"), self._setting(arguments, "pad_token_id", None)
        eos = self._ends(arguments)
        told = arguments.get("attention_mask") is not None or cache_of(arguments) is not None
        if ids is not None and not told and pad is not None and pad not in eos and bool((ids == pad).any()):
            arguments["attention_mask"] = (ids != pad).long()

    def _filler(self, tokens: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Marks what `generate` wrote behind the end of rows that were done before the longest."""
        pad, eos = self._pad(arguments), self._ends(arguments)
        after = (tokens == pad).flip(1).cumprod(1).sum(1)
        # Whatever ended a row, nothing is behind the row that ended last; a pad that is the end itself was generated.
        after = after - (after.clamp(max=1) if pad in eos else after.min())
        return torch.arange(tokens.shape[1], 0, -1, device=tokens.device) <= after[:, None]

    def _keep_length_limits(self, arguments: dict[str, Any], prompt: int, short: int) -> None:
        """Lets `max_length` and `min_length` count the prompt as the user sees it: `prompt` tokens, not `short`."""
        for limit, new_tokens in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            value = self._setting(arguments, limit, None)
            if value is not None and self._setting(arguments, new_tokens, None) is None:
                if limit == "max_length" and value <= prompt:
                    raise UserError(
                        f"max_length={value} leaves no room for an answer: the prompt alone has {prompt} tokens,"
                        " images counted uncompressed; raise it, or give max_new_tokens"
                    )
                arguments[limit] = max(value - prompt + short, 0)

    def _switch_checkpointing(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Switches it in the model and in what a resampler has of transformers, which alone knows these switches."""
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
            found = getattr(self.inner, name)
            return partial(self._switch_checkpointing, name) if name in CHECKPOINTING else found


class _PromptStreamer:
    """Shows a streamer the prompt as the user gave it, then the new tokens."""

    def __init__(self, streamer: Any, prompt: Tensor) -> None:
        self._streamer, self._prompt = streamer, prompt

    def put(self, value: Tensor) -> None:
        # The first thing that `generate` streams is its own, shortened prompt, repeated for several sequences.
        if self._prompt is not None:
            value = self._prompt.cpu().repeat_interleave(len(value) // len(self._prompt), dim=0)
        self._streamer.put(value)
        self._prompt = None  # type: ignore[assignment]

    def end(self) -> None:
        self._streamer.end()


def _cache_in(out: Any) -> Any:
    """The KV cache that a model's `forward` returns, if it does."""
    if not isinstance(out, tuple):
        return cache_of(out)
    return next((value for value in out if isinstance(value, Cache)), None)


def _check(compressor: Compressor, adapter: ModelAdapter) -> None:
    """Raises `UserError` for what is no compressor, or has no place in the model."""
    if not isinstance(compressor, Compressor):
        raise UserError(f"{compressor!r} is no compressor; try vlmzip.VisionZip(keep=64)")
    for stage in compressor.stages():
        if stage.site not in adapter.sites:
            known = closest(stage.site, adapter.sites)
            raise UserError(f"{type(adapter.model).__name__} has no site {stage.site.value!r}{known}")
    cache_name(adapter.model)
    check_place(adapter, _inside_the_llm(compressor))


def _inside_the_llm(compressor: Compressor) -> list[Compressor]:
    return [stage for stage in compressor.stages() if stage.site is Site.IN_LLM]


def _reports() -> WeakKeyDictionary[CompressedModel, Report]:
    """The last report of each façade in this thread: threads that share a façade do not see each other's."""
    if not hasattr(_per_thread, "reports"):
        _per_thread.reports = WeakKeyDictionary()
    return _per_thread.reports


def _warn_if_untrained(compressed: CompressedModel) -> None:
    method = resampling(compressed.compressor)
    if method is not None and compressed.resampler is not None:
        count = sum(parameter.numel() for parameter in compressed.resampler.parameters())
        warnings.warn(
            f"{method.name()} is untrained: its {count:,} weights are random, and so are answers about images;"
            " train it first, or load a trained one with vlmzip.from_pretrained",
            stacklevel=3,
        )


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state dict whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _warn_if_nothing_to_do(compressor: Compressor, adapter: ModelAdapter) -> None:
    if isinstance(compressor, NoCompression) or resampling(compressor) is not None:
        return
    grid = adapter.profile().grid
    counts = compressor.tokens_by_layer(adapter.profile())
    if counts is not None and min(counts) >= grid.size:
        warnings.warn(
            f"{compressor.name()} keeps all of an image's {grid.size} visual tokens: it changes nothing", stacklevel=4
        )


pipelines.expect(CompressedModel.__name__)
