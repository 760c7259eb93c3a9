"""vlmzip: answer questions about images with a fraction of the visual tokens.

Names are imported on first use, so that commands such as `vlmzip --help` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from vlmzip.version import __version__ as __version__

if TYPE_CHECKING:
    from vlmzip import mini as mini
    from vlmzip import spec as spec
    from vlmzip.catalogue import available as available
    from vlmzip.compressor import BudgetError as BudgetError
    from vlmzip.compressor import Compressor as Compressor
    from vlmzip.compressor import Profile as Profile
    from vlmzip.errors import UserError as UserError
    from vlmzip.keep import Keep as Keep
    from vlmzip.methods import *  # noqa: F403
    from vlmzip.models.layout import Layout as Layout
    from vlmzip.resampler import Resampler as Resampler
    from vlmzip.runtime.attach import attach as attach
    from vlmzip.runtime.calibration import Calibration as Calibration
    from vlmzip.runtime.calibration import calibrate as calibrate
    from vlmzip.runtime.compressed_inputs import CompressedInputs as CompressedInputs
    from vlmzip.runtime.facade import CompressedModel as CompressedModel
    from vlmzip.runtime.inputs import compress_inputs as compress_inputs
    from vlmzip.runtime.report import Report as Report
    from vlmzip.runtime.saving import from_pretrained as from_pretrained
    from vlmzip.token_map import TokenMap as TokenMap
    from vlmzip.visual_tokens import Grid as Grid
    from vlmzip.visual_tokens import Signal as Signal
    from vlmzip.visual_tokens import Site as Site
    from vlmzip.visual_tokens import VisualTokens as VisualTokens


#: Public names by module, without the methods' classes and the public modules.
_NAMES = {
    "catalogue": ["available"],
    "compressor": ["BudgetError", "Compressor", "Profile"],
    "errors": ["UserError"],
    "keep": ["Keep"],
    "models.layout": ["Layout"],
    "resampler": ["Resampler"],
    "runtime.attach": ["attach"],
    "runtime.calibration": ["Calibration", "calibrate"],
    "runtime.compressed_inputs": ["CompressedInputs"],
    "runtime.facade": ["CompressedModel"],
    "runtime.inputs": ["compress_inputs"],
    "runtime.report": ["Report"],
    "runtime.saving": ["from_pretrained"],
    "token_map": ["TokenMap"],
    "visual_tokens": ["Grid", "Signal", "Site", "VisualTokens"],
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}


def _method_classes() -> list[str]:
    from vlmzip.outline import method_classes  # it reads source files, which most users do not need

    return method_classes()


def _all() -> list[str]:
    """Return every public name. The methods' names are read from their package's source."""
    return sorted([*_HOMES, *_method_classes(), "__version__", "mini", "spec"])


if not TYPE_CHECKING:  # with __getattr__, type checkers would accept any name

    def __getattr__(name: str) -> object:
        """Import a public name, or a module of this package, on first use."""
        if name == "__all__":
            value = _all()
        elif name in _HOMES:
            value = getattr(import_module(f"vlmzip.{_HOMES[name]}"), name)
        elif not name.startswith("_") and find_spec(f"vlmzip.{name}") is not None:
            value = import_module(f"vlmzip.{name}")
        elif name in _method_classes():
            value = getattr(import_module("vlmzip.methods"), name)
        else:
            raise AttributeError(f"module 'vlmzip' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return _all()
