"""The questions that every family of models answers, so that methods and runtime never name one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmzip.compressor import Profile
from vlmzip.visual_tokens import Signal, Site, VisualTokens


class ModelAdapter(ABC):
    """What vlmzip has to know about a family of vision-language models; it changes nothing on the model."""

    model_types: ClassVar[tuple[str, ...]]
    """The `config.model_type`s that it serves."""
    example: ClassVar[str]
    """A checkpoint of the family, for the list of families."""
    sites: ClassVar[tuple[Site, ...]]
    """Where compressors can act in this family."""
    picture_inputs: ClassVar[tuple[str, ...]]
    """The model inputs that describe pictures; the first is there whenever there is a picture."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model  # a family's own attributes are known to its adapter, not to a type checker

    @property
    @abstractmethod
    def placeholder_id(self) -> int:
        """The token id that stands for one visual token in `input_ids`."""

    @property
    @abstractmethod
    def llm(self) -> nn.Module:
        """The decoder, without vision encoder, projector and head."""

    @property
    def llm_config(self) -> Any:
        """The config of the decoder."""
        return self.model.config.get_text_config()

    @abstractmethod
    def profile(self) -> Profile:
        """The grid of one picture at the model's own resolution, and the depth of its LLM."""

    @abstractmethod
    def encode(
        self, inputs: Mapping[str, Any], site: Site, needs: frozenset[Signal]
    ) -> Sequence[tuple[VisualTokens, list[int]]]:
        """The visual tokens of all pictures in `inputs`, as they are at `site`, with what `needs` asks for.

        Pictures of equal grid come together: each group with the indices of its pictures, in order of appearance.
        """

    @abstractmethod
    def project(self, features: Float[Tensor, "tokens dim"], site: Site) -> Float[Tensor, "tokens llm_dim"]:
        """What the LLM gets for tokens that left `site`."""

    def encoder_outputs(self, features: list[Float[Tensor, "_ llm_dim"]]) -> dict[str, BaseModelOutputWithPooling]:
        """`mm_encoder_outputs` for the model's `forward` and `generate`: projected tokens, one entry a picture."""
        return {"image": BaseModelOutputWithPooling(pooler_output=cast(Any, features))}
