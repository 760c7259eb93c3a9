"""Images of a store in requests: `store:cat.jpg` stands for an image that was encoded before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vlmzip import spec
from vlmzip.compressor import Compressor
from vlmzip.errors import Damaged, UnknownImage, UserError
from vlmzip.models.family import Family
from vlmzip.processor import InputDict
from vlmzip.runtime.compress import counts_by_layer
from vlmzip.runtime.earlier_images import ARGUMENT, EarlierImages
from vlmzip.runtime.fitting import before_the_llm, fitted, inside_the_llm
from vlmzip.runtime.loading import Loaded
from vlmzip.serving.server.counting import ImageCount, TokenCount
from vlmzip.serving.server.errors import RequestError

#: How the address of an image of the store begins.
SCHEME = "store:"


class ImageStore(Protocol):
    """A store of compressed images, such as `vlmzip.serving.store.Store`. A name is looked up, and never a path."""

    @property
    def compressor(self) -> Compressor: ...

    def __contains__(self, name: object) -> bool: ...

    def inputs(self, loaded: Loaded, prompts: Sequence[str], names: Sequence[Sequence[str]]) -> InputDict:
        """Return the inputs of prompts. Raise `UnknownImage`, or `Damaged` for an image that cannot be read."""


def stored_names(urls: Sequence[str], store: ImageStore | None) -> list[str] | None:
    """Return the names of a request's images in the store; `None` if its images are not from there."""
    names = [url.removeprefix(SCHEME) for url in urls if url.startswith(SCHEME)]
    if not names:
        return None
    if store is None:
        raise _refused("this server has no store of images: send them as URLs like data:image/png;base64,…")
    if len(names) < len(urls):
        raise _refused("this request has stored images and others; send them in separate requests")
    return names


def compressor_for(chosen: Compressor, store: ImageStore, family: Family, *, is_default: bool) -> Compressor:
    """Return the compressor for a request about stored images: `chosen`, or the store's by default."""
    if before_the_llm(chosen) == before_the_llm(store.compressor) and chosen.positions == store.compressor.positions:
        return chosen
    if is_default:
        return fitted(store.compressor, family)
    made = spec.write(store.compressor)
    inside = [stage for stage in inside_the_llm(chosen) if stage.positions == store.compressor.positions]
    further = spec.write(spec.joined(inside)) if inside else "fastv(keep=9)"
    message = (
        f"the images of the store were compressed by {made}: leave out method and keep, or add a method inside the LLM:"
        f' {{"method": "{made}+{further}"}}'
    )
    raise RequestError(message, code="invalid_method", param="vlmzip.method")


def stored_inputs(loaded: Loaded, store: ImageStore, prompt: str, names: Sequence[str]) -> InputDict:
    """Return the inputs of a prompt about stored images. Raise `RequestError` for unknown and damaged images."""
    try:
        return store.inputs(loaded, [prompt], [names])
    except UnknownImage as error:
        # The whole message can have paths and the names of other images: it is for the operator only.
        missing = next((name for name in names if name not in store), "")
        message = f"the store has no image {missing[:200]!r}"
        if missing.startswith("//") and (name := missing.strip("/")) in store:
            message += f"; write {SCHEME}{name}, without //"
        raise RequestError(message, 404, code="image_not_found", param="messages", logged=str(error)) from None
    except Damaged as error:
        message = "a stored image of this request is damaged; the server's log says which"
        raise RequestError(message, 500, code="image_damaged", logged=str(error)) from None
    except UserError as error:
        raise _refused(str(error)) from None


def count_stored(family: Family, inputs: InputDict, compressor: Compressor) -> TokenCount:
    """Return the tokens of a prompt about stored images."""
    earlier: EarlierImages = inputs[ARGUMENT]
    reports = [image.report for image in earlier.images]
    by_layer = counts_by_layer(
        [report.layout for report in reports], compressor, len(family.decoder_layers), family.first_free_layer
    )
    images = []
    for report, layers in zip(reports, by_layer, strict=True):
        inside = None if layers is None else layers[-1]
        last = inside if inside_the_llm(compressor) else report.after
        images.append(ImageCount(report.before, report.after, report.after, last))
    text = inputs["input_ids"].shape[1] - sum(image.before for image in images)
    return TokenCount(compressor.name(), spec.write(compressor, label=True), text, tuple(images))


def _refused(message: str) -> RequestError:
    return RequestError(message, code="invalid_image_url", param="messages")
