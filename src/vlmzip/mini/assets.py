"""Real photos that the drawings use: Fashion-MNIST items and crops of public-domain photos.

The validation and test splits and the examples need only a few hundred small crops, shipped in `assets/crops.npz`.
Training uses other images: Fashion-MNIST's training images and other parts of the photos, read from where they are
installed.
"""

import gzip
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vlmzip.mini.rng import Rng
from vlmzip.mini.words import ITEMS
from vlmzip.runtime.images import load_image

SHIPPED = Path(__file__).parent / "assets" / "crops.npz"
SIDE = 96
# Fashion-MNIST's label numbers of mini's items.
LABELS = {"tshirt": 0, "trousers": 1, "pullover": 2, "dress": 3, "sandal": 5, "sneaker": 7, "bag": 8, "boot": 9}
# Public domain or CC0 by scikit-image's own documentation; docs/mini.md names the photographers.
PHOTOS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
)
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


class AssetsMissing(Exception):
    """A photo source is not there; the message says in one line how to get it."""


@dataclass(frozen=True)
class Assets:
    grounds: np.ndarray  # uint8 [n 96 96 3]
    items: dict[str, np.ndarray]  # uint8 [m 28 28] for each item

    def item(self, name: str, look: int) -> np.ndarray:
        crops = self.items[name]
        return crops[look % len(crops)]


@cache
def shipped_assets(part: str) -> Assets:
    """The crops of the "validation" or "test" split."""
    with np.load(SHIPPED) as crops:
        return Assets(crops[f"{part}_grounds"], {name: crops[f"{part}_{name}"] for name in ITEMS})


def training_assets(fashion_mnist: Path | None = None, cache_folder: Path | None = None) -> Assets:
    """Fashion-MNIST's training images, and crops from the left of each photo."""
    images, labels = read_fashion_mnist(find_fashion_mnist(fashion_mnist, cache_folder), "train")
    items = {name: images[labels == label] for name, label in LABELS.items()}
    return Assets(photo_crops("train", 60), items)


# ---------------------------------------------------------------- Fashion-MNIST


def find_fashion_mnist(given: Path | None, cache_folder: Path | None) -> Path:
    """The folder of the gz files: the one given, the installed Debian package, or the package unpacked in the cache."""
    if given is not None:
        if not (given / "train-images-idx3-ubyte.gz").exists():
            raise AssetsMissing(f"{given} does not hold train-images-idx3-ubyte.gz")
        return given
    if DEBIAN_FOLDER.is_dir():
        return DEBIAN_FOLDER
    unpacked = (cache_folder or Path.home() / ".cache" / "vlmzip") / "fashion-mnist"
    if not unpacked.is_dir():
        _unpack_debian_package(unpacked)
    return unpacked


def _unpack_debian_package(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        try:
            subprocess.run(["apt-get", "download", DEBIAN_PACKAGE], cwd=folder, check=True, capture_output=True)
            package = next(Path(folder).glob("*.deb"))
            subprocess.run(["dpkg", "-x", package, f"{folder}/files"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            raise AssetsMissing(
                f"Fashion-MNIST is not there: install the Debian package {DEBIAN_PACKAGE}, or name a folder that holds "
                "its gz files with --fashion-mnist"
            ) from error
        shutil.move(f"{folder}/files{DEBIAN_FOLDER}", target)


def read_fashion_mnist(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [n 28 28], uint8 [n]) of part "train" or "t10k"."""
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return images, labels


# ---------------------------------------------------------------- photos


def photo_crops(part: str, per_photo: int) -> np.ndarray:
    """uint8 [n 96 96 3]. Training sees the left 60 % of a photo, validation the upper right, test the lower right."""
    try:
        import skimage.data
    except ImportError as error:
        raise AssetsMissing("scikit-image is not installed: pip install 'vlmzip[train]'") from error
    from PIL import Image

    folder = Path(skimage.data.__file__).parent
    crops = []
    for number, name in enumerate(PHOTOS):
        rng = Rng(number)
        photo = load_image(folder / name)
        left, top, right, bottom = _region(part, *photo.size)
        for _ in range(per_photo):
            side = rng.between(SIDE, min(right - left, bottom - top, 240))
            x, y = rng.between(left, right - side), rng.between(top, bottom - side)
            crop = photo.resize((SIDE, SIDE), Image.Resampling.BOX, (x, y, x + side, y + side))
            crops.append(np.asarray(crop))
    return np.stack(crops)


def _region(part: str, width: int, height: int) -> tuple[int, int, int, int]:
    border = width * 60 // 100
    return {
        "train": (0, 0, border, height),
        "validation": (border, 0, width, height // 2),
        "test": (border, height // 2, width, height),
    }[part]


def write_shipped_assets(fashion_mnist: Path | None = None, cache_folder: Path | None = None) -> None:
    """Makes `assets/crops.npz`: of each item 20 Fashion-MNIST test images for validation and the next 40 for test."""
    images, labels = read_fashion_mnist(find_fashion_mnist(fashion_mnist, cache_folder), "t10k")
    arrays: dict[str, Any] = {
        "validation_grounds": photo_crops("validation", 3),
        "test_grounds": photo_crops("test", 4),
    }
    for name, label in LABELS.items():
        crops = images[labels == label]
        arrays[f"validation_{name}"], arrays[f"test_{name}"] = crops[:20], crops[20:60]
    SHIPPED.parent.mkdir(exist_ok=True)
    np.savez_compressed(SHIPPED, **arrays)


if __name__ == "__main__":
    import sys

    write_shipped_assets(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
