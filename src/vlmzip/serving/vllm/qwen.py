"""What Qwen2.5-VL and Qwen3-VL share in vLLM: patches of any grid, one module for encoder and merger, and M-RoPE."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalInput
from vllm.model_executor.layers.fusion.mm_input_norm import NormParams, _load_norm_params
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems
from vllm.multimodal.processing import ProcessorInputs, TimingContext
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.models.encoder_run import Batch, Run, WithStreams
from vlmzip.models.family import Family
from vlmzip.models.recording import Recording, record, rotate
from vlmzip.models.towers.qwen import QwenTower
from vlmzip.models.towers.tower import Attention
from vlmzip.processor import InputDict, Inputs
from vlmzip.runtime.inputs import positions_of
from vlmzip.serving.vllm import setting
from vlmzip.serving.vllm.engine import InEngine, Remaining
from vlmzip.serving.vllm.model import CompressingModel, read
from vlmzip.serving.vllm.positions import updated_positions, with_positions
from vlmzip.serving.vllm.processor import CompressingProcessor, field_of
from vlmzip.serving.vllm.runner import take_over_positions
from vlmzip.serving.vllm.setting import KEY, PATCHES

#: The model input with the token ids of a whole video: its placeholders and the text between its frames.
SPAN = f"{KEY}_span"


class EngineQwenTower(QwenTower):
    """The vision encoder of vLLM's Qwen models. One projection gives queries, keys and values.

    With tensor parallelism, each process has some of the heads, and gets those of the others.
    """

    @cached_property
    def attentions(self) -> list[Attention]:
        return [self._attention(block, block.attn) for block in self.encoder.blocks]

    def _attention(self, block: nn.Module, module: Any) -> Attention:
        heads = module.num_attention_heads_per_partition * module.tp_size
        head_dim = module.hidden_size_per_attention_head
        return Attention(block, module, (module.qkv,), heads, head_dim, head_dim**-0.5)

    def part(self, recording: Recording, layer: int, number: int) -> Float[Tensor, "1 length dim"]:
        states: Tensor = recording[f"{layer}.0"].transpose(0, 1)  # vLLM has [length, 1, dim]
        part = states.unflatten(-1, (3, -1))[..., number, :]
        return part if part.shape[-1] == self._width(layer) else tensor_model_parallel_all_gather(part.contiguous())

    def _width(self, layer: int) -> int:
        """Return the width of all heads."""
        attention = self.attentions[layer]
        return attention.heads * attention.head_dim

    def queries_and_keys(
        self, recording: Recording, layer: int
    ) -> tuple[Float[Tensor, "1 length dim"], Float[Tensor, "1 length dim"]]:
        arguments, heads = recording.arguments[str(layer)], self.attentions[layer].heads
        tables = (arguments[f"rotary_pos_emb_{name}"].float() for name in ("cos", "sin"))
        cos, sin = (torch.cat([table, table], -1)[:, None] for table in tables)
        states = (self.part(recording, layer, number).float().unflatten(-1, (heads, -1)) for number in (0, 1))
        query, key = (rotate(each, cos.expand_as(each), sin.expand_as(each)).flatten(-2) for each in states)
        return query, key


class InQwenEngine(InEngine):
    """A mixin for a Qwen family whose model is an `EngineModel`. It goes before the family's class."""

    @property
    def vision_encoder(self) -> nn.Module:
        encoder: nn.Module = self.model.visual
        return encoder

    @cached_property
    def tower(self) -> EngineQwenTower:
        return EngineQwenTower(self.vision_encoder)

    def feature_arguments(self, inputs: Inputs) -> InputDict:
        return {name: inputs[name] for name in self.image_inputs[:2]}

    def run(self, batch: Batch, layers: Collection[int]) -> Run:
        outputs, called = self.tower.modules(layers) if layers else ({}, {})
        with record(outputs, called) as recording:
            features = self.run_encoder(batch)
        # The features that layers of the LLM add (deepstack) stand behind those of the merger.
        tokens, *streams = features.chunk(1 + self.stream_count, -1)
        return Run(
            WithStreams(pooler_output=tokens, deepstack_features=[[stream] for stream in streams]), recording, None
        )

    def run_encoder(self, batch: Batch) -> Tensor:
        patches, grids = (batch.arguments[name] for name in self.image_inputs[:2])
        features: Tensor = self.vision_encoder(patches, grid_thw=grids.tolist())
        return features


class QwenProcessor(CompressingProcessor):
    """A mixin for a processor of vLLM's Qwen models. It goes before the stock class."""

    traits = PATCHES

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        try:
            check_items(inputs.mm_data_items)
            result = super().apply(inputs, timing_ctx)
            ranges = [each for of_modality in result["mm_placeholders"].values() for each in of_modality]
            check_prompt(result["prompt_token_ids"], {family.placeholder_id for family in self.families}, ranges)
        except UserError as error:  # vLLM's server answers 400 to its own class
            raise VLLMValidationError(str(error), parameter=KEY) from error
        return result

    def encoder_inputs(self, family: Family, processed: InputDict) -> Iterator[InputDict]:
        """Yield the inputs of each image or video, with normalised pixels: vLLM's model does that.

        Large images need less memory one by one, and no more time.
        """
        config, (patches, grids, *_) = self.info.ctx.model_config, family.image_inputs
        for number in range(len(processed[grids])):
            inputs = family.choose_images(processed, [number])
            if inputs[patches].dtype == torch.uint8:
                inputs[patches] = normalised(inputs[patches], norm_params(config)).to(config.dtype)
            yield inputs

    def inputs_of(self, family: Family, item: Mapping[str, Any]) -> InputDict:
        patches, *others = family.image_inputs
        return {patches: item[patches].data} | {name: item[name].data[None] for name in others if name in item}

    def item_count(self, hf_inputs: Mapping[str, Any], family: Family) -> int:
        return len(hf_inputs[family.image_inputs[1]])


_norm_params: dict[tuple[str, str | None], NormParams] = {}


def norm_params(model_config: Any) -> NormParams:
    """Return mean, standard deviation and scale of a checkpoint's pixels. Its files are read once."""
    key = (model_config.model, model_config.revision)
    if key not in _norm_params:
        _norm_params[key] = _load_norm_params(model_config)
    return _norm_params[key]


def normalised(patches: UInt8[Tensor, "patches values"], params: NormParams) -> Float[Tensor, "patches values"]:
    """Return the values of patches as vLLM's model normalises them, in float32."""
    mean, deviation = (torch.tensor(values)[:, None] for values in (params.image_mean, params.image_std))
    pixels = patches.unflatten(1, (len(mean), -1)) * params.rescale_factor
    return ((pixels - mean) / deviation).flatten(1)


def dummy_text(info: Any, mm_counts: Mapping[str, int]) -> str:
    """Return the prompt for vLLM's trial run, with each image and video between its markers."""
    config, processor = info.get_hf_config(), info.get_hf_processor()
    markers = [config.vision_start_token_id, config.vision_end_token_id]
    start, end = info.get_tokenizer().convert_ids_to_tokens(markers)
    tokens = {"image": processor.image_token, "video": processor.video_token}
    return "".join(f"{start}{token}{end}" * mm_counts.get(modality, 0) for modality, token in tokens.items())


def check_items(items: Mapping[str, object]) -> None:
    """Raise `UserError` for precomputed embeddings, which have no positions."""
    if any(isinstance(values, EmbeddingItems | DictEmbeddingItems) for values in items.values()):
        raise UserError(f"{KEY} needs images or videos, got precomputed embeddings: start without {KEY} to send them")


def check_prompt(ids: Sequence[int], placeholders: Collection[int], ranges: Sequence[PlaceholderRange]) -> None:
    """Raise `UserError` if images and videos do not stand between tokens of text, as chat templates write them.

    The positions of a chunk of the prompt are counted from the token of text before an image.
    """
    spans = sorted((each.offset, each.offset + each.length) for each in ranges)
    ends = {end for _, end in spans}
    if sum(token in placeholders for token in ids) != sum(end - start for start, end in spans):
        raise UserError("the text of the prompt has a placeholder without an image or video: leave it out")
    if len(ids) in ends or any(start in ends for start, _ in spans):
        raise UserError(
            "a prompt needs a token of text, such as <|vision_end|>, between two images and after the last: use the"
            " model's chat template"
        )


class QwenModel(CompressingModel):
    """A mixin for a Qwen model of vLLM. It goes before the stock class, and acts only if a compressor is configured.

    Each row of its features has the features of a token, those that layers of the LLM add to it (deepstack), and its
    position. `recompute_mrope_positions` takes the positions off.
    """

    vlmzip_positions = False
    """True if rows have positions."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.compresses:
            check_engine(vllm_config, self.visual)
            self.vlmzip_positions = True
            #: vLLM encodes at most this many tokens in one call, or one image. It counts those that remain.
            self._most_tokens = vllm_config.scheduler_config.max_num_encoder_input_tokens
            take_over_positions()

    def get_encoder_cudagraph_config(self) -> Any:
        """Return the config of CUDA graphs for the encoder, without any: a graph has no compression in it."""
        config = super().get_encoder_cudagraph_config()  # type: ignore[misc]
        return replace(config, modalities=[]) if self.compresses else config

    def _image(self, family: Family, inputs: Inputs, number: int) -> Inputs:
        return family.choose_images(inputs, [number])

    def _parts(self, family: Family, inputs: Inputs) -> Iterator[Inputs]:
        """Yield the inputs of some images at a time, with as many tokens as vLLM would encode in one call."""
        sizes = family.plain_counts(inputs)
        chosen: list[int] = []
        for number, size in enumerate(sizes):
            if chosen and sum(sizes[each] for each in chosen) + size > self._most_tokens:
                yield family.choose_images(inputs, chosen)
                chosen = []
            chosen.append(number)
        yield inputs if len(chosen) == len(sizes) else family.choose_images(inputs, chosen)

    def _rows(self, family: Family, kwargs: Inputs, compressor: Compressor) -> list[Tensor]:
        original = positions_of(compressor, family) == "original"
        images = self.remaining(family, kwargs, compressor)
        return [
            self._rows_of(image, self._span(family, item), item, original=original)
            for image, item in zip(images, _items(family, kwargs), strict=True)
        ]

    def _span(self, family: Family, item: Mapping[str, Any]) -> _Span:
        """Return the whole image or video in a prompt."""
        if (ids := item.get(SPAN)) is None:
            sizes = item[family.image_inputs[1]].data
            count = int(sizes.prod()) // family.patches_per_side**2
            return _Span(family, torch.full((count,), family.placeholder_id))
        return _Span(family, ids.data.cpu().long())

    def _rows_of(
        self, image: Remaining, span: _Span, item: Mapping[str, Any], *, original: bool
    ) -> Float[Tensor, "tokens dim_and_columns"]:
        """Return the rows of an image or video, with those of the text between the frames."""
        features = image.features
        left, is_visual = span.left(image.places)
        stock: Any = super()
        if not bool(is_visual.all()):
            between, visual = (mask.nonzero()[:, 0] for mask in (~is_visual, is_visual))
            text = stock.get_language_model().embed_input_ids(span.ids[left[between]].to(features.device))
            rows = features.new_zeros(len(left), features.shape[1])
            # Indices on the features' device: with a mask, a GPU would wait for the CPU.
            rows[between.to(features.device), : text.shape[1]] = text.to(features)
            rows[visual.to(features.device)] = features
            features = rows
        if original:
            feature = MultiModalFeatureSpec(item, span.modality, "", PlaceholderRange(0, len(span.ids)))
            whole, _ = stock.get_mrope_input_positions(span.ids.tolist(), [feature])
            positions = whole[:, left]
        else:
            positions = torch.arange(len(left)).expand(3, -1)
        return with_positions(features, positions.to(features.device))

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[Int[Tensor, "3 length"], int]:
        """Return the positions of a prompt, with the first of each image for all of its tokens.

        They are counted in the prompt with whole images. Images with contiguous positions count as text.
        """
        stock: Any = super()
        if not self.compresses:
            counted: tuple[Tensor, int] = stock.get_mrope_input_positions(input_tokens, mm_features)
            return counted
        families = {family.modality: family for family in self.families}
        whole: list[int] = []
        index: list[int] = []
        features, done = [], 0
        for feature in sorted(mm_features, key=lambda each: each.mm_position.offset):
            family, data, place = families[feature.modality], feature.data, feature.mm_position
            compressor = read(setting.from_tensor(data[field_of(family.modality)].data))
            if positions_of(compressor, family) != "original":
                continue
            index += range(len(whole), len(whole) + place.offset - done)
            whole += input_tokens[done : place.offset]
            ids = self._span(family, data).ids.tolist()
            features.append(replace(feature, mm_position=PlaceholderRange(len(whole), len(ids))))
            index += [len(whole)] * place.length
            whole += ids
            done = place.offset + place.length
        index += range(len(whole), len(whole) + len(input_tokens) - done)
        whole += input_tokens[done:]
        positions, delta = stock.get_mrope_input_positions(whole, features)
        return positions[:, index], delta + len(whole) - len(input_tokens)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Int[Tensor, "3 length"],
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Int[Tensor, "3 length"], int]:
        """Return the features of a chunk of a prompt without their positions, and the positions of the prompt."""
        if not self.compresses:
            stock: Any = super()
            result: tuple[Sequence[Tensor], Tensor, int] = stock.recompute_mrope_positions(
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
            return result
        placeholders = [family.placeholder_id for family in self.families]
        with gpu_sync_allowed():
            return updated_positions(
                input_ids, placeholders, multimodal_embeddings, mrope_positions, num_computed_tokens
            )


class _Span:
    """The tokens of a whole image or video in a prompt: placeholders, and the text between the frames of a video."""

    def __init__(self, family: Family, ids: Int[Tensor, " span"]) -> None:
        self.ids = ids
        self.modality = family.modality
        self.is_visual = ids == family.placeholder_id

    def left(self, places: Int[Tensor, " tokens"]) -> tuple[Int[Tensor, " left"], Tensor]:
        """Return which tokens of the span remain, and a mask of the visual ones among them.

        `places` has the placeholders that remain.
        """
        stays = ~self.is_visual
        stays[self.is_visual.nonzero()[:, 0][places]] = True
        return stays.nonzero()[:, 0], self.is_visual[stays]


def _items(family: Family, kwargs: Inputs) -> Iterator[dict[str, Any]]:
    """Yield the inputs of each image or video beside its patches, as vLLM describes those of a request."""
    names = [name for name in (*family.image_inputs[1:], SPAN, "timestamps") if kwargs.get(name) is not None]
    for number in range(len(kwargs[family.image_inputs[1]])):
        yield {name: SimpleNamespace(data=kwargs[name][number]) for name in names}


def check_engine(vllm_config: VllmConfig, encoder: Any) -> None:
    """Raise `UserError` for settings of the engine with which compression cannot work."""
    multimodal = vllm_config.model_config.multimodal_config
    if multimodal.is_multimodal_pruning_enabled():
        raise UserError(f"video_pruning_rate and {KEY} both drop tokens of videos: leave out video_pruning_rate")
    if multimodal.mm_encoder_tp_mode == "data":
        raise UserError(f"{KEY} needs mm_encoder_tp_mode='weights': with 'data', no process sees all images")
    if vllm_config.speculative_config is not None:
        raise UserError(f"{KEY} was not checked with speculative decoding of Qwen's models: leave it out")
    if vllm_config.compilation_config.compile_mm_encoder:
        raise UserError(f"{KEY} reads the attention of the vision encoder: leave out compile_mm_encoder")
    if encoder.attn_backend == AttentionBackendEnum.FLASHINFER:
        raise UserError(f"{KEY} cannot read FlashInfer's sequences: set mm_encoder_attn_backend to FLASH_ATTN")
