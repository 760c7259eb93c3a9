"""What an answer depends on, in short texts that are kept beside answers and compared when a run goes on.

An answer that was kept is used again only where all of this is the same. `docs/going_on.md` has the list, and what is
left out of it and why.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

import vlmzip
from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.files import is_folder
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.imported import files_of

#: Parts of this package that answers come from.
CODE = (
    "compressor.py", "keep.py", "lab/analyses", "lab/lmms", "lab/study.py", "methods", "models", "resampler.py",
    "runtime", "sites.py", "token_map.py", "visual_tokens.py",
)  # fmt: skip
#: What configurations say of the files that they come from, and not of the model.
ORIGIN = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "_from_model_config")
#: Tensors whose digests are computed at the same time.
TOGETHER = 8


def of_name(name: str) -> dict[str, str]:
    """Return the name of a model, for comparing; nothing for a local folder, which can be written in many ways."""
    return {} if is_folder(Path(name)) else {"model": name}


def of_model(model: Any, processor: Any) -> dict[str, str]:
    """Return what all answers of a model depend on, beside the question: its weights and settings, and the code."""
    return {
        "weights": of_weights(model.state_dict()),
        "configuration": of_json(_without_origin(model.config.to_dict())),
        "generation settings": of_json(_without_origin(model.generation_config.to_dict())),
        "attention": str(model.config._attn_implementation),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        **of_processor(processor),
        "code of vlmzip": of_code(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def of_processor(processor: Any) -> dict[str, str]:
    """Return what the inputs of a model depend on, beside image and text.

    The class counts as well: an image processor of another backend rounds in another way, under the same settings.
    """
    settings = _without_origin(processor.to_dict())
    images = settings.pop("image_processor", None) or processor.image_processor.to_dict()
    return {
        "tokenizer": of_json(_tokenizer(processor.tokenizer)),
        "chat template": of_json([getattr(processor, "chat_template", None), processor.tokenizer.chat_template]),
        "image processor": of_json([type(processor.image_processor).__qualname__, _without_origin(images)]),
        "processor": of_json([type(processor).__qualname__, settings]),
    }


def of_weights(weights: Mapping[str, Tensor]) -> str:
    """Return the digest of all names, shapes and values."""
    with ThreadPoolExecutor(TOGETHER) as pool:
        digests = pool.map(_tensor, weights.values())
        return _digest(f"{name} {digest}" for name, digest in zip(weights, digests, strict=True))


def of_method(compressed: CompressedModel) -> dict[str, str]:
    """Return what answers depend on beside a method's settings: code from outside of this package, and weights."""
    weights = compressed.resampler.state_dict() if compressed.resampler is not None else {}
    return {
        "method code": of_method_code(compressed.compressor),
        "method weights": of_weights(weights) if weights else "",
    }


def of_method_code(compressor: Compressor) -> str:
    """Return the digest of the files of a method's classes and of what they import; empty for this package's own."""
    classes = {cls for stage in compressor.stages() for cls in type(stage).__mro__}
    files = {file for cls in classes for file in files_of(cls)}
    return of_files(sorted(files)) if files else ""


def of_code(*more: str) -> str:
    """Return the digest of this package's own files, as far as answers come from them, and of `more`."""
    root = Path(vlmzip.__file__).parent
    places = [root / name for name in (*CODE, *more)]
    return of_files(sorted(file for place in places for file in (place.rglob("*.py") if place.is_dir() else [place])))


def of_image(image: Image.Image) -> str:
    """Return the digest of an image's pixels: a file that shows the same image gives the same."""
    return _digest([f"{image.mode} {image.size}", image.tobytes()])


def of_images(images: Iterable[Image.Image | str]) -> str:
    """Return the digest of several images; of a file, all that is in it, which takes less time than decoding it."""
    return _digest(of_files([Path(image)]) if isinstance(image, str) else of_image(image) for image in images)


def of_files(files: Iterable[Path]) -> str:
    """Return the digest of what is in files. Raises `UserError` for one that cannot be read."""

    def contents() -> Iterator[bytes]:
        for path in files:
            try:
                with path.open("rb") as file:
                    yield hashlib.file_digest(file, "sha256").digest()
            except OSError as error:
                raise UserError(f"{str(path)!r} cannot be read: {error.strerror or error}") from None

    return _digest(contents())


def of_json(content: Any) -> str:
    return _digest([json.dumps(content, sort_keys=True, default=str)])


def refuse_changed(what: str, known: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `UserError`, which begins with `what`, where something differs from what was noted, and name it."""
    if missing := [name for name in now if name not in known]:
        raise UserError(f"{what}, or of an earlier vlmzip: it does not say its {missing[0]}; give another --out")
    other = [f"{name} is {known[name]!r} there and {now[name]!r} here" for name in now if known[name] != now[name]]
    if other:
        raise UserError(f"{what}: {'; '.join(other)}; give another --out")


def _digest(parts: Iterable[str | bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        found.update(len(content).to_bytes(8, "big") + content)
    return found.hexdigest()[:16]


def _tensor(weights: Tensor) -> str:
    said = f"{weights.dtype} {tuple(weights.shape)}"
    if weights.is_meta:  # kept elsewhere, or not at all
        return said
    values = weights.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return f"{said} {hashlib.sha256(values.numpy().data).hexdigest()}"


def _tokenizer(tokenizer: Any) -> Any:
    """All that makes tokens of a text, and text of tokens. Padding and truncation are the last call's, not its own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    return [
        type(tokenizer).__qualname__,
        {name: part for name, part in words.items() if name not in ("padding", "truncation")},
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer.clean_up_tokenization_spaces,
    ]


def _without_origin(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _without_origin(part) for name, part in content.items() if name not in ORIGIN}
    return [_without_origin(part) for part in content] if isinstance(content, list | tuple) else content
