"""vlmzip: answer questions about images with a fraction of the visual tokens.

Names are imported when they are first used: most need torch, which takes seconds that `vlmzip --help` must not wait.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from vlmzip.version import __version__

if TYPE_CHECKING:
    from vlmzip import mini, spec
    from vlmzip.catalogue import available
    from vlmzip.compressor import BudgetError, Compressor, Profile
    from vlmzip.errors import UserError
    from vlmzip.keep import Keep
    from vlmzip.methods import (
        DFMR,
        AdaptiveVisionZip,
        Chain,
        Downsample,
        FastV,
        KMeans,
        LLaVolta,
        NoCompression,
        Pool2d,
        QFormer,
        RandomTokens,
        SparseVLM,
        VisionZip,
    )
    from vlmzip.resampler import Resampler
    from vlmzip.runtime.attach import attach
    from vlmzip.runtime.calibration import Calibration, calibrate
    from vlmzip.runtime.facade import CompressedModel
    from vlmzip.runtime.inputs import compress_inputs
    from vlmzip.runtime.report import Report
    from vlmzip.runtime.saving import from_pretrained
    from vlmzip.token_map import TokenMap
    from vlmzip.visual_tokens import Grid, Signal, Site, VisualTokens

__all__ = [
    "DFMR",
    "AdaptiveVisionZip",
    "BudgetError",
    "Calibration",
    "Chain",
    "CompressedModel",
    "Compressor",
    "Downsample",
    "FastV",
    "Grid",
    "KMeans",
    "Keep",
    "LLaVolta",
    "NoCompression",
    "Pool2d",
    "Profile",
    "QFormer",
    "RandomTokens",
    "Report",
    "Resampler",
    "Signal",
    "Site",
    "SparseVLM",
    "TokenMap",
    "UserError",
    "VisionZip",
    "VisualTokens",
    "__version__",
    "attach",
    "available",
    "calibrate",
    "compress_inputs",
    "from_pretrained",
    "mini",
    "spec",
]

#: Names by the module that has them; the rest of `__all__` are modules.
_NAMES = {
    "catalogue": ["available"],
    "compressor": ["BudgetError", "Compressor", "Profile"],
    "errors": ["UserError"],
    "keep": ["Keep"],
    "methods": [
        "DFMR",
        "AdaptiveVisionZip",
        "Chain",
        "Downsample",
        "FastV",
        "KMeans",
        "LLaVolta",
        "NoCompression",
        "Pool2d",
        "QFormer",
        "RandomTokens",
        "SparseVLM",
        "VisionZip",
    ],
    "resampler": ["Resampler"],
    "runtime.attach": ["attach"],
    "runtime.calibration": ["Calibration", "calibrate"],
    "runtime.facade": ["CompressedModel"],
    "runtime.inputs": ["compress_inputs"],
    "runtime.report": ["Report"],
    "runtime.saving": ["from_pretrained"],
    "token_map": ["TokenMap"],
    "visual_tokens": ["Grid", "Signal", "Site", "VisualTokens"],
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}


if not TYPE_CHECKING:  # type checkers would take any name for one that is there

    def __getattr__(name: str) -> Any:
        """Import a name of `__all__`, or a module of this package, on first use."""
        if name in _HOMES:
            value = getattr(import_module(f"vlmzip.{_HOMES[name]}"), name)
        elif not name.startswith("_") and find_spec(f"vlmzip.{name}") is not None:
            value = import_module(f"vlmzip.{name}")
        else:
            raise AttributeError(f"module 'vlmzip' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
