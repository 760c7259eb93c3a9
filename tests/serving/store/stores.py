"""What the tests of stores share: folders of images, models with processors, and all files of a store."""

from pathlib import Path

import numpy as np
from PIL import Image

from vlmzip import spec
from vlmzip.models import family_of
from vlmzip.runtime.loading import Loaded
from vlmzip.serving.store.writing import write_store

#: Width and height of image 0, 1, …
SIZES = ((60, 40), (48, 48), (30, 90), (64, 20), (48, 48))


def write_images(folder: Path, count: int = 3) -> list[str]:
    """Write images of noise, one of them in a folder below; return their names in a store."""
    names = [f"{n}.png" for n in range(count - 1)] + [f"more/{count - 1}.png"]
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(number).save(path)
    return names


def noise_image(number: int) -> Image.Image:
    width, height = SIZES[number % len(SIZES)]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def loaded_of(family) -> Loaded:
    """Return a tiny model of a family with its processor, as `load` does."""
    model = family.model
    return Loaded(family.name, model, family.processor(), family_of(model))


def write(folder, store, loaded, method="visionzip(keep=8)", **settings):
    return write_store(Path(folder), Path(store), loaded, spec.read(method), **{"batch": 2, "shard": 2, **settings})


def contents(store: Path) -> dict[str, bytes]:
    """Return the content of all files of a store by name, without the lock."""
    files = [path for path in Path(store).rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in files}


def number_of(name: str) -> int:
    """Return the number of an image by its name."""
    return int(Path(name).stem)
