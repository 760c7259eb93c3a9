"""`generate` with the usual limits, padding, copies and streams, although the inner model gets a shorter prompt.

transformers' `generate` returns the prompt followed by the answer, and its length limits count the prompt. `Generation`
does the same with the user's prompt, and refuses settings with which transformers would silently answer wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import transformers
from jaxtyping import Bool, Int
from packaging.version import Version
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmzip.errors import UserError
from vlmzip.models.encoder_run import further_fields
from vlmzip.models.family import Family
from vlmzip.processor import InputDict, Inputs
from vlmzip.runtime.cache_names import cache_name, cache_of, with_cache_named
from vlmzip.runtime.call import CompressedCall
from vlmzip.runtime.in_llm.hooks import running
from vlmzip.runtime.in_llm.state import InLLMState
from vlmzip.runtime.prompt import PER_TOKEN, pad_id

#: True if chunked prefill gives each chunk its own part of the images' features.
CAN_CUT_FEATURES = hasattr(transformers.generation.utils, "_slice_mm_encoder_output")

#: True if `generate` gives the copies of a row, for beams or several sequences, the images of this row in order.
COPIES_WHOLE_ROWS = Version(transformers.__version__) >= Version("5.19")

#: Inputs with one row for each prompt.
ONE_A_ROW = {"input_ids", *PER_TOKEN}


@dataclass
class Generated:
    """The result of a call of `generate`."""

    output: object
    """The value that the user gets."""
    new_tokens: Int[Tensor, "rows new"]
    filler: Bool[Tensor, "rows new"]
    """True for padding in `new_tokens` after the end of short answers."""
    in_llm: list[InLLMState]
    """The states of compression inside the LLM: the call's, or one for each row if rows ran one by one."""
    cache: object = None
    """The filled cache that can be continued: the user's or the returned one; `None` if there is no such cache."""

    def warn_beyond_positions(self, call: CompressedCall) -> None:
        """Warn if answers go beyond the LLM's positions. The LLM does not see the last token of an answer."""
        written = (~self.filler).sum(1).tolist()
        copies = len(written) // len(call.report.positions)
        taken = [call.report.positions[row // copies] + count - 1 for row, count in enumerate(written)]
        call.warn_beyond_positions(taken, answered=True)


class Generation:
    """One call of `generate`: the work before and after the inner model's own `generate`."""

    def __init__(self, model: Any, family: Family, arguments: Inputs) -> None:
        """Read the arguments; raise `UserError` for those that do not work with any compressor."""
        self.model, self.family = model, family
        self.arguments = with_cache_named(arguments, cache_name(family.model))
        self.cache = cache_of(arguments)
        self.repeats = self.setting("num_beams", 1) > 1 or self.setting("num_return_sequences", 1) > 1
        """True if a prompt gets several rows, for beams or for several sequences."""
        if self.repeats and self.cache is not None:
            raise UserError(
                "beams and several sequences per prompt do not work with a KV cache; leave one of the two out"
            )
        if self.cache is not None and self.setting("use_cache", True) is False:
            raise UserError("use_cache=False with a KV cache gives wrong answers: leave one of the two out")
        if self.arguments.get("assistant_model") is not None or self.setting("assistant_early_exit"):
            raise UserError("assisted decoding is not supported: the assistant would need the compressed prompt too")
        self._infer_mask()

    # --- settings ---------------------------------------------------------------------------------------------

    def setting(self, name: str, default: object = None) -> Any:
        """Return a setting from the arguments, else from the given generation config, else from the model's."""
        configs = (self.arguments.get("generation_config"), getattr(self.model, "generation_config", None))
        values = (self.arguments.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), default)

    @property
    def _ends(self) -> list[int]:
        """Return the tokens that end an answer."""
        ends = self.setting("eos_token_id")
        return [] if ends is None else torch.as_tensor(ends).flatten().tolist()

    @property
    def _pad(self) -> int:
        """Return the token that `generate` writes after the end of a row.

        Without a pad token it is the first end token, as in transformers.
        """
        pad = self.setting("pad_token_id")
        return pad if pad is not None else (*self._ends, pad_id(self.family))[0]

    def _infer_mask(self) -> None:
        """Treat pad tokens as padding if there is no `attention_mask`, as transformers does."""
        ids, pad = self.arguments.get("input_ids"), self.setting("pad_token_id")
        mask_is_known = self.arguments.get("attention_mask") is not None or self.cache is not None
        if ids is None or mask_is_known or pad is None or pad in self._ends:
            return
        if bool((ids == pad).any()):
            self.arguments["attention_mask"] = (ids != pad).long()

    def _filler(self, tokens: Int[Tensor, "rows new"]) -> Bool[Tensor, "rows new"]:
        """Mark the padding that `generate` wrote after the end of short answers."""
        pad = self._pad
        after = (tokens == pad).flip(1).cumprod(1).sum(1)
        # Not all trailing pads are padding. If the pad token ends answers, the first of them in a row was generated.
        # Otherwise the longest answer has no padding, so all its trailing pads were generated.
        after = after - (after.clamp(max=1) if pad in self._ends else after.min())
        return torch.arange(tokens.shape[1], 0, -1, device=tokens.device) <= after[:, None]

    # --- refusals ---------------------------------------------------------------------------------------------

    def refuse(self, call: CompressedCall) -> None:
        """Raise `UserError` for settings with which transformers would silently answer wrongly or that do not work."""
        version = transformers.__version__
        # Older versions of transformers prefill in chunks without splitting the images' features to match.
        if self.setting("prefill_chunk_size") and "mm_encoder_outputs" in call.inputs and not CAN_CUT_FEATURES:
            raise UserError(f"prefill_chunk_size with images gives wrong answers in transformers {version}; update it")
        rows = [image.row for image in call.report.images]
        if self.repeats and len(rows) != len(set(rows)) and not COPIES_WHOLE_ROWS:
            raise UserError(
                "beams and several sequences of prompts with several images give wrong answers in transformers"
                f" {version}; update it"
            )
        if call.in_llm is not None:
            self._refuse_inside_the_llm()

    def _refuse_inside_the_llm(self) -> None:
        """Raise `UserError` for settings that do not work if layers of the cache hold different tokens."""
        for name in ("prefill_chunk_size", "prompt_lookup_num_tokens"):
            if self.setting(name):
                raise UserError(f"{name} does not work with a compressor inside the LLM; leave it out")
        if self.setting("guidance_scale", 1) != 1 and self.setting("use_cache", True) is False:
            # Without a cache, calls for the answer cannot be distinguished from calls for the negative prompt.
            raise UserError("guidance_scale with a compressor inside the LLM needs use_cache=True")

    # --- running ----------------------------------------------------------------------------------------------

    def run(self, call: CompressedCall) -> Generated:
        """Run the inner model on the compressed prompt; return its answer after the user's prompt."""
        prompt, inputs = self.arguments["input_ids"], call.inputs
        short = inputs["input_ids"].shape[1]
        self._keep_length_limits(inputs, prompt.shape[1], short)
        if inputs.get("streamer") is not None:
            inputs["streamer"] = PromptStreamer(inputs["streamer"], prompt)
        outputs = inputs.get("mm_encoder_outputs") or {}
        as_tensor = [each for each in self.family.modalities if not each.features_as_list and each.modality in outputs]
        if self.repeats and as_tensor and not COPIES_WHOLE_ROWS:
            return self._run_row_by_row(call)
        if self.repeats and outputs:
            inputs["mm_encoder_outputs"] = outputs | self._joined_by_row(call)
        with running(call.in_llm):
            output = self.model.generate(**inputs)
        sequences = output if isinstance(output, Tensor) else output.sequences
        new_tokens = sequences[:, short:]
        copies = len(new_tokens) // len(prompt)
        whole = torch.cat([prompt.to(new_tokens.device).repeat_interleave(copies, dim=0), new_tokens], dim=1)
        cache = self.cache
        if isinstance(output, Tensor):
            output = whole
        else:
            output.sequences = whole
            cache = cache_of(output) if cache is None and not self.repeats else cache
        states = [] if call.in_llm is None else [call.in_llm]
        return Generated(output, new_tokens, self._filler(new_tokens), states, cache)

    def _keep_length_limits(self, inputs: InputDict, prompt: int, short: int) -> None:
        """Make `max_length` and `min_length` count the `prompt` tokens of the user, not the `short` compressed ones."""
        for limit, new_tokens in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            value = self.setting(limit)
            if value is not None and self.setting(new_tokens) is None:
                if limit == "max_length" and value <= prompt:
                    raise UserError(
                        f"max_length={value} leaves no room for an answer: the prompt alone has {prompt} tokens,"
                        " images counted uncompressed; raise it, or give max_new_tokens"
                    )
                inputs[limit] = max(value - prompt + short, 0)

    def _joined_by_row(self, call: CompressedCall) -> dict[str, BaseModelOutputWithPooling]:
        """Return features that are a list with one entry for each row, in place of one for each image.

        Some models, such as GLM-4V, copy each entry by itself, which would mix the images of a row.
        """
        joined: dict[str, BaseModelOutputWithPooling] = {}
        for each in self.family.modalities:
            rows = [image.row for image in call.report.images if image.modality == each.modality]
            if rows and each.features_as_list:
                outputs = call.inputs["mm_encoder_outputs"][each.modality]
                streams = [_by_row(layer, rows) for layer in getattr(outputs, "deepstack_features", None) or ()]
                features, further = _by_row(outputs.pooler_output, rows), further_fields(outputs)
                joined |= each.encoder_outputs(features, list(zip(*streams, strict=True)), further)
        return joined

    def _run_row_by_row(self, call: CompressedCall) -> Generated:
        """Run each row alone, for versions of transformers that copy the features of several rows wrongly.

        These versions copy each entry of the features by itself. This needs one entry for each image. Here all images
        are one tensor, which may only have a single entry with the tokens of a single row: [1, tokens, llm_dim].
        """
        refused = ("return_dict_in_generate", "streamer", "prefix_allowed_tokens_fn")
        if any(self.setting(name) for name in refused):
            raise UserError(
                f"beams and several sequences per prompt do not work with {' or '.join(refused)} in this family in"
                f" transformers {transformers.__version__}; update it"
            )
        prompt, inputs = self.arguments["input_ids"], call.inputs
        rows, states = [], []
        for row in range(len(prompt)):
            row_inputs = {name: value[row : row + 1] if name in ONE_A_ROW else value for name, value in inputs.items()}
            row_inputs.pop("mm_encoder_outputs", None)
            if outputs := self._outputs_of_row(call, row):
                row_inputs["mm_encoder_outputs"] = outputs
            state = None if call.in_llm is None else call.in_llm.row(row)
            with running(state):
                answers = self.model.generate(**row_inputs)[:, inputs["input_ids"].shape[1] :]
            states += [] if state is None else [state]
            rows += list(torch.cat([prompt[row].to(answers.device).expand(len(answers), -1), answers], dim=1))
        whole = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._pad)
        new_tokens = whole[:, prompt.shape[1] :]
        return Generated(whole, new_tokens, self._filler(new_tokens), states)

    def _outputs_of_row(self, call: CompressedCall, row: int) -> dict[str, object]:
        """Return the `mm_encoder_outputs` of one row of the prompt; empty for a row without images and videos."""
        of_row: dict[str, object] = {}
        for each in self.family.modalities:
            images = [image for image in call.report.images if image.modality == each.modality]
            if images:
                all_rows = call.inputs["mm_encoder_outputs"][each.modality]
                features = all_rows.pooler_output
                if isinstance(features, Tensor):
                    features = features[:, 0].split([image.after for image in images])
                mine = [part for image, part in zip(images, features, strict=True) if image.row == row]
                if mine:
                    (outputs,) = each.encoder_outputs(mine, further=further_fields(all_rows)).values()
                    if isinstance(outputs.pooler_output, Tensor):
                        outputs.pooler_output = outputs.pooler_output.transpose(0, 1)  # a single entry
                    of_row[each.modality] = outputs
        return of_row


def _by_row(entries: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    """Join the entries of images in the same row; `rows` has the row of each image, in ascending order."""
    return [
        torch.cat([entry for row, entry in zip(rows, entries, strict=True) if row == each])
        for each in dict.fromkeys(rows)
    ]


@runtime_checkable
class Streamer(Protocol):
    """A receiver of the tokens of an answer while `generate` writes them."""

    def put(self, value: Tensor) -> object:
        """Receive the next tokens."""

    def end(self) -> object:
        """Finish after the last token of the answer."""


class PromptStreamer:
    """A streamer that passes the user's prompt and then the new tokens to another streamer."""

    def __init__(self, streamer: Streamer, prompt: Int[Tensor, "rows length"]) -> None:
        self._streamer = streamer
        self._prompt: Tensor | None = prompt

    def put(self, value: Tensor) -> None:
        # `generate` first streams its shortened prompt, repeated for several sequences. Replace it with the user's.
        if self._prompt is not None:
            value = self._prompt.cpu().repeat_interleave(len(value) // len(self._prompt), dim=0)
        self._streamer.put(value)
        self._prompt = None

    def end(self) -> None:
        self._streamer.end()
