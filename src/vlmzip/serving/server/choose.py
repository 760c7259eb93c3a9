"""The compressor of a request: its method and budget, or those of the server."""

from __future__ import annotations

import re
from functools import lru_cache

from vlmzip import catalogue, spec
from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.keep import Keep, parse_keep
from vlmzip.models.family import Family
from vlmzip.runtime.fitting import fitted
from vlmzip.runtime.resample import resampling
from vlmzip.serving.server.errors import RequestError

#: The largest number in a method of a request. Some settings are numbers of steps.
LARGEST = 4096


class Methods:
    """The compressors that requests can choose."""

    def __init__(self, family: Family, default: Compressor) -> None:
        self._family, self.default = family, fitted(default, family)
        self._names = set(catalogue.available())
        # `typed`: a keep of 1 is one token, and 1.0 is all of them.
        self._choose = lru_cache(maxsize=256, typed=True)(self._make)

    def choose(self, method: str | None, keep: Keep | None) -> Compressor:
        """Return the compressor for the fields of a request. Raise `RequestError` if there is none."""
        try:
            return self._choose(method, keep)
        except UserError as error:
            param = "vlmzip.keep" if method is None else "vlmzip.method"
            raise RequestError(str(error), code="invalid_method", param=param) from None

    def _make(self, method: str | None, keep: Keep | None) -> Compressor:
        if keep is not None:
            parse_keep(keep)
        compressor = self.default if method is None else self._read(method)
        if keep is not None and method is not None:
            spec.refuse_second_budget(method, keep, "give one of them", "keep")
        chosen = compressor if keep is None else self._with_keep(compressor, keep)
        weights = resampling(chosen)
        if weights is not None and chosen != self.default:
            raise UserError(f"{weights.name()} has trained weights, and this server has none for it")
        return fitted(chosen, self._family)

    def _read(self, method: str) -> Compressor:
        """Return the compressor of a spec from a request, which must not name files, modules or large numbers."""
        compressor = spec.read_named(method, self._names)
        if any(float(number) > LARGEST for number in re.findall(r"\d+", method)):
            raise UserError(f"a number in a method of a request must be at most {LARGEST}")
        for stage in compressor.stages():
            if stage.for_training_only:
                raise UserError(f"{stage.name()} is for training only; choose another method")
        return compressor

    def _with_keep(self, compressor: Compressor, keep: Keep) -> Compressor:
        """Return the compressor with another budget, or its configuration nearest to that."""
        if "keep" in compressor.field_names():
            return compressor.with_keep(keep)
        return compressor.at_keep(keep, self._family.profile())[0]
