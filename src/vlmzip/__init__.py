"""vlmzip: answer questions about pictures with a fraction of the visual tokens."""

from vlmzip.catalogue import available
from vlmzip.compressor import BudgetError, Compressor, Profile
from vlmzip.errors import UserError
from vlmzip.keep import Keep
from vlmzip.methods import Downsample, NoCompression, Pool2d, QFormer, RandomTokens, VisionZip
from vlmzip.resampler import Resampler
from vlmzip.runtime.facade import CompressedModel, attach
from vlmzip.runtime.prepare import compress_inputs
from vlmzip.runtime.report import Report
from vlmzip.runtime.saving import from_pretrained
from vlmzip.token_map import TokenMap
from vlmzip.version import __version__
from vlmzip.visual_tokens import Grid, Signal, Site, VisualTokens

__all__ = [
    "BudgetError",
    "CompressedModel",
    "Compressor",
    "Downsample",
    "Grid",
    "Keep",
    "NoCompression",
    "Pool2d",
    "Profile",
    "QFormer",
    "RandomTokens",
    "Report",
    "Resampler",
    "Signal",
    "Site",
    "TokenMap",
    "UserError",
    "VisionZip",
    "VisualTokens",
    "__version__",
    "attach",
    "available",
    "compress_inputs",
    "from_pretrained",
]
