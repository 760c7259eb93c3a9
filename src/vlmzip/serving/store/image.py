"""The compressed tokens of one image, as a dict of tensors that a store keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlmzip.json_text import write_line
from vlmzip.models.layout import Layout
from vlmzip.runtime.report import CompressedImage, ImageReport
from vlmzip.visual_tokens import Grid


@dataclass(frozen=True)
class Described:
    """The model's inputs for an image without the values of its pixels: a family counts positions from them."""

    inputs: dict[str, Tensor]
    """The inputs beside the pixels, such as `image_grid_thw`, with one row."""
    pixels: tuple[int, ...]
    """The shape of the pixels."""


@dataclass(frozen=True)
class StoredImage:
    """The compressed tokens of one image, and all else that a prompt about it needs. Tensors are on the CPU."""

    features: Float[Tensor, "tokens llm_dim"]
    """The projected tokens in the order in which the LLM gets them."""
    streams: tuple[Float[Tensor, "tokens stream_dim"], ...]
    """Features that layers of the LLM add to the same tokens (deepstack), one tensor for each layer."""
    places: Int[Tensor, " tokens"]
    """The placeholder before compression, 0-based, that gives each token its position."""
    layout: Layout
    """The layout of the image before compression."""
    is_whole: bool
    """Whether all tokens remain and still form the layout's grids."""
    prompt: dict[str, Int[Tensor, " length"]]
    """The part of a prompt that stands for the image before compression: `input_ids`, and token types if there are."""
    described: Described
    smaller: Described | None = None
    """The image as the encoder saw it, if the compressor made it smaller."""

    @classmethod
    def of(
        cls, image: CompressedImage, prompt: dict[str, Tensor], described: Described, smaller: Described | None
    ) -> StoredImage:
        """Return the image to store for an image that was compressed."""
        return cls(
            image.features.cpu(),
            tuple(stream.cpu() for stream in image.streams),
            torch.tensor(image.places, dtype=torch.int32),
            image.report.layout,
            image.left is not None,
            prompt,
            described,
            smaller,
        )

    def compressed(self, layers: int, device: torch.device, dtype: torch.dtype) -> CompressedImage:
        """Return the image on its way to an LLM of `layers` layers."""
        layout, after = self.layout, len(self.places)
        report = ImageReport(-1, layout.placeholders, after, (after,) * layers, None, layout, None)
        streams = tuple(stream.to(device, dtype) for stream in self.streams)
        left = layout.as_seen if self.is_whole else None
        features = self.features.to(device, dtype)
        return CompressedImage(features, streams, torch.arange(after), self.places.tolist(), report, left, {})

    @property
    def size(self) -> int:
        """Return the bytes of the visual tokens."""
        return sum(values.nbytes for values in (self.features, *self.streams))

    def tensors(self) -> dict[str, Tensor]:
        """Return all content by name."""
        layout = self.layout
        tensors = {
            "features": self.features,
            **{f"stream.{number}": stream for number, stream in enumerate(self.streams)},
            "places": self.places,
            "layout.views": torch.tensor(layout.views, dtype=torch.int32),
            "layout.slots": layout.slots.int(),
            "layout.prefix": torch.tensor(layout.prefix, dtype=torch.int32),
            "whole": torch.tensor(self.is_whole),
            **{f"prompt.{name}": values for name, values in self.prompt.items()},
        }
        for kind, described in (("image", self.described), ("smaller", self.smaller)):
            if described is not None:
                tensors[f"{kind}.pixels"] = torch.tensor(described.pixels, dtype=torch.int64)
                tensors |= {f"{kind}.inputs.{name}": values for name, values in described.inputs.items()}
        return {name: values.contiguous() for name, values in tensors.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> StoredImage:
        """Return the image of `tensors()`."""
        views = tuple(Grid(*view) for view in tensors["layout.views"].tolist())
        layout = Layout(views, tensors["layout.slots"].long(), int(tensors["layout.prefix"]))
        streams = _under("stream.", tensors)
        described = {kind: _described(_under(f"{kind}.", tensors)) for kind in ("image", "smaller")}
        assert described["image"] is not None
        return cls(
            tensors["features"],
            tuple(streams[str(number)] for number in range(len(streams))),
            tensors["places"],
            layout,
            bool(tensors["whole"]),
            _under("prompt.", tensors),
            described["image"],
            described["smaller"],
        )


def checksum(row: Mapping[str, object], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a row of the index and of the names, types, shapes and bytes of its image's tensors."""
    digest = hashlib.sha256(write_line(dict(sorted(row.items()))).encode())
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _described(tensors: Mapping[str, Tensor]) -> Described | None:
    if "pixels" not in tensors:
        return None
    return Described(_under("inputs.", tensors), tuple(tensors["pixels"].tolist()))


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): values for name, values in tensors.items() if name.startswith(prefix)}
