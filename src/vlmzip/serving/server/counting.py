"""The number of tokens of a request. It follows from shapes, so no model runs."""

from __future__ import annotations

from dataclasses import dataclass

from vlmzip import spec
from vlmzip.compressor import Compressor
from vlmzip.models.family import Family
from vlmzip.processor import Inputs
from vlmzip.runtime.compress import counts_by_layer, least_counts


@dataclass(frozen=True)
class ImageCount:
    """The visual tokens of an image, or of all images of a request."""

    before: int
    """Without compression."""
    least: int
    """The fewest that can enter the LLM."""
    most: int
    """The most that can enter the LLM; equal to `least` if the number follows from shapes."""
    last_layer: int | None
    """Those at the last layer of the LLM; `None` if they depend on the content of the image."""

    def plus(self, text: int) -> ImageCount:
        """Return the tokens of a prompt with these visual tokens and `text` text tokens."""
        last = None if self.last_layer is None else self.last_layer + text
        return ImageCount(self.before + text, self.least + text, self.most + text, last)

    def content(self) -> dict[str, object]:
        """Return the JSON of these counts."""
        after = self.least if self.least == self.most else {"least": self.least, "most": self.most}
        return {"before": self.before, "after": after, "last_layer": self.last_layer}


@dataclass(frozen=True)
class TokenCount:
    """The tokens of a request."""

    name: str
    """The name of the method."""
    method: str
    """The method with its settings, as a spec."""
    text: int
    """Text tokens of the prompt."""
    images: tuple[ImageCount, ...]

    @property
    def visual(self) -> ImageCount:
        """Return the visual tokens of all images."""
        last = [image.last_layer for image in self.images]
        before, least, most = (sum(getattr(i, name) for i in self.images) for name in ("before", "least", "most"))
        return ImageCount(before, least, most, None if None in last else sum(filter(None, last)))

    def content(self) -> dict[str, object]:
        """Return the JSON of /v1/tokens and of `vlmzip tokens`. The prompt has the tokens that enter the LLM."""
        visual = self.visual
        return {
            "method": self.method,
            "exact": visual.least == visual.most,
            "text_tokens": self.text,
            "visual_tokens": visual.content(),
            "prompt_tokens": visual.plus(self.text).content(),
            "images": [image.content() for image in self.images],
        }


def count_tokens(family: Family, inputs: Inputs, compressor: Compressor) -> TokenCount:
    """Return the tokens of a prompt from the outputs of its processor. `compressor` must fit the model."""
    layouts = family.layouts(inputs) if family.present_in(inputs) else []
    entering = counts_by_layer(layouts, compressor, layers=1)
    by_layer = counts_by_layer(layouts, compressor, len(family.decoder_layers), family.first_free_layer)
    images = []
    for layout, least, known, layers in zip(
        layouts, least_counts(layouts, compressor), entering, by_layer, strict=True
    ):
        most = layout.placeholders if known is None else known[0]
        last = None if layers is None else layers[-1]
        images.append(ImageCount(layout.placeholders, least if known is None else most, most, last))
    text = inputs["input_ids"].shape[1] - sum(image.before for image in images)
    return TokenCount(compressor.name(), spec.write(compressor, label=True), text, tuple(images))
