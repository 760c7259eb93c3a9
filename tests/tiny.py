"""Tiny models with random weights, and inputs for them: what all families share. tests/families has each of them."""

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel

from vlmzip import Site, UserError
from vlmzip.models import family_of

IMAGE_TOKEN, VIDEO_TOKEN, PAD, VOCABULARY, SIDE, PATCH = 99, 98, 0, 100, 48, 8
TOKENS = (SIDE // PATCH) ** 2

#: For configs: a ViT of 3 layers and width 32 that makes 36 tokens, and an LLM of 4 layers and width 48.
VIT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=PATCH
)
LLM = dict(
    hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2,
    vocab_size=VOCABULARY, pad_token_id=PAD, max_position_embeddings=512,
)  # fmt: skip

#: Before 5.19 transformers gives copies of a row the images of its neighbours: refused, where a row has several.
WRONG_COPIES = Version(transformers.__version__) < Version("5.19")
wrong_copies = pytest.mark.xfail(WRONG_COPIES, raises=UserError, strict=True, reason="refused before 5.19")


class Family:
    """A tiny model of a family, and inputs for it. A class in tests/families says what is different in that family."""

    name: ClassVar[str]
    """What its file is called."""
    leads: ClassVar[bool] = False
    """Quick runs have every test of this family, since its encoder, layout or positions differ from those of the others
    that lead. Of a family that does not lead they have the tests marked `every_family`. A subclass does not inherit it.
    """
    every_case: ClassVar[bool] = False
    """Quick runs have every case of a `crossed` test with this family. A subclass does not inherit it."""
    model_class: ClassVar[type[PreTrainedModel]]
    grids: ClassVar[tuple[tuple[int, int], ...]] = ((SIDE // PATCH, SIDE // PATCH),)
    """Rows and columns of the visual tokens of image 0, 1, 2, …; the last repeats."""

    since: ClassVar[str] = "5.18"
    """The first version of transformers that the tests run it with."""
    seed: ClassVar[int] = 0
    """Of the weights. Several tests need answers that differ from image to image and end at different lengths."""

    clips: ClassVar[tuple[tuple[int, int, int], ...]] = ()
    """Frames, rows and columns of the visual tokens of video 0, 1, 2, …; the last repeats. Empty: it takes no video."""
    clip_prefix: ClassVar[int] = 0
    """Tokens before the grid of each frame of a video that the LLM sees."""

    # Facts about the family, which tests compare with what happens.
    one_size: ClassVar[bool] = True
    """All images go to the encoder as [image, 3, SIDE, SIDE]."""
    feature_layers: ClassVar[tuple[int, ...]] = (-2,)
    """The layers of the encoder whose hidden states are the features, side by side."""
    scored_by: ClassVar[str] = "CLS"
    """Whose attention in the encoder scores the visual tokens."""
    windowed: ClassVar[bool] = False
    """Some layers of the encoder attend within windows."""
    sees_prompt_both_ways: ClassVar[bool] = False
    """The first prompt is not causal: its later tokens change what earlier ones see."""
    generates_from_embeddings: ClassVar[bool] = True
    """`generate` takes `inputs_embeds`."""
    projects_padding: ClassVar[bool] = False
    """The plain model projects tokens that its LLM does not see. Images from the fourth on have none."""
    first_position: ClassVar[int] = 0
    position_axes: ClassVar[tuple[int, ...]] = ()
    """What `position_ids` have before [batch, length]."""
    packs_rows: ClassVar[bool] = True
    """In training, several rows may be packed into one."""

    @classmethod
    def config(cls, **settings):
        """Return the config of the tiny model; `settings` are those of the model, beside encoder and LLM."""
        raise NotImplementedError

    @classmethod
    def processor(cls):
        """Return a processor made of its parts: it reads no file of a hub and needs no torchvision."""
        raise NotImplementedError

    @classmethod
    def build(cls, attention: str = "sdpa", **settings) -> PreTrainedModel:
        """Return a new model; it has the same weights every time."""
        torch.manual_seed(cls.seed)
        return with_large_weights(cls.model_class(cls.config(**settings)), attention, cls.seed)

    @cached_property
    def model(self) -> PreTrainedModel:
        return self.build()

    # --- inputs ---

    @staticmethod
    def of_image(values: Sequence, image: int):
        """Return the value for an image from one for image 0, 1, 2, …; the last repeats."""
        return values[min(image, len(values) - 1)]

    def grid(self, image: int) -> tuple[int, int]:
        return self.of_image(self.grids, image)

    def tokens(self, image: int) -> int:
        """Return how many placeholders an image has in the prompt."""
        rows, cols = self.grid(image)
        return rows * cols

    def views(self, image: int) -> int:
        """Return how many views the encoder sees of an image."""
        return 1

    def separators(self, image: int) -> list[int]:
        """Return which placeholders of an image hold no token but the end of a row of tiles."""
        return []

    def pixels(self, images: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the encoder's inputs for some images. Image n always looks the same."""
        return {"pixel_values": torch.stack([noise(image, 3, SIDE, SIDE) for image in images])}

    def clip(self, video: int) -> tuple[int, int, int]:
        return self.of_image(self.clips, video)

    def video_ids(self, video: int) -> list[int]:
        """Return the part of a prompt that stands for a video."""
        frames, rows, cols = self.clip(video)
        return [VIDEO_TOKEN] * (frames * (self.clip_prefix + rows * cols))

    def videos(self, videos: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the encoder's inputs for some videos. Video n always looks the same."""
        frames = [noise(50 + video, self.clip(video)[0], 3, SIDE, SIDE) for video in videos]
        return {"pixel_values_videos": torch.stack(frames)}

    def token_types(self, ids: torch.Tensor, prompt_length: int) -> dict[str, torch.Tensor]:
        """Return what the processor says about each token. Tokens behind `prompt_length` belong to later turns."""
        return {}

    def pixels_of_views(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the pixels of all views, [view, 3, SIDE, SIDE]."""
        return inputs["pixel_values"]

    def encoded(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return what the encoder puts out, from transformers' own hidden states."""
        out = self.model.model.vision_tower(self.pixels_of_views(inputs), output_hidden_states=True)
        return torch.cat([out.hidden_states[layer] for layer in self.feature_layers], -1)

    def ids(self, *rows: list[int | str], first_image: int = 0, first_video: int = 0) -> list[list[int]]:
        """Token ids of prompts; "image" and "video" stand for the placeholders of the next one."""
        out, image, video = [], first_image, first_video
        for row in rows:
            ids: list[int] = []
            for part in row:
                if part == "image":
                    ids += [IMAGE_TOKEN] * self.tokens(image)
                    image += 1
                elif part == "video":
                    ids += self.video_ids(video)
                    video += 1
                else:
                    ids.append(int(part))
            out.append(ids)
        return out

    def images(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """Return the inputs of `count` images from `first` on."""
        return self.pixels(range(first, first + count)) if count else {}

    def batch(
        self, *rows: list[int | str], pad: str = "left", first_image: int = 0, first_video: int = 0
    ) -> dict[str, torch.Tensor]:
        """Return padded model inputs for prompts with images and videos."""
        inputs = batch(*self.ids(*rows, first_image=first_image, first_video=first_video), pad=pad)
        inputs |= self.images(first_image, sum(row.count("image") for row in rows))
        if videos := sum(row.count("video") for row in rows):
            inputs |= self.videos(range(first_video, first_video + videos))
        return inputs | self.token_types(inputs["input_ids"], inputs["input_ids"].shape[1])


def skip_without(family: Family, site: Site) -> None:
    """Skip a test about compressors at a site that the family does not have."""
    if site not in family_of(family.model).sites:
        pytest.skip(f"{family.name} has no site {site}")


def noise(image: int, *shape: int) -> torch.Tensor:
    """Return the pixels of image number `image`."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 + image))


def prompt(*parts: int | str, tokens: int = TOKENS) -> list[int]:
    """Token ids; the word "image" stands for one image's placeholders."""
    ids: list[int] = []
    for part in parts:
        ids += [IMAGE_TOKEN] * tokens if part == "image" else [part]
    return ids


def batch(*rows: list[int], images: int = 0, pad: str = "left", seed: int = 1) -> dict[str, torch.Tensor]:
    """Model inputs for prompts of different lengths, with random images."""
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap = longest - len(row)
        ids.append([PAD] * gap + row if pad == "left" else row + [PAD] * gap)
        mask.append([0] * gap + [1] * len(row) if pad == "left" else [1] * len(row) + [0] * gap)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    if images:
        generator = torch.Generator().manual_seed(seed)
        inputs["pixel_values"] = torch.randn(images, 3, SIDE, SIDE, generator=generator)
    return inputs


def tiny_tokenizer():
    """Words are numbers and a few letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<s>": 1, "</s>": 2, "<unk>": 3, "<video>": VIDEO_TOKEN, "<image>": IMAGE_TOKEN}
    words |= {f"w{n}": n for n in range(4, VIDEO_TOKEN)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )


def wider(model: PreTrainedModel) -> PreTrainedModel:
    """A model like this one whose widths are multiples of 64, as 4-bit weights need them; its weights are others."""
    config = copy.deepcopy(model.config)
    for part in (config, config.vision_config, config.text_config):
        for name, value in {"hidden_size": 64, "embed_dim": 64, "intermediate_size": 128, "projection_dim": 64}.items():
            if name in vars(part):
                setattr(part, name, value)
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 8, 4
    config.vision_config.out_hidden_size = 64
    if "aux_config" in vars(config):  # a second encoder
        config.aux_config.hidden_sizes = [64] * 4
    torch.manual_seed(0)
    return with_large_weights(type(model)(config), "sdpa")


def with_large_weights(model: PreTrainedModel, attention: str, seed: int = 0) -> PreTrainedModel:
    """Weights of the usual 0.02 make all tokens alike; larger ones make attention and answers depend on the image."""
    model.eval().set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                vision = "_tower" in name or "visual" in name
                parameter.normal_(0, 0.3 if vision else 0.15, generator=generator)
        # No trained model answers with a placeholder or a marker of images.
        model.get_output_embeddings().weight[96:] = 0
    return model
