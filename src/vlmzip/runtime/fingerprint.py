"""Fingerprints of everything that an answer depends on, stored with the answers.

A resumed run reuses a stored answer only if all fingerprints are the same. `docs/resuming.md` lists what is included,
what is left out, and why.
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
from transformers import PreTrainedTokenizerBase

import vlmzip
from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.files import is_folder
from vlmzip.processor import Processor
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.imported import files_of

#: The parts of this package that affect answers.
CODE = (
    "compressor.py", "keep.py", "lab/analyses", "lab/answers.py", "lab/attacher.py", "lab/lmms", "lab/study.py",
    "methods", "models", "resampler.py", "runtime", "sites.py", "token_map.py", "visual_tokens.py",
)  # fmt: skip
#: Settings that describe the files a configuration comes from, not the model.
ORIGIN = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "_from_model_config")
#: Tensors to hash in parallel.
TOGETHER = 8


def of_name(name: str) -> dict[str, str]:
    """Return the fingerprint of a model's name; empty for a local folder, whose path can be written in many ways."""
    return {} if is_folder(Path(name)) else {"model": name}


def of_model(model: Any, processor: Processor) -> dict[str, str]:
    """Return the fingerprints of a model, its processor and the code: all that answers depend on but the question."""
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


def of_processor(processor: Processor) -> dict[str, str]:
    """Return the fingerprints of a processor, on which a model's inputs depend.

    They include the classes: an image processor of another backend rounds differently with the same settings.
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
    """Return the fingerprints of a method's weights and of its code outside this package. Settings are not included."""
    weights = compressed.resampler.state_dict() if compressed.resampler is not None else {}
    return {
        "method code": of_method_code(compressed.compressor),
        "method weights": of_weights(weights) if weights else "",
    }


def of_method_code(compressor: Compressor) -> str:
    """Return the digest of the files of a method's classes and of their imports; empty for methods of this package."""
    classes = {cls for stage in compressor.stages() for cls in type(stage).__mro__}
    files = {file for cls in classes for file in files_of(cls)}
    return of_files(sorted(files)) if files else ""


def of_code(*more: str) -> str:
    """Return the digest of the files of this package that affect answers, and of `more` files or folders of it."""
    root = Path(vlmzip.__file__).parent
    paths = [root / name for name in (*CODE, *more)]
    return of_files(sorted(file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])))


def of_image(image: Image.Image) -> str:
    """Return the digest of an image's pixels, which is the same for every file with these pixels."""
    return _digest([f"{image.mode} {image.size}", image.tobytes()])


def of_images(images: Iterable[Image.Image | str]) -> str:
    """Return the digest of several images. A path is hashed by the bytes of its file, which is faster than decoding."""
    return _digest(of_files([Path(image)]) if isinstance(image, str) else of_image(image) for image in images)


def of_files(files: Iterable[Path]) -> str:
    """Return the digest of the contents of files. Raise `UserError` for a file that cannot be read."""

    def contents() -> Iterator[bytes]:
        for path in files:
            try:
                with path.open("rb") as file:
                    yield hashlib.file_digest(file, "sha256").digest()
            except OSError as error:
                raise UserError(f"{str(path)!r} cannot be read: {error.strerror or error}") from None

    return _digest(contents())


def of_json(content: object) -> str:
    """Return the digest of a value as JSON with sorted keys; other values are hashed as text."""
    return _digest([json.dumps(content, sort_keys=True, default=str)])


def refuse_changed(what: str, known: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Raise `UserError`, which begins with `what` and names the differences, if fingerprints are not as `known`."""
    if missing := [name for name in now if name not in known]:
        raise UserError(f"{what}, or of an earlier vlmzip: it lacks {missing[0]!r}; give another --out")
    changes = [f"{name} is {known[name]!r} there and {now[name]!r} here" for name in now if known[name] != now[name]]
    if changes:
        raise UserError(f"{what}: {'; '.join(changes)}; give another --out")


def _digest(parts: Iterable[str | bytes]) -> str:
    """Return a short SHA-256 of the parts. Each part's length is hashed, too, so that parts do not run together."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()[:16]


def _tensor(weights: Tensor) -> str:
    """Return a tensor's type, shape and digest."""
    form = f"{weights.dtype} {tuple(weights.shape)}"
    if weights.is_meta:  # the values are stored elsewhere, or nowhere
        return form
    values = weights.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return f"{form} {hashlib.sha256(values.numpy().data).hexdigest()}"


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[object]:
    """Return everything by which a tokenizer encodes and decodes, without padding and truncation: calls set them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    return [
        type(tokenizer).__qualname__,
        {name: part for name, part in words.items() if name not in ("padding", "truncation")},
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer.clean_up_tokenization_spaces,
    ]


def _without_origin(content: object) -> Any:
    """Return a configuration without the settings in `ORIGIN`, at any depth."""
    if isinstance(content, dict):
        return {name: _without_origin(part) for name, part in content.items() if name not in ORIGIN}
    return [_without_origin(part) for part in content] if isinstance(content, list | tuple) else content
