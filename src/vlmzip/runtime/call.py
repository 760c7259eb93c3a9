"""One call of an attached model: the compressed prompt, and the data that is needed after the call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.models.family import Family
from vlmzip.processor import Inputs
from vlmzip.runtime.cache_names import cache_of
from vlmzip.runtime.compressed_inputs import CompressedInputs
from vlmzip.runtime.conversation import CacheState, Conversations, first_turn, next_turn
from vlmzip.runtime.earlier_images import ARGUMENT as EARLIER
from vlmzip.runtime.fitting import inside_the_llm
from vlmzip.runtime.in_llm.prompt import prompt_of
from vlmzip.runtime.in_llm.state import InLLMState
from vlmzip.runtime.inputs import compress_inputs, positions_of
from vlmzip.runtime.position_limit import positions_taken, warn_beyond
from vlmzip.runtime.report import Report


@dataclass
class CompressedCall:
    """One call of a model with a compressor, ready to run."""

    family: Family
    compressor: Compressor
    arguments: Inputs
    """The arguments from the user."""
    inputs: CompressedInputs
    """The inputs for the inner model."""
    generating: bool
    """True for `generate`, False for `forward`."""
    later_turn: CacheState | None
    """The state of the cache after the prompt, if the call continues a filled cache; `None` otherwise."""
    in_llm: InLLMState | None
    """The state of the compressors inside the LLM; `None` if no compressor acts there."""

    @property
    def report(self) -> Report:
        """Return the report of what was done to the images."""
        return self.inputs.report

    @property
    def can_be_continued(self) -> bool:
        """Return whether the state of a cache after the call is known.

        It is unknown if the call has no `input_ids`, or if `forward` starts a conversation with given `position_ids`.
        """
        has_positions = not self.generating and self.arguments.get("position_ids") is not None
        return self.later_turn is not None or (self.arguments.get("input_ids") is not None and not has_positions)

    def cache_state(self) -> CacheState:
        """Return the state of a cache after the model has processed the prompt.

        Call this only if the model returned a cache: counting positions takes time, and training keeps no cache.
        """
        state = self.later_turn or first_turn(
            self.family, self.arguments, self.inputs, self.compressor, generating=self.generating
        )
        return state if self.in_llm is None else replace(state, keys=self.in_llm.keys, sizes=self.in_llm.sizes)

    def warn_beyond_positions(self, taken: Sequence[int], *, answered: bool = False) -> None:
        """Warn if a row takes more positions than the LLM has; with `answered`, `taken` includes the answers."""
        original = positions_of(self.compressor, self.family) == "original"
        warn_beyond(self.family, self.compressor, taken, original=original, answered=answered)


def compress_call(
    model: nn.Module,
    family: Family,
    compressor: Compressor,
    resampler: nn.Module | None,
    conversations: Conversations,
    arguments: Inputs,
    *,
    generating: bool,
    pack_rows: bool = False,
    longest: int | None = None,
) -> CompressedCall:
    """Compress the prompt and return the call, which starts a conversation or continues a cache in `conversations`."""
    before = conversations.recall(cache_of(arguments))
    _refuse(arguments, before)
    later_turn = None
    if before is None:
        inputs = compress_inputs(
            model, arguments, compressor, generating=generating, family=family, resampler=resampler,
            pack_rows=pack_rows, longest=longest,
        )  # fmt: skip
    else:
        inputs, later_turn = next_turn(
            model, family, arguments, compressor, before, generating=generating, resampler=resampler
        )
    inputs.report = replace(inputs.report, positions=positions_taken(family, inputs, generating=generating))
    in_llm = None
    if compressors := inside_the_llm(compressor):
        keys, sizes = (None, None) if before is None else (before.keys, before.sizes)
        prompt, watch = prompt_of(inputs.spans, inputs), inputs.report.stopwatch
        in_llm = InLLMState(family, compressors, prompt, watch, keys, sizes)
    call = CompressedCall(family, compressor, arguments, inputs, generating, later_turn, in_llm)
    call.warn_beyond_positions(call.report.positions)
    return call


def _refuse(arguments: Inputs, before: CacheState | None) -> None:
    """Raise `UserError` for arguments that do not work with a compressed prompt or a filled cache."""
    if before is not None and arguments.get("input_ids") is None:
        raise UserError("give input_ids to continue a filled KV cache; embeddings do not show the conversation so far")
    if before is not None and arguments.get(EARLIER) is not None:
        raise UserError(f"a filled KV cache does not take {EARLIER}: give the whole conversation without the cache")
    if isinstance(arguments.get("logits_to_keep"), Tensor):
        raise UserError("logits_to_keep must be a number, got a tensor, which indexes the uncompressed prompt")
    if before is not None and arguments.get("position_ids") is not None:
        raise UserError("leave out position_ids with a filled KV cache; vlmzip counts the positions of later turns")
