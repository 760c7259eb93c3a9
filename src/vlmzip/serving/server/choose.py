"""The compressor of a request: its method and budget, or those of the server."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache

from vlmzip import catalogue, spec
from vlmzip.compressor import Calibratable, Compressor
from vlmzip.errors import BudgetError, UserError
from vlmzip.keep import Keep, parse_keep
from vlmzip.methods import NoCompression
from vlmzip.models.family import Family
from vlmzip.runtime.fitting import fitted
from vlmzip.runtime.resample import resampling
from vlmzip.serving.request_fields import refuse_fields
from vlmzip.serving.server.errors import RequestError

#: The largest number in a budget of a request.
LARGEST = 4096
#: Fields of methods with whole numbers that cost no time, in addition to budgets. Others are numbers of steps.
CHEAP = ("layer", "seed")


class Methods:
    """The compressors that requests can choose."""

    def __init__(self, family: Family, default: Compressor, stored: Sequence[Compressor] = ()) -> None:
        """Requests can repeat all settings of `default` and of the `stored` images' methods."""
        self._family, self.default = family, fitted(default, family)
        self._known = [stage for method in (self.default, *stored) for stage in method.stages()]
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

    @cached_property
    def _offered(self) -> list[str]:
        """Return the names of the methods that a request can choose on this model."""
        fitting = [candidate.name for candidate in spec.candidates(None) if self._fits(candidate.method)]
        return [*fitting, NoCompression.name()]

    def _fits(self, method: Compressor | None) -> bool:
        if method is None or method.trained_weights or (method.videos_only and len(self._family.modalities) < 2):
            return False
        try:
            fitted(method, self._family)
        except UserError:
            return False
        return True

    def _make(self, method: str | None, keep: Keep | None) -> Compressor:
        if keep is not None:
            _refuse_large(keep)
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
        compressor = spec.read_named(method, self._names, self._offered)
        for stage in compressor.stages():
            self._refuse_costly(stage)
            if stage.for_training_only:
                raise UserError(f"{stage.name()} is for training only; choose another method")
        return compressor

    def _refuse_costly(self, stage: Compressor) -> None:
        """Raise `UserError` for large budgets, and for other whole numbers that the server's methods do not have.

        vLLM permits less, because it has no limit of time for a request: see `serving.vllm.setting.read_request`.
        """
        for name in (name for name in stage.field_names() if name in stage.budget_fields):
            value = getattr(stage, name)
            known = [getattr(other, name) for other in self._known if type(other) is type(stage)]
            if value is not None and value not in known:
                for part in value if isinstance(value, tuple) else (value,):
                    _refuse_large(part)
        further = [name for name in CHEAP if name in stage.field_names()]
        refuse_fields(stage, further, known=self._known, is_costly=_has_whole_number)

    def _with_keep(self, compressor: Compressor, keep: Keep) -> Compressor:
        """Return the compressor with another budget, or its configuration nearest to that."""
        if "keep" in compressor.field_names():
            return compressor.with_keep(keep)
        try:
            return compressor.at_keep(keep, self._family.profile())[0]
        except BudgetError as error:
            advice = "leave out keep"
            for stage in compressor.stages():
                if isinstance(stage, Calibratable):
                    value = getattr(stage, stage.threshold)
                    advice += f", or set {stage.threshold} in method: {stage.name()}({stage.threshold}={value})"
            raise UserError(error.fact, advice=advice) from None


def _has_whole_number(value: object) -> bool:
    """Return whether a value can be a number of steps. A boolean cannot."""
    return any(type(part) is int for part in (value if isinstance(value, tuple) else (value,)))


def _refuse_large(budget: Keep) -> None:
    """Raise `UserError` for a budget that is larger than requests may give, or that is not a number."""
    number = parse_keep(budget) if isinstance(budget, str) else budget
    if isinstance(number, int) and number > LARGEST:
        raise UserError(f"a budget in a request must be at most {LARGEST}")
