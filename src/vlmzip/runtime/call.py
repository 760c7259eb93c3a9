"""One call of an attached model: its prompt compressed, and all that the end of the call needs to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.models.family import Family
from vlmzip.processor import Inputs
from vlmzip.runtime.cache import cache_of
from vlmzip.runtime.compressed_inputs import CompressedInputs
from vlmzip.runtime.conversation import CacheState, Conversations, first_turn, next_turn
from vlmzip.runtime.in_llm.prompt import prompt_of
from vlmzip.runtime.in_llm.state import InLLMState
from vlmzip.runtime.inputs import compress_inputs, positions_of
from vlmzip.runtime.place import inside_the_llm
from vlmzip.runtime.position_limit import positions_taken, warn_beyond
from vlmzip.runtime.report import Report


@dataclass
class CompressedCall:
    """One call of a model with a compressor, ready to run."""

    family: Family
    compressor: Compressor
    arguments: Inputs
    """What the user gave."""
    inputs: CompressedInputs
    """What the inner model gets."""
    generating: bool
    """Whether `generate` gets it, not `forward`."""
    later_turn: CacheState | None
    """Where the call continues a filled cache: what the cache holds after the prompt."""
    in_llm: InLLMState | None
    """What acts inside the LLM; `None` if nothing does."""

    @property
    def report(self) -> Report:
        """What was done to the images."""
        return self.inputs.report

    @property
    def can_be_continued(self) -> bool:
        """Whether it is known what a cache holds after the call: not with the user's own embeddings or positions."""
        own_positions = not self.generating and self.arguments.get("position_ids") is not None
        return self.later_turn is not None or (self.arguments.get("input_ids") is not None and not own_positions)

    def cache_state(self) -> CacheState:
        """Return what a cache holds after the prompt has gone through the model.

        Counting positions takes time, and training keeps no cache: to be called only where one came back.
        """
        state = self.later_turn or first_turn(
            self.family, self.arguments, self.inputs, self.compressor, generating=self.generating
        )
        return state if self.in_llm is None else replace(state, keys=self.in_llm.keys)

    def warn_beyond_positions(self, taken: Sequence[int], *, answered: bool = False) -> None:
        """Warn where the rows of the prompt, or their answers, take more positions than the LLM has."""
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
) -> CompressedCall:
    """Return the call with its prompt compressed: a first one, or one that continues a cache in `conversations`."""
    before = conversations.recall(cache_of(arguments))
    _refuse(arguments, before)
    later_turn = None
    if before is None:
        inputs = compress_inputs(
            model, arguments, compressor, generating=generating, family=family, resampler=resampler,
            pack_rows=pack_rows,
        )  # fmt: skip
    else:
        inputs, later_turn = next_turn(
            model, family, arguments, compressor, before, generating=generating, resampler=resampler
        )
    inputs.report = replace(inputs.report, positions=positions_taken(family, inputs, generating=generating))
    in_llm = None
    if compressors := inside_the_llm(compressor):
        keys = None if before is None else before.keys
        in_llm = InLLMState(family, compressors, prompt_of(inputs.spans, inputs), inputs.report.stopwatch, keys)
    call = CompressedCall(family, compressor, arguments, inputs, generating, later_turn, in_llm)
    call.warn_beyond_positions(call.report.positions)
    return call


def _refuse(arguments: Inputs, before: CacheState | None) -> None:
    """Raise `UserError` for arguments that mean something else for a compressed prompt or a filled cache."""
    if before is not None and arguments.get("input_ids") is None:
        raise UserError("a filled KV cache is continued by input_ids: embeddings do not tell what was said")
    if isinstance(arguments.get("logits_to_keep"), Tensor):
        raise UserError("logits_to_keep as a tensor names tokens of the uncompressed prompt: give a number")
    if before is not None and arguments.get("position_ids") is not None:
        raise UserError("position_ids cannot be given with a filled cache: this model counts positions itself")
