"""What lets a family work on a model of vLLM: the names of its parts, and the attention of its vision encoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm.distributed import tensor_model_parallel_all_reduce

from vlmzip.compressor import Compressor
from vlmzip.errors import UnfitMethod
from vlmzip.models.encoder_run import Batch
from vlmzip.models.family import Family
from vlmzip.models.recording import Recording
from vlmzip.models.towers.tower import Attention, Tower
from vlmzip.processor import InputDict, Inputs
from vlmzip.runtime.inputs import positions_of
from vlmzip.runtime.report import Stopwatch
from vlmzip.runtime.stages import compress_images
from vlmzip.visual_tokens import Grid, Projector, Signal


class EngineModel(nn.Module):
    """A model of vLLM with the names that families know from transformers.

    Without `parts` it has no weights. A family then knows the layouts of images, which follow from shapes.
    """

    def __init__(self, config: PreTrainedConfig, parts: nn.Module | None = None, methods: Iterable[Any] = ()) -> None:
        super().__init__()
        self.config = config
        self.parts = parts
        for method in methods:  # of transformers' class, such as the one that packs the views of an image
            setattr(self, method.__name__, MethodType(method, self))

    @property
    def base_model(self) -> EngineModel:
        """The model without its head, which is the same here."""
        return self

    model = base_model

    def __getattr__(self, name: str) -> Any:
        parts = self.__dict__["_modules"].get("parts")
        return super().__getattr__(name) if parts is None or name == "parts" else getattr(parts, name)

    def get_decoder(self) -> Any:
        """Return what families need to know of the LLM: how many layers it has."""
        return SimpleNamespace(layers=range(self.config.get_text_config().num_hidden_layers))


class EngineTower(Tower):
    """A CLIP or SigLIP encoder of vLLM. One projection gives queries, keys and values.

    vLLM loads the layers up to the deepest that gives features. With tensor parallelism, each process has some of the
    heads; the mean over heads is then the mean of the processes' means.
    """

    def __init__(self, encoder: nn.Module, depth: int) -> None:
        super().__init__(encoder)
        self._depth = depth

    @property
    def depth(self) -> int:
        """The number of layers that the encoder has in its checkpoint."""
        return self._depth

    @cached_property
    def attentions(self) -> list[Attention]:
        """The attention of each loaded layer."""
        layers = self.encoder.vision_model.encoder.layers
        return [self._attention(layer, layer.self_attn) for layer in layers]

    def _attention(self, layer: nn.Module, module: Any) -> Attention:
        heads = module.num_heads_per_partition
        return Attention(layer, module, (module.qkv_proj,), heads, module.head_dim, float(module.scale))

    def signal(
        self,
        signal: Signal,
        recording: Recording,
        layer: int,
        grids: Sequence[Grid],
        prefix: int,
        of_patch: Int[Tensor, "rows length"] | None = None,
    ) -> Float[Tensor, " tokens *key_dim"]:
        values = super().signal(signal, recording, layer, grids, prefix, of_patch)
        parts = getattr(self.attentions[layer].module, "tp_size", 1)
        return values if parts == 1 else _mean_over_processes(values, parts)


def _mean_over_processes(values: Tensor, parts: int) -> Tensor:
    """Return the mean of the values of all processes that share the heads."""
    summed: Tensor = tensor_model_parallel_all_reduce(values.contiguous())
    return summed / parts


class InEngine(Family):
    """A mixin for a family whose model is an `EngineModel`. It goes before the family's class."""

    @property
    def vision_encoder(self) -> nn.Module:
        encoder: nn.Module = self.model.vision_tower
        return encoder

    @cached_property
    def tower(self) -> Tower:
        return EngineTower(self.vision_encoder, self.vision_config.num_hidden_layers)

    @property
    def decoder_layers(self) -> Any:
        return self.model.get_decoder().layers

    @property
    def projector(self) -> nn.Module:
        projector: nn.Module = self.model.multi_modal_projector
        return projector

    def feature_arguments(self, inputs: Inputs) -> InputDict:
        return {}

    def run_encoder(self, batch: Batch) -> object:
        return self.vision_encoder(batch.arguments[self.image_inputs[0]])

    def _projector_of_tokens(self) -> Projector:
        """Return the projector as a function. It takes the dtype of the model, which packed weights do not show."""
        if not self.projects_each_token:
            raise UnfitMethod("the projector of this model does not map each token by itself: choose another method")
        dtype = self.model.compute_dtype

        def project(features: Float[Tensor, "*any encoder_dim"]) -> Float[Tensor, "*any llm_dim"]:
            projected: Tensor = self.projector(features.flatten(0, -2).to(dtype))
            return projected.to(features.dtype).view(*features.shape[:-1], -1)

        return project


@dataclass(frozen=True)
class Remaining:
    """The projected tokens that remain of an image or video."""

    features: Float[Tensor, "tokens dim"]
    """The features of each token, and behind them those that layers of the LLM add to it (deepstack)."""
    places: Int[Tensor, " tokens"]
    """The 0-based index, for each token, of the image's placeholder whose position it takes."""


def compressed(family: Family, inputs: Inputs, compressor: Compressor) -> list[Remaining]:
    """Return the projected tokens that remain of each image, in ascending order of places if they keep positions."""
    watch = Stopwatch(torch.device("cpu"))  # its times are not read
    original = positions_of(compressor, family) == "original"
    images, _ = compress_images(family, inputs, compressor, watch, None, ascending=original)
    return [Remaining(torch.cat([image.features, *image.streams], -1), torch.tensor(image.places)) for image in images]


def of_images(inputs: Inputs, start: int, end: int) -> dict[str, Any]:
    """Return the inputs of the images from `start` to before `end`. Each input has an entry for each image."""
    return {name: value[start:end] for name, value in inputs.items()}


def batch_of_one(item: Inputs) -> dict[str, Any]:
    """Return the inputs of a single image as a batch of one."""
    return {name: value[None] if isinstance(value, torch.Tensor) else [value] for name, value in item.items()}
