"""The sources of mini's photos: Fashion-MNIST's items and scikit-image's photos.

Training reads the installed files. `python -m recipes.mini.sources` makes the package's `assets/crops.npz` again, with
which the validation and test splits and the examples are drawn.
"""

import argparse
import gzip
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmzip.errors import UserError
from vlmzip.mini.assets import SHIPPED, Assets
from vlmzip.mini.rng import Rng
from vlmzip.mini.scene import SIDE
from vlmzip.runtime.images import load_image

# Fashion-MNIST's labels of mini's items.
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the folders of the sources."""
    parser.add_argument("--fashion-mnist", type=Path, help="folder of Fashion-MNIST's gz files")
    parser.add_argument("--cache", type=Path, help="where to unpack Fashion-MNIST (default ~/.cache/vlmzip)")


def training_assets(fashion_mnist: Path | None = None, cache_folder: Path | None = None) -> Assets:
    """Return Fashion-MNIST's training images, and crops from the left part of each photo.

    Raise `UserError` if a source is missing and cannot be downloaded.
    """
    images, labels = read_fashion_mnist(find_fashion_mnist(fashion_mnist, cache_folder), "train")
    items = {name: images[labels == label] for name, label in LABELS.items()}
    return Assets(photo_crops("train", 60), items)


# ---------------------------------------------------------------- Fashion-MNIST


def find_fashion_mnist(given: Path | None, cache_folder: Path | None) -> Path:
    """Return the folder of the gz files: `given`, the installed Debian package's, or the unpacked one in the cache.

    Raise `UserError` if there is none, and the package cannot be downloaded.
    """
    if given is not None:
        if not (given / "train-images-idx3-ubyte.gz").exists():
            raise UserError(f"{given} has no train-images-idx3-ubyte.gz; give the folder of Fashion-MNIST's gz files")
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
            raise UserError(
                f"Fashion-MNIST is missing: install the Debian package {DEBIAN_PACKAGE}, or give the folder of its gz "
                "files with --fashion-mnist"
            ) from error
        shutil.move(f"{folder}/files{DEBIAN_FOLDER}", target)


def read_fashion_mnist(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images, uint8 [n 28 28], and labels, uint8 [n], of the part "train" or "t10k"."""
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return images, labels


# ---------------------------------------------------------------- photos


def photo_crops(part: str, per_photo: int) -> np.ndarray:
    """Return crops of the photos, uint8 [n 96 96 3].

    Training uses the left 60 % of each photo, validation its upper right part, and test its lower right part.
    """
    try:
        import skimage.data
    except ImportError as error:
        raise UserError("scikit-image is not installed: pip install 'vlmzip[train]'") from error
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
    """Make `assets/crops.npz`. It has 20 of Fashion-MNIST's test images of each item for validation and 40 for test."""
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
    write_shipped_assets(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
