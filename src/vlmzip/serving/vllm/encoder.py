"""The vision encoder in vLLM's processor, for methods that count tokens by what an image shows.

vLLM places an image's tokens in the prompt before its own encoder runs. So for such a method, the processor encodes and
compresses the image with the model of transformers, and hands the projected tokens to the engine. Counts are exact, and
vLLM keeps the tokens in the cache of its processor.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from vlmzip.compressor import Compressor
from vlmzip.errors import refusing
from vlmzip.models import family_of
from vlmzip.models.family import Family, Modality
from vlmzip.processor import Inputs
from vlmzip.serving.vllm.engine import Remaining, compressed


class Encoder:
    """A checkpoint's vision encoder and projector, without the layers of its LLM."""

    def __init__(self, model_config: Any) -> None:
        """Load them. `model_config` is vLLM's `ModelConfig`."""
        config = copy.deepcopy(model_config.hf_config)
        text = config.get_text_config()
        text.num_hidden_layers = 0
        if getattr(text, "layer_types", None) is not None:
            text.layer_types = []
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it would warn of the weights of the LLM's layers
        try:
            with refusing(f"cannot load the vision encoder of {model_config.model!r}"):
                model = AutoModelForImageTextToText.from_pretrained(
                    model_config.model, revision=model_config.revision, config=config, dtype=model_config.dtype
                )
        finally:
            logging.set_verbosity(verbosity)
        for words in (model.get_input_embeddings(), model.get_output_embeddings()):
            words.to("meta")  # they are the engine's
        self._lock = threading.Lock()
        self.families: dict[Modality, Family] = {each.modality: each for each in family_of(model.eval()).modalities}
        for family in self.families.values():
            family.leaves_encoder_early = True  # nobody else uses this model

    @torch.no_grad()
    def remaining(self, modality: Modality, parts: Iterable[Inputs], compressor: Compressor) -> list[Remaining]:
        """Return the projected tokens that remain of each image. Each part goes through the encoder in one call."""
        family = self.families[modality]
        with self._lock:  # a family records the outputs of its modules
            return [image for part in parts for image in compressed(family, part, compressor)]


_encoders: dict[tuple[object, ...], Encoder] = {}
_loading = threading.Lock()


def encoder_of(model_config: Any) -> Encoder:
    """Return the encoder of a checkpoint, which a process loads once: vLLM makes a processor for each chat request."""
    # --hf-overrides may change the config: another layer of the encoder, say.
    key = (model_config.model, model_config.revision, model_config.dtype, model_config.hf_config.to_json_string())
    with _loading:
        if key not in _encoders:
            _encoders[key] = Encoder(model_config)
        return _encoders[key]
