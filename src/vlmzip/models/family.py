"""The interface to a family of models, so that methods and runtime need no code for a single family."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, cached_property, partial
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmzip.compressor import MergesInEncoder, Positions, Profile
from vlmzip.errors import ADD_A_FAMILY, UnfitMethod, UserError
from vlmzip.models.confirm import (
    check_attention,
    check_llm_attention,
    check_merging,
    makes_squares,
    maps_each_token,
    run_behind,
    tokens_of_patches,
)
from vlmzip.models.encoder_run import (
    ENCODER_FIELDS,
    Batch,
    EncoderAttention,
    Run,
    WithStreams,
    ends_with_views,
    flat,
    further_fields,
    learning,
    of_views,
    shape_of,
    token_field,
)
from vlmzip.models.layout import Encoded, Layout, MergedViews, MergeTarget, Pixels, Views, numbers_by_kind
from vlmzip.models.llm_attention import QueriesAndKeys, is_direct, queries_and_keys, queries_in, recorded
from vlmzip.models.parts import (
    axes_of_positions,
    feature_arguments,
    has_known_videos,
    merge_in,
    method_of,
    projector_of,
    side_in,
    width_before,
    with_layers,
    without_adapters,
)
from vlmzip.models.prompt_layout import (
    grids_by_prompt,
    placeholders_of_images,
    square_of,
    tokens_of_view,
    views_of_images,
    with_joined_frames,
)
from vlmzip.models.recording import record
from vlmzip.models.rope import rope_positions
from vlmzip.models.towers import tower_of
from vlmzip.models.towers.merging import BEHIND, Merging, alone_first, merging_inside
from vlmzip.models.towers.qwen import grids_of, sizes_of
from vlmzip.models.towers.tower import OTHER_METHODS, Merge, Tower
from vlmzip.models.towers.vit import feature_layers, image_of
from vlmzip.processor import InputDict, Inputs
from vlmzip.sites import ATTENTION_OF_ENCODERS
from vlmzip.visual_tokens import Grid, Projector, Signal, Site, VisualTokens

#: A kind of visual input, as keys of `mm_encoder_outputs` name it.
Modality = Literal["image", "video"]
#: How the names of parameters of `get_image_features` begin that are settings, and do not describe images.
SETTINGS = ("vision_", "interpolate_", "downsample_")
#: Names of inputs with the rows and columns of patches of each view.
PATCH_SIZES = ("spatial_shapes", "target_sizes", "image_grid_hw")
#: The input with the rows and columns of visual tokens of each view, one row for each image.
VIEW_GRIDS = "image_grids"
#: The number of shapes of images for which we remember which patches make which token.
MOST_ASKED = 64
#: The side in pixels of a common image, for encoders that take images of any size.
COMMON_SIDE = 448
#: The side in pixels of a common patch, for encoders whose config has none.
COMMON_PATCH = 14
#: Attention implementations for which transformers builds masks that keep packed rows from attending to each other.
MASKED_ATTENTION = ("sdpa", "eager")
#: LLMs for which we have checked that packed rows stay apart. Others ignore packing (gpt_oss) or carry a state along.
LLMS_THAT_MASK_PACKED_ROWS = ("llama", "mistral", "qwen2", "gemma2")

#: The message for methods that drop patches before the encoder, with the name of the model's class.
NO_PARTS = "vlmzip cannot run the vision encoder of {} on a part of an image: choose another method"

#: A function from the number of layers of a vision encoder to some of them, 0-based.
EncoderLayers = Callable[[int], Sequence[int]]


def no_layers(_depth: int) -> Sequence[int]:
    """Return no layers."""
    return ()


class Family:
    """The interface between vlmzip and a family of vision-language models. It does not change the model.

    This class asks the model. It runs the model's own `get_image_features` and takes from that one run the features
    before the projector, the projected tokens, and the attention of the encoder. If the projector maps each token by
    itself, compressors before the projector get its input, and the projector gets only the tokens that remain. Other
    projectors join patches into tokens. Compressors "before" them get the projected tokens, with the signals of the
    encoder.

    Each run of placeholders in the prompt is one image. It has several views if the pixels are a batch of more views
    than there are images. The grid of a view is a square if its tokens fill one, unless the inputs tell the size of the
    image. A subclass adds what the model's public methods do not provide: other images of several views, and smaller
    images.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    """The values of `config.model_type` that belong to the family."""
    example: ClassVar[str] = ""
    """A checkpoint of the family, shown by `vlmzip models`."""
    sites: ClassVar[tuple[Site, ...]] = (Site.PRE_PROJECTOR, Site.POST_PROJECTOR, Site.IN_LLM)
    """Where compressors can act in this family."""
    encodes_parts: ClassVar[bool] = False
    """True if the vision encoder can run on some of an image's patches: `token_pixels` and `encode_part` work."""
    projects_each_token: bool | None = None
    """True if the projector maps each token by itself. `None` until the first run with several tokens."""
    prefix: int = 0
    """The number of tokens, such as CLS, before the grid of each view that have features as the grid's tokens have."""
    image_inputs: tuple[str, ...] = ()
    """The model inputs that describe images. The first is present if there is an image.

    By default, the parameters of `get_image_features` without its settings (`SETTINGS`). An object that serves videos
    has `video_inputs` here.
    """
    former_names: ClassVar[Mapping[str, str]] = {}
    """Former names of model inputs, which processors still use, and the names that the model has for them now."""
    video_inputs: tuple[str, ...] = ()
    """The model inputs that describe videos, the pixels first; empty if the family does not know its videos."""
    video_family: ClassVar[type[Family] | None] = None
    """The class for videos, if they go through the model in another way than images. Default: the same class."""
    default_positions: Positions = "contiguous"
    """The value that stands for `positions=None`. VisionZip and DFMR use contiguous positions before LLaVA's LLM.

    Families whose positions have several axes set "original".
    """
    position_axes: tuple[int, ...] = ()
    """Axes of `position_ids` before batch and length: (3,) if positions are temporal, height and width."""
    leaves_encoder_early: bool = False
    """True if a run may end before the first encoder layer whose output nobody reads.

    The encoder then does not return. Set it only if nobody has hooks that need its return: accelerate, FSDP, DeepSpeed
    and counters of FLOPs do.
    """
    features_as_list: bool = True
    """True if the model takes a list of features, one entry per image; False if it takes one tensor for all images."""

    def __init__(self, model: nn.Module, modality: Modality = "image") -> None:
        self.model: Any = without_adapters(model)  # a type checker does not know the attributes of each family's model
        self.is_confirmed = type(self) is not Family
        """True if the attention of the encoder is known to be as `tower` takes it."""
        self._merge: Merge | None = None
        """The squares of patches that are known to make visual tokens."""
        self._asked: dict[Hashable, Tensor | None] = {}
        """The token of each patch, for images of shapes that do not follow `_merge`; see `_tokens_of_patches`."""
        self._merging_is_confirmed = False
        """True if the encoder is known to work while tokens are merged inside it."""
        self._confirmed_layers: set[nn.Module] = set()
        """The decoder layers whose attention is known to follow from queries and keys."""
        self.modality = modality
        """The kind of visual input that this object serves. `modalities` has the objects for all kinds of a model."""
        self.get_features = method_of(self.model, f"get_{modality}_features")
        self._feature_arguments = feature_arguments(self.model, modality)
        self._output_class: type[BaseModelOutputWithPooling] = BaseModelOutputWithPooling
        self._token_field = "pooler_output"
        if modality == "video":
            self.image_inputs = self.video_inputs
        if not self.image_inputs:
            names = (name for name in self._feature_arguments if not name.startswith(SETTINGS))
            self.image_inputs = tuple(n for n in names if self.former_names.get(n) not in self._feature_arguments)
        if type(self) is Family and (rope_index := method_of(self.model, "get_rope_index")):
            self.default_positions, self.position_axes = "original", axes_of_positions(rope_index)

    @property
    def input_methods(self) -> list[Callable[..., object]]:
        """The model's own methods whose parameters are its inputs."""
        names = ("get_image_features", "get_video_features")
        methods = (self.model.forward, *(method_of(self.model, name) for name in names))
        return [method for method in methods if method is not None]

    @cached_property
    def modalities(self) -> tuple[Family, ...]:
        """This family for images and, if it knows the videos of the model, the same family for videos."""
        knows = self.video_inputs or (type(self) is Family and has_known_videos(self.model))
        return (self, (self.video_family or type(self))(self.model, "video")) if knows else (self,)

    def present_in(self, inputs: Inputs) -> list[Family]:
        """Return the objects of `modalities` whose images or videos are in `inputs`.

        Raise `UserError` if videos are, and the family does not know them.
        """
        if inputs.get("pixel_values_videos") is not None and len(self.modalities) == 1:
            raise UserError(
                f"vlmzip cannot compress videos of {type(self.model).__name__} yet: give it images; {ADD_A_FAMILY}"
            )
        return [each for each in self.modalities if inputs.get(each.image_inputs[0]) is not None]

    @property
    def stacks_videos(self) -> bool:
        """True if all videos of a batch are one tensor, so that each needs equally many frames."""
        return len(self.modalities) > 1 and "video_grid_thw" not in self.modalities[-1].image_inputs

    @property
    def placeholder_id(self) -> int:
        """The token id that stands for one visual token in `input_ids`.

        Override it if the config has no `image_token_id` or `video_token_id`.
        """
        token: int = getattr(self.model.config, f"{self.modality}_token_id")
        return token

    @property
    def llm(self) -> nn.Module:
        """The decoder, without vision encoder, projector and LM head. Override it if `get_decoder` returns another."""
        decoder: nn.Module = self.model.get_decoder()
        return with_layers(decoder) or decoder

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The decoder layers of the LLM, in order. Override it if they are not `llm.layers`."""
        return self.llm.layers  # type: ignore[return-value]

    @property
    def final_norm(self) -> Callable[[Float[Tensor, "*batch dim"]], Float[Tensor, "*batch dim"]]:
        """The norm between the last decoder layer and the LM head. Override it if it is not `llm.norm`."""
        norm = getattr(self.llm, "norm", None)
        if norm is None:
            raise UnfitMethod(f"{type(self.llm).__name__} has no final norm that is known: choose another method")
        return lambda states: norm(states).to(states.device)  # accelerate can move the norm to another device

    @property
    def lora_targets(self) -> str:
        """A regular expression that matches the names of the LLM's linear layers, for low-rank adapters.

        Override it if the projections of attention and MLP have other names, such as `fc1`.
        """
        name = next(name for name, module in self.model.named_modules() if module is self.llm)
        return rf".*{name.rpartition('.')[2]}.*\.(q|k|v|o|qkv|gate|up|down|gate_up)_proj"

    @property
    def stream_count(self) -> int:
        """The number of first layers of the LLM after which it adds further features to the visual tokens (deepstack).

        We call these features streams. They are compressed with the token map of the visual tokens.
        """
        return len(getattr(self.vision_config, "deepstack_visual_indexes", None) or ())

    @property
    def first_free_layer(self) -> int:
        """The first layer of the LLM, 0-based, before which tokens may be dropped: after it has added all streams."""
        return max(1, self.stream_count)

    @property
    def vision_encoder(self) -> nn.Module:
        """The vision encoder. Override it if `get_encoder` returns another module for images."""
        encoder: nn.Module = self.model.get_encoder(modality=self.modality)
        return encoder

    @property
    def projector(self) -> nn.Module:
        """The module that turns the encoder's features into visual tokens of the LLM. It may be a part of the encoder.

        Override it if it has a name that is not in `PROJECTORS`.
        """
        if (projector := self._find_projector()) is None:
            raise UserError(f"vlmzip does not know the projector of {type(self.model).__name__}")
        return projector

    def _find_projector(self) -> nn.Module | None:
        return projector_of((self.model.base_model, self.model, self.vision_encoder))

    @cached_property
    def tower(self) -> Tower:
        """The vision encoder with its attention. Raise `UserError` if the model has no encoder."""
        if self.vision_encoder is self.model:
            raise UnfitMethod(f"{type(self.model).__name__} has no vision encoder with attention: {OTHER_METHODS}")
        return tower_of(self.vision_encoder)

    @property
    def vision_config(self) -> PreTrainedConfig:
        """The config of the vision encoder, or of the model if it has no other."""
        whole = self.model.config
        config: PreTrainedConfig = getattr(whole, "vision_config", None) or getattr(whole, "vq_config", None) or whole
        return config

    @property
    def llm_config(self) -> PreTrainedConfig:
        """The config of the LLM."""
        config: PreTrainedConfig = self.model.config.get_text_config()
        return config

    @property
    def keeps_packed_rows_apart(self) -> bool:
        """True if rows packed into one do not attend to each other, provided that each row's positions start at 0.

        It is False under FlashAttention, for which transformers keeps rows apart only in a batch of one. It is also
        False for positions with several axes, because they do not show where a row begins.
        """
        llm = self.llm_config
        masks = llm._attn_implementation in MASKED_ATTENTION and llm.model_type in LLMS_THAT_MASK_PACKED_ROWS
        return masks and not self.position_axes

    @property
    def patches_per_side(self) -> int:
        """The number of patches per side that become one token, by the model's config."""
        return merge_in((self.vision_config, self.model.config))

    def profile(self) -> Profile:
        """Return the grid of one image at the model's own resolution and the number of layers of the LLM.

        Override it if images have several views.
        """
        vision, config = self.vision_config, self.model.config
        if tokens := getattr(config, "mm_tokens_per_image", None):
            grid = square_of(tokens)
        else:
            image = side_in(getattr(vision, "image_size", None) or COMMON_SIDE)
            patch = side_in(getattr(vision, "patch_size", None) or COMMON_PATCH)
            side = max(image // patch // self.patches_per_side, 1)
            grid = Grid(1, side, side)
        return Profile(grid, self.llm_config.num_hidden_layers, first_layer=self.first_free_layer)

    def prompt(self, question: str, images: int, videos: int = 0) -> str:
        """Return the text of a prompt about some images and videos, for checkpoints without a chat template.

        Override it if the family was trained with a format of this kind, such as LLaVA's "USER: ... ASSISTANT:".
        """
        return "<image>" * images + "<video>" * videos + question

    def encode(
        self, inputs: Inputs, site: Site, needs: frozenset[Signal], encoder_layers: EncoderLayers = no_layers
    ) -> Encoded:
        """Return the visual tokens of all images in `inputs` at `site`, with the signals in `needs`.

        Features are [views, tokens, dim], one batch for each grid, where dim is `feature_width(site)`. Each view holds
        all its tokens; `layouts` tells which of them the LLM sees. `encoder_layers` chooses further layers for
        `attention_received`, as `Compressor.encoder_layers` does. Raise `UserError` if the model does not provide a
        signal, or if the number of placeholders is not the number of visual tokens.
        """
        passes_prefix = self.passes_prefix(inputs)
        groups: list[Views] = []
        further: dict[str, object] = {}
        for batch in self.batches(inputs):
            layers = self._layers_for(needs, encoder_layers, inputs)
            run = self.run(batch, {layer for of_signals in layers.values() for layer in of_signals})
            values = {"features": self.features(batch, run)}
            streams, further = run.streams, run.further
            if Signal.ENCODER_FEATURES in needs:
                values["encoder_features"] = values["features"]
            if site is Site.POST_PROJECTOR:
                values["features"] = self.project(values["features"], Site.PRE_PROJECTOR)
            self._check_width(values["features"], site)
            self._check_count(len(values["features"]), batch)
            self._check_views(run.sizes, batch)
            values |= self._signals(run, batch, layers)
            projector = self._projector_of_tokens() if Signal.PROJECTOR in needs else None
            sizes = self._sizes_of(batch)
            for grid, rows in numbers_by_kind(batch.grids).items():
                by_view: dict[str, Any] = {name: of_views(value, sizes, rows) for name, value in values.items()}
                if Signal.PIXELS in needs:
                    by_view["pixels"] = self._pixels(batch, rows)
                tokens = VisualTokens(
                    grid=grid, prefix=self.prefix, passes_prefix=passes_prefix, projector=projector, **by_view
                )
                added = tuple(of_views(stream, sizes, rows) for stream in streams)
                groups.append(Views(tokens, [batch.numbers[row] for row in rows], added))
        return Encoded(groups, further=further)

    def encode_merging(self, inputs: Inputs, method: MergesInEncoder, targets: Sequence[MergeTarget | None]) -> Encoded:
        """Return the visual tokens before the projector, merged inside the encoder.

        `targets` tells what to leave of each view of all images; views without one are left out. Raise `UserError` if
        tokens cannot be merged inside this encoder.
        """
        setting = self.setting(inputs, "vision_feature_layer")
        if isinstance(setting, list | tuple) and len(setting) > 1:
            raise UnfitMethod(
                f"the features of {type(self.model).__name__} come from several layers of its encoder, which would have"
                f" different numbers of tokens: {BEHIND}"
            )
        passes_prefix, layers = self.passes_prefix(inputs), self.scored_layer(inputs) + 1
        groups: list[Views] = []
        for batch in self.batches(inputs):
            kinds = ((grid, targets[number]) for grid, number in zip(batch.grids, batch.numbers, strict=True))
            for (grid, target), rows in numbers_by_kind(kinds).items():
                if target is None:
                    continue
                part, merged = batch.rows(rows, self.image_inputs[0]), None
                order = alone_first(target.window.tokens(grid, self.prefix), self.prefix, self.prefix + grid.size)
                front = self.prefix + grid.size - target.size
                if target.left < target.size:
                    counts = method.counts_by_layer(target.size, target.left, layers)
                    merged = self._run_merging(part, Merging(counts, method.join, order, front))
                    features = merged.features.new_zeros(len(rows), len(order), 0)
                else:
                    features = self.features(part, self.run(part, ())).unflatten(0, (len(rows), -1))
                tokens = VisualTokens(features, grid, self.prefix, passes_prefix=passes_prefix)
                groups.append(Views(tokens, part.numbers, merged=merged))
        return Encoded(groups)

    def _run_merging(self, batch: Batch, merging: Merging) -> MergedViews:
        """Run the encoder on views of one grid, with tokens merged inside it."""
        if not self._merging_is_confirmed:
            one = batch.rows([0], self.image_inputs[0])
            check_merging(self.tower, partial(self.run_encoder, one), len(merging.order))
            self._merging_is_confirmed = True
        with merging_inside(self.tower, merging):
            features = self.features(batch, self.run(batch, ())).unflatten(0, (len(batch.grids), -1))
        return MergedViews(*merging.result(features))

    def run_encoder(self, batch: Batch) -> object:
        """Run the vision encoder, for recordings."""
        return self.get_features(**batch.arguments, return_dict=True)

    def _layers_for(
        self, needs: frozenset[Signal], encoder_layers: EncoderLayers, inputs: Inputs
    ) -> dict[Signal, Sequence[int]]:
        """Return the layers of the encoder that each of the signals in `needs` comes from."""
        if not needs & ATTENTION_OF_ENCODERS:
            return {}
        scored, last = self.scored_layer(inputs), self.tower.depth - 1
        layers = {
            Signal.CLS_ATTENTION: (scored,),
            Signal.KEYS: (scored,),
            Signal.ATTENTION_RECEIVED: (*encoder_layers(self.tower.depth), scored),
            Signal.LAST_CLS_ATTENTION: (last,),
            Signal.LAST_KEYS: (last,),
        }
        return {signal: layers[signal] for signal in sorted(needs & ATTENTION_OF_ENCODERS)}

    def _signals(
        self, run: Run, batch: Batch, layers: Mapping[Signal, Sequence[int]]
    ) -> dict[str, Float[Tensor, " tokens *rest"]]:
        """Return the signals of the encoder's attention for all tokens of all views of a batch."""
        of_patch = {n: self._tokens_of_patches(run, batch, n) for of_signal in layers.values() for n in of_signal}
        signals = {}
        for signal, of_signal in layers.items():
            values = [
                self.tower.signal(signal, run.recording, layer, batch.grids, self.prefix, of_patch[layer])
                for layer in of_signal
            ]
            signals[signal.value] = torch.stack(values, -1) if signal is Signal.ATTENTION_RECEIVED else values[0]
        return signals

    def _projector_of_tokens(self) -> Projector:
        """Return the projector as a function of features of any leading axes, which computes in their type.

        Raise `UserError` if it does not map each token by itself.
        """
        if not self.projects_each_token:
            raise UnfitMethod(
                f"the projector of {type(self.model).__name__} does not make one visual token of each feature of the"
                " encoder: choose a method that does not run it on single features"
            )
        values = [*self.projector.named_parameters(), *self.projector.named_buffers()]

        @cache  # a method may call the projector many times
        def parameters(dtype: torch.dtype) -> dict[str, Tensor]:
            return {name: value.to(dtype) for name, value in values if value.dtype.is_floating_point}

        def project(features: Float[Tensor, "*any encoder_dim"]) -> Float[Tensor, "*any llm_dim"]:
            projected: Tensor = functional_call(self.projector, parameters(features.dtype), (features.flatten(0, -2),))
            return projected.view(*features.shape[:-1], -1)

        return project

    def _tokens_of_patches(self, run: Run, batch: Batch, layer: int) -> Int[Tensor, "rows length"] | None:
        """Return the token that each patch of a layer makes, or `None` if it follows from the grids.

        The model itself shows it, in a further run of the encoder. The first call asks. If squares of patches make the
        tokens, later calls do not ask again; otherwise, they ask for images of other shapes.
        """
        merge = self.tower.merge(self.tower.shape(run.recording, layer), batch.grids, self.prefix)
        if self.is_confirmed and (type(self) is not Family or (merge is not None and merge == self._merge)):
            return None
        key = (layer, shape_of(batch.arguments, self.image_inputs[0]))
        if key in self._asked:
            return self._asked[key]
        with run_behind(self.get_features, self.tower, batch.arguments, layer) as behind:
            check_attention(self.tower, behind.recording, layer)
            squares = merge is not None and makes_squares(behind, self.tower, batch.grids)
            of_patch = None if squares else tokens_of_patches(behind, self.tower)
        # In one column of tokens, squares are the same in every order of the patches.
        if any(grid.cols > 1 for grid in batch.grids):
            self.is_confirmed = True
            if squares and self._merge is None:
                self._merge = merge
            if len(self._asked) >= MOST_ASKED:
                self._asked.clear()
            self._asked[key] = of_patch
        return of_patch

    def batches(self, inputs: Inputs) -> list[Batch]:
        """Return the views of all images, in batches that `get_image_features` takes.

        Override it if the views after `downsample` do not fit into one call.
        """
        grids = self.grids(inputs)
        return [Batch(self.feature_arguments(inputs), grids, range(len(grids)))]

    def feature_arguments(self, inputs: Inputs) -> InputDict:
        """Return the arguments of `get_image_features` in `inputs`."""
        names = (*self._feature_arguments, "interpolate_pos_encoding")
        return {name: inputs[name] for name in names if inputs.get(name) is not None}

    def run(self, batch: Batch, layers: Collection[int]) -> Run:
        """Run `get_image_features`, and record the attention of these layers of the encoder.

        The run ends at a projector that maps each token by itself.
        """
        outputs, called = self.tower.modules(layers) if layers else ({}, {})
        if self.projects_each_token is None and (self._find_projector() is None or self.stream_count):
            self.projects_each_token = False
        if self.projects_each_token is not False:
            called = {**called, "projector": self.projector}
            outputs = {**outputs, "projector": self.projector}
        output = None
        stop_at = "projector" if self.projects_each_token else None
        with record(outputs, called, stop_at=stop_at) as recording, self._learning(batch):
            output = self.get_features(**batch.arguments, return_dict=True)
        run = Run(output, recording, recording.inputs.get("projector"))
        if output is not None:
            self._token_field = token_field(output)
            self.features_as_list = not isinstance(output[self._token_field], Tensor)
            self._note_further_fields(output)
            self._check_streams(len(getattr(output, "deepstack_features", None) or ()))
        if self.projects_each_token is None and output is not None:
            self.projects_each_token = maps_each_token(self.projector, recording, flat(output[self._token_field]))
        return run

    def _note_further_fields(self, output: BaseModelOutputWithPooling) -> None:
        """Note that `forward` reads more in an output of this class than the visual tokens.

        The projector then does not end a run, because the model makes the further fields behind it.
        """
        if vars(output).keys() - set(ENCODER_FIELDS):
            self._output_class = type(output)
        if further_fields(output):
            self.projects_each_token = False

    def _learning(self, batch: Batch) -> AbstractContextManager[object]:
        """Return a context that turns gradients off unless the pixels or parameters learn on which a run depends.

        These are all parameters before the LLM: some models have modules beside encoder and projector, such as an
        adapter or a second encoder.
        """
        after = [self.llm, self.model.get_output_embeddings()]
        if self.projects_each_token:
            after.append(self.projector)
        others = {id(parameter) for module in after for parameter in module.parameters()}
        before = (parameter for parameter in self.model.parameters() if id(parameter) not in others)
        return learning(batch.arguments[self.image_inputs[0]], before)

    def features(self, batch: Batch, run: Run) -> Float[Tensor, "tokens dim"]:
        """Return the features of all tokens of all views at the site before the projector."""
        if self.projects_each_token and run.projector_input is not None:
            features: Tensor = run.projector_input.flatten(0, -2)
            return features
        projected: Tensor = flat(run.output[self._token_field])
        return projected

    def _check_width(self, features: Float[Tensor, "tokens dim"], site: Site) -> None:
        """Raise `UserError` if features before the projector do not have the width that a resampler was built for."""
        known = self.__dict__.get("_width_before_projector", features.shape[-1])
        if site is Site.PRE_PROJECTOR and features.shape[-1] != known:
            raise UserError(
                f"features before the projector of {type(self.model).__name__} have width {features.shape[-1]},"
                f" not {known} as its weights suggest: choose a method without trained weights"
            )

    def _check_count(self, tokens: int, batch: Batch) -> None:
        """Raise `UserError` if the encoder returned another number of tokens than the layouts have."""
        expected = sum(self._sizes_of(batch))
        if tokens != expected:
            raise UserError(
                f"the prompt has {expected} {self.modality} placeholders, but {type(self.model).__name__} makes"
                f" {tokens} visual tokens of its {self.modality}s; use the model's own processor"
            )

    def _check_streams(self, streams: int) -> None:
        """Raise `UserError` if the encoder returned another number of streams than the LLM is known to add."""
        if streams != self.stream_count:
            raise UserError(
                f"{type(self.model).__name__} adds image features after {streams} layers of its LLM, and vlmzip expects"
                f" {self.stream_count}; {ADD_A_FAMILY}"
            )

    def _check_views(self, entries: Sequence[int] | None, batch: Batch) -> None:
        """Raise `UserError` if an entry of the encoder's output does not end where a view of the layouts ends."""
        if entries is not None and not ends_with_views(entries, self._sizes_of(batch)):
            raise UserError(
                f"the {self.modality} placeholders of the prompt are not those of the {self.modality}s:"
                f" {type(self.model).__name__} makes {list(entries)} visual tokens of them;"
                " use the model's own processor"
            )

    def _sizes_of(self, batch: Batch) -> list[int]:
        """Return the number of tokens of each view."""
        return [self.prefix + grid.size for grid in batch.grids]

    def _pixels(self, batch: Batch, rows: Sequence[int]) -> Tensor:
        pixels = batch.arguments[self.image_inputs[0]]
        if pixels.ndim != 4 or len(pixels) != len(batch.grids):
            raise UnfitMethod(
                "this family's inputs are patches, not images: choose a method that does not look at pixels"
            )
        return image_of(self.vision_config, pixels[list(rows)])

    def passes_prefix(self, inputs: Inputs) -> bool:
        """Return True if the LLM gets the prefix of each view."""
        return False

    def scored_layer(self, inputs: Inputs) -> int:
        """Return the encoder layer, 0-based, whose attention scores the tokens: the deepest that gives features."""
        setting = self.setting(inputs, "vision_feature_layer")
        depth = self.tower.depth
        return depth - 1 if setting is None else max(feature_layers(setting, depth))

    def setting(self, inputs: Inputs, name: str, default: Any = None) -> Any:
        """Return a forward argument, or the config's value if there is none, as `get_image_features` does."""
        value = inputs.get(name)
        return getattr(self.model.config, name, default) if value is None else value

    @torch.no_grad()
    def encoder_attention(self, inputs: Inputs) -> EncoderAttention:
        """Return the scores by which VisionZip ranks visual tokens, for every layer of the encoder.

        The scores are [layers, tokens] for each view, in float32, from one run of the encoder. Queries and keys of all
        layers are in memory at once. If patches attend only inside windows, the scores of each window have the same
        mean: they show where attention concentrates inside windows, not between them.
        """
        (batch,), layers = self.batches(inputs), range(self.tower.depth)
        recording = self.run(batch, layers).recording
        scores = [self.tower.scores(recording, layer, batch.grids, self.prefix) for layer in layers]
        views = torch.stack(scores).split(self._sizes_of(batch), dim=1)
        cls = self.tower.has_cls(recording, batch.grids, self.prefix)
        return EncoderAttention(
            [view[:, self.prefix :] for view in views],
            [self.tower.whose(layer, cls=cls) for layer in layers],
            self.scored_layer(inputs),
        )

    def with_names_of_model(self, inputs: Inputs) -> Inputs:
        """Return a processor's outputs with the names that the model has for them now."""
        names = {old: new for old, new in self.former_names.items() if old in inputs and new in self._feature_arguments}
        return {names.get(name, name): value for name, value in inputs.items()} if names else inputs

    def layouts(self, inputs: Inputs) -> list[Layout]:
        """Return the layout of each image in `inputs`, from shapes alone, without running the encoder.

        Override it if images have several views, separators, or a prefix such as CLS. Override it
        together with `downsample` also if the inputs have no `image_grid_thw`: this method then counts placeholders,
        and smaller images do not change the prompt.
        """
        if self._has_grids:
            grids, placeholders = self._grids_of_patches(inputs)
            if self.modality == "video":
                return self._layouts_of_videos(inputs, grids, placeholders)
            if type(self) is not Family or placeholders in (None, sum(grid.size for grid in grids)):
                return Layout.of_single_views(grids)
        if VIEW_GRIDS in self.image_inputs and inputs.get(VIEW_GRIDS) is not None:
            sides = torch.as_tensor(inputs[VIEW_GRIDS]).unflatten(1, (-1, 2)).tolist()  # rows and columns of each view
            return Layout.of_views([tuple(Grid(1, *view) for view in image if all(view)) for image in sides])
        counts = placeholders_of_images(inputs["input_ids"] == self.placeholder_id, self._described(inputs))
        if views := views_of_images(self._grids_of_sizes(inputs, sum(counts)), counts):
            return Layout.of_views(views)
        tokens = tokens_of_view(inputs[self.image_inputs[0]], counts)
        return Layout.of_equal_views([(square_of(tokens or n), n // (tokens or n)) for n in counts])

    def _layouts_of_videos(self, inputs: Inputs, grids: list[Grid], placeholders: int | None) -> list[Layout]:
        """Return the layout of each video with a grid of frames, rows and columns.

        If the prompt has other numbers of placeholders, for example for the ends of rows, each frame has an equal part.
        """
        videos = grids if placeholders is None else with_joined_frames(grids, placeholders)
        if placeholders not in (None, sum(grid.size for grid in videos)):
            counts = placeholders_of_images(inputs["input_ids"] == self.placeholder_id, len(grids))
            if len(counts) == len(grids) and not any(n % grid.frames for n, grid in zip(counts, grids, strict=True)):
                frames = [square_of(n // grid.frames) for n, grid in zip(counts, grids, strict=True)]
                videos = [frame._replace(frames=grid.frames) for frame, grid in zip(frames, grids, strict=True)]
        layouts = {grid: Layout.of_frames(grid._replace(frames=1), grid.frames) for grid in dict.fromkeys(videos)}
        return [layouts[grid] for grid in videos]

    def _described(self, inputs: Inputs) -> int | None:
        """Return the number of images that inputs beside the pixels describe; `None` if they do not agree on one."""
        if inputs[self.image_inputs[0]].ndim == 5:
            return None  # each entry has the images of a row of the prompt
        if inputs[self.image_inputs[0]].ndim == 3:
            return len(inputs[self.image_inputs[0]])  # [images, patches, values]
        counts = {len(value) for name in self.image_inputs[1:] if (value := inputs.get(name)) is not None}
        return counts.pop() if len(counts) == 1 else None

    def _grids_of_patches(self, inputs: Inputs) -> tuple[list[Grid], int | None]:
        """Return the grid of each image by `image_grid_thw`, and the number of placeholders if there is a prompt.

        If the config does not name the number of patches that become one token, the prompt shows it.
        """
        sizes, side = sizes_of(inputs, *self.image_inputs[:2]), self.patches_per_side
        ids = inputs.get("input_ids")
        # The config of a family with a file is known. Resized images would not fit the prompt.
        if ids is None or type(self) is not Family:
            return grids_of(sizes, side), None
        placeholders = int((ids == self.placeholder_id).sum())
        return grids_by_prompt(sizes, side, placeholders), placeholders

    @property
    def _has_grids(self) -> bool:
        """True if the inputs are the patches of all images, and the grid of each (`image_grid_thw`)."""
        return f"{self.modality}_grid_thw" in self.image_inputs

    def _grids_of_sizes(self, inputs: Inputs, placeholders: int) -> list[Grid]:
        """Return the grid of each view by its height and width; empty if no input has them."""
        for name in PATCH_SIZES:
            if name in self.image_inputs and inputs.get(name) is not None:
                return grids_by_prompt(pad(torch.as_tensor(inputs[name]), (1, 0), value=1), 1, placeholders)
        patch = getattr(self.vision_config, "patch_size", None)
        if patch is None or "image_sizes" not in self.image_inputs or inputs.get("image_sizes") is None:
            return []
        sizes = torch.as_tensor(inputs["image_sizes"])
        side = side_in(patch) * self.patches_per_side
        return [Grid(1, height // side, width // side) for height, width in sizes.tolist()]

    @property
    def layouts_need_prompt(self) -> bool:
        """True if `layouts` counts the placeholders of a prompt."""
        return type(self).layouts is Family.layouts and "image_grid_thw" not in self.image_inputs

    def plain_counts(self, inputs: Inputs) -> list[int]:
        """Return the number of placeholders of each image: the visual tokens that the LLM gets without compression."""
        return [layout.placeholders for layout in self.layouts(inputs)]

    def grids(self, inputs: Inputs) -> list[Grid]:
        """Return the grid of each view of all images in `inputs`."""
        return [grid for layout in self.layouts(inputs) for grid in layout.views]

    def view_pixels(self, inputs: Inputs) -> Pixels | None:
        """Return the normalised pixels of each view, [views, 3, height, width] or a list of [3, height, width].

        Override it if the first of `image_inputs` is not such a batch, nor one for each row of the prompt. Return
        `None` if the inputs are patches.
        """
        pixels = inputs[self.image_inputs[0]]
        if self._has_grids or (isinstance(pixels, Tensor) and pixels.ndim < 4):
            return None
        of_views: Pixels = pixels.flatten(0, 1) if isinstance(pixels, Tensor) and pixels.ndim == 5 else pixels
        return of_views

    def downsample(self, inputs: Inputs, grids: Sequence[Grid]) -> InputDict:
        """Return image inputs with the views resized to `grids`, one grid per view. They are for `encode` only.

        Override it to support compressors at the site `pixels`; this method raises `UserError`. `layouts` must then
        follow from the image inputs, not from the prompt. The families use antialiased bicubic interpolation in
        float32, as their processors do, so the result equals the smaller image that the processor would have made,
        except for rounding to 8 bits.
        """
        raise UnfitMethod(f"vlmzip cannot make smaller images for {type(self.model).__name__}: choose another method")

    def token_pixels(self, inputs: Inputs) -> Encoded:
        """Return all views, with the pixels in [0, 1] of the patches that make each visual token as its features.

        Override it, `encode_part` and `encodes_parts` to support compressors that drop patches before the encoder; both
        methods raise `UserError` here.
        """
        raise UnfitMethod(NO_PARTS.format(type(self.model).__name__))

    def encode_part(self, inputs: Inputs, kept: Bool[Tensor, " tokens"]) -> Encoded:
        """Return the visual tokens marked in `kept` after the projector, from a run of the encoder on their patches.

        `kept` marks tokens of all images, one image after another. The result has one view for each image, a row of its
        kept tokens. A token is as if the encoder had run on all patches, with attention to those of kept tokens only.
        """
        raise UnfitMethod(NO_PARTS.format(type(self.model).__name__))

    def choose_images(self, inputs: Inputs, chosen: list[int]) -> InputDict:
        """Return the image inputs of the images whose 0-based numbers are in `chosen`.

        Override it if an image input has neither a row for each image or view nor the patches of all images.
        """
        names = [name for name in self.image_inputs if inputs.get(name) is not None]
        if not self._has_grids:
            counts = [len(layout.views) for layout in self.layouts(inputs)]
            image_of_view = [image for image, count in enumerate(counts) for _ in range(count)]
            # SmolVLM has [rows of the prompt, views, 3, height, width], LLaVA-NeXT [images, views, 3, height, width].
            pixels = inputs[self.image_inputs[0]]
            by_row = pixels.ndim == 5 and len(pixels) != len(counts)
            values = {name: torch.as_tensor(inputs[name]) for name in names}
            values = {name: value.flatten(0, 1) for name, value in values.items()} if by_row else values
            rows = {}
            for name, value in values.items():
                images = image_of_view if len(value) == len(image_of_view) else range(len(counts))
                if len(value) != len(images):
                    raise UserError(
                        f"vlmzip does not know which part of {name} belongs to which image:"
                        " continue a conversation with the new images alone"
                    )
                rows[name] = [row for row, image in enumerate(images) if image in chosen]
            kept = {name: value[rows[name]] for name, value in values.items()}
            return {name: value[None] for name, value in kept.items()} if by_row else kept
        first, *others = names
        patches = inputs[first].split(sizes_of(inputs, *self.image_inputs[:2]).prod(-1).tolist())
        others_chosen = {name: torch.as_tensor(inputs[name])[chosen] for name in others}
        return {first: torch.cat([patches[n] for n in chosen]), **others_chosen}

    def feature_width(self, site: Site) -> int:
        """Return the number of features of a visual token at `site`.

        Override it if the encoder's features are wider than its hidden states, such as those of several layers.
        """
        if site is Site.PRE_PROJECTOR and type(self) is Family:
            return self._width_before_projector
        if site is Site.POST_PROJECTOR or not self.projects_each_token:
            return int(self.llm_config.hidden_size)
        return int(self.vision_config.hidden_size)

    @cached_property
    def _width_before_projector(self) -> int:
        """The width of features at the site before the projector, found without a run of the encoder.

        If the projector maps each token by itself, it is the width of the projector's input, else that of its output.
        """
        projector = self._find_projector()
        width = None if projector is None or self.stream_count else width_before(projector)
        return int(self.llm_config.hidden_size) if width is None else width

    def project(self, features: Float[Tensor, "tokens dim"], site: Site) -> Float[Tensor, "tokens llm_dim"]:
        """Return the inputs of the LLM, [tokens, llm_dim], for compressed tokens with their features at `site`.

        `features` has the tokens of all images, one after another.
        """
        if site is Site.POST_PROJECTOR or not self.projects_each_token:
            return features
        projected: Tensor = self.projector(features)
        return projected

    def original_positions(
        self, inputs: Inputs, mask: Int[Tensor, "batch length"]
    ) -> tuple[Int[Tensor, "*axes batch length"], Int[Tensor, " batch"]]:
        """Return the positions of the uncompressed prompt, counted from 0, and the position of each row's next token.

        Positions are [batch, length], with `position_axes` before them if there are several axes; next positions are
        [batch]. `mask` is the attention mask, 0 for padding. If positions have several axes, the model's own
        `get_rope_index` gives those of the full grids, which VisionZip's authors slice in the same way.
        """
        if not self.position_axes:
            return (mask.long().cumsum(-1) - 1).clamp(min=0), mask.sum(-1)
        ids = inputs["input_ids"]
        # The type of text is 0, of images 1, of videos 2.
        types = sum(number * (ids == each.placeholder_id).int() for number, each in enumerate(self.modalities, start=1))
        rope_index = method_of(self.model, "get_rope_index")
        positions, next_positions = rope_positions(rope_index, inputs, types, mask, self._adjacent(inputs))
        if positions.shape[:-2] != self.position_axes:
            raise UserError(
                f"vlmzip does not know the positions of {type(self.model).__name__}, which have"
                f" {list(positions.shape[:-2])} axes; it knows {list(self.position_axes)}"
            )
        return positions, next_positions

    def _adjacent(self, inputs: Inputs) -> list[tuple[int, int]]:
        """Return row and column of the first token of each image that directly follows another one of its kind."""
        adjacent: list[tuple[int, int]] = []
        for each in self.present_in(inputs):
            is_placeholder = inputs["input_ids"] == each.placeholder_id
            follows = pad(is_placeholder, (1, 0))[:, :-1]
            firsts = list(accumulate(each.plain_counts(inputs), initial=0))
            places = is_placeholder.nonzero()
            if firsts.pop() == len(places):
                row, column = places[firsts].unbind(1)
                is_adjacent = follows[row, column]
                adjacent += zip(row[is_adjacent].tolist(), column[is_adjacent].tolist(), strict=True)
        return adjacent

    def forward_positions(self, positions: Int[Tensor, "*axes batch length"]) -> Int[Tensor, "*axes batch length"]:
        """Return the `position_ids` that the model's `forward` takes for positions counted from 0.

        The shape does not change. Override it if `forward` counts from another number. `generate` always takes
        positions counted from 0.
        """
        return positions

    def encoder_outputs(
        self,
        features: list[Float[Tensor, "_ llm_dim"]],
        streams: Sequence[tuple[Tensor, ...]] = (),
        further: Mapping[str, Any] | None = None,
    ) -> dict[str, BaseModelOutputWithPooling]:
        """Return `mm_encoder_outputs` for the model's `forward` and `generate`.

        `features` has the projected tokens of each image. `streams` has, for each image, the features that layers of
        the LLM add to the same tokens, one tensor per layer (deepstack). It is empty in families without deepstack.
        `further` has what else `forward` reads in the output (`Encoded.further`).
        """
        # The model scatters a tensor over all placeholders at once, so one row can hold images of different lengths.
        # `generate` takes the first axis for images when it copies rows for beams or several sequences. With one token
        # per entry, it finds the tokens of each row: [all, 1, llm_dim].
        form: Any = features if self.features_as_list else torch.cat(features)[:, None]
        fields, output_class = dict(further or {}), self._output_class
        if self.stream_count:
            fields["deepstack_features"] = [list(layer) for layer in zip(*streams, strict=True)]
            output_class = WithStreams if output_class is BaseModelOutputWithPooling else output_class
        return {self.modality: output_class(**{self._token_field: form}, **fields)}

    def queries_and_keys(
        self,
        layer: nn.Module,
        hidden: Float[Tensor, "batch length dim"],
        arguments: InputDict,
        rows: Int[Tensor, "batch queries"],
    ) -> QueriesAndKeys:
        """Return the rotated queries of the tokens in `rows` and the rotated keys of all tokens in a decoder layer.

        `hidden` is the input of the layer, and `arguments` has its keyword arguments. Raise `UserError` if the layer's
        attention does not follow from queries and keys. Override it for attention that is of such a kind.
        """
        if is_direct(layer):
            return queries_and_keys(layer, hidden, arguments, rows)
        record = recorded(layer, hidden, arguments)
        mask, length = arguments.get("attention_mask"), record.key.shape[2]
        knows_all_keys = length > 1 and (mask is None or mask.shape[-1] == length)  # none are in the KV cache
        if knows_all_keys and layer not in self._confirmed_layers:
            check_llm_attention(layer, record, mask)
            self._confirmed_layers.add(layer)
        return queries_in(record, rows)
