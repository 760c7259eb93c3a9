"""vlmzip: answer questions about pictures with a fraction of the visual tokens."""

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
from vlmzip.runtime.calibration import Calibration, calibrate
from vlmzip.runtime.facade import CompressedModel, attach
from vlmzip.runtime.prepare import compress_inputs
from vlmzip.runtime.report import Report
from vlmzip.runtime.saving import from_pretrained
from vlmzip.token_map import TokenMap
from vlmzip.version import __version__
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
