"""Lets a torchvision that was built for CUDA be imported where torch was built for the CPU.

Some package mirrors have only that pair. torchvision's compiled operators cannot be loaded then, and the one thing at
import that misses them is the description of `nms` and `qnms` for tracing. So these two names are declared first;
nothing here calls them. Run as a script, this file puts itself into the environment that runs it, with a .pth file that
imports it at every start of Python: `make test-lmms` and `make test-extras` do so in their own environments. It is no
part of the package, and does nothing where torch and torchvision belong together.
"""

import importlib.abc
import importlib.machinery
import shutil
import sys
import sysconfig
from pathlib import Path


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Acts once, when torchvision is about to be imported, and leaves finding it to others."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        found = importlib.machinery.PathFinder.find_spec(name, path)
        if found is not None and not operators_load(torch, Path(found.submodule_search_locations[0])):
            declare(torch)


def operators_load(torch, folder):
    """Return whether the compiled operators of the torchvision in `folder` fit this torch."""
    try:
        for library in folder.glob("_C*.so"):
            torch.ops.load_library(str(library))
    except OSError:  # it wants CUDA's libraries
        return False
    return True


def declare(torch):
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    torch._declared_for_torchvision = library  # a declaration lasts as long as its library object


def install():
    packages = Path(sysconfig.get_path("purelib"))
    shutil.copy(__file__, packages)
    (packages / f"{Path(__file__).stem}.pth").write_text(f"import {Path(__file__).stem}\n")


if __name__ == "__main__":
    install()
else:
    sys.meta_path.insert(0, BeforeTorchvision())
