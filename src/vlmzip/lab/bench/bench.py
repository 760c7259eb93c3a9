"""Measure speed and memory of methods on one model, and compare them with the FLOPs that remain."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Literal

import torch
from torch import Tensor, nn

from vlmzip.compressor import Compressor, Profile
from vlmzip.errors import reason
from vlmzip.lab.bench.memory import peak_bytes
from vlmzip.lab.bench.presets import Model
from vlmzip.lab.bench.timing import Quartiles, Spans, in_turns, now, quartiles, ratios, time_answer
from vlmzip.methods import NoCompression
from vlmzip.models.family import Family
from vlmzip.runtime.attach import attach
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.flops import flops_inside
from vlmzip.runtime.token_profile import TokenProfile

PLAIN = NoCompression.name()

#: The timed scopes: the LLM's prefill, and everything from the call to the first token.
Scope = Literal["prefill", "ttft"]
SCOPES: tuple[Scope, ...] = ("prefill", "ttft")


@dataclass
class Contender:
    """A method and its measurements. The plain model has no compressor."""

    name: str
    compressor: Compressor | None
    note: str = ""
    """Why numbers are missing or unusual."""
    profiles: list[TokenProfile] = field(default_factory=list)
    """The token profile of each row of the batch."""
    flops: dict[Scope, int] = field(default_factory=dict)
    """The FLOPs of each scope, without those of selection."""
    kv_bytes: int = 0
    peak_bytes: int | None = None
    """Peak memory beyond the weights; `None` if it cannot be measured."""
    without_peak: str = ""
    """Why the memory was not measured, if its process failed."""
    spans: list[Spans] = field(default_factory=list)

    @contextmanager
    def on(self, model: Model) -> Iterator[Model | CompressedModel]:
        """Provide the model as this contender uses it, and restore it after the block."""
        if self.compressor is None:
            yield model
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first run already showed them
            with attach(model, self.compressor) as compressed:
                yield compressed

    def seconds(self, scope: Scope) -> list[float]:
        return [getattr(spans, scope) for spans in self.spans]

    @property
    def tokens_per_second(self) -> Quartiles:
        """Return the decoding speed, all rows together."""
        return quartiles([len(self.profiles) / spans.token for spans in self.spans])


@dataclass(frozen=True)
class Compared:
    """A scope of a method, compared with the plain model's."""

    milliseconds: Quartiles
    speed_up: Quartiles
    """Quartiles of the ratios within rounds."""
    limit: float
    """The speed-up if time were proportional to FLOPs: the plain model's FLOPs over the method's, in this scope."""

    @property
    def share(self) -> Quartiles:
        """Return the share of the limit that was reached; above 1 if the plain model computes less efficiently."""
        return Quartiles(*(value / self.limit for value in self.speed_up))


@dataclass(frozen=True)
class BenchStep:
    """A run that is about to begin."""

    name: str
    round: int | None = None
    """0 for the warm-up, from 1 for timed rounds; `None` while tokens and FLOPs are counted."""
    rounds: int = 0
    """The number of timed rounds."""


def compare(contender: Contender, plain: Contender, scope: Scope) -> Compared:
    """Return times, speed-up and its limit for a contender that was measured."""
    seconds = contender.seconds(scope)
    return Compared(
        Quartiles(*(1000 * value for value in quartiles(seconds))),
        ratios(seconds, plain.seconds(scope)),
        plain.flops[scope] / contender.flops[scope],
    )


def profile_of(family: Family, inputs: Mapping[str, Tensor]) -> Profile:
    """Return the profile of the first image or video of `inputs`, which may have another size than the model's own."""
    first, *others = family.layouts(inputs)[0].views
    return replace(family.profile(), grid=first, tiles=tuple(others))


def bench(
    model: Model,
    family: Family,
    inputs: Mapping[str, Tensor],
    contenders: Sequence[Contender],
    *,
    repeats: int,
    new_tokens: int,
    clock: Callable[[torch.device], float] = now,
    telling: Callable[[BenchStep], object] = lambda _: None,
    keeping: Callable[[list[Contender]], object] = lambda _: None,
) -> list[Contender]:
    """Time the plain model and the contenders in turns. A contender that fails gets a note and drops out.

    Raise what the plain model raises. `family` is that of the images or videos in `inputs`. `telling` is called
    before each run, and `keeping` with all contenders after each round.
    """
    plain = Contender(PLAIN, None)
    running = []
    for contender in (plain, *contenders):
        telling(BenchStep(contender.name))
        try:
            with contender.on(model) as compressed:
                _count(contender, compressed, family, inputs)
            running.append(contender)
        except Exception as error:  # an error in one method must not stop the others
            if contender is plain:
                raise
            contender.note = reason(error)

    begun = count()

    def run(contender: Contender) -> Spans:
        telling(BenchStep(contender.name, next(begun) // len(running), repeats))
        with contender.on(model) as compressed:
            return time_answer(compressed, family, inputs, new_tokens, clock)

    everyone = [plain, *contenders]

    def keep(spans_by_number: dict[str, list[Spans]]) -> None:
        for contender, spans in zip(running, spans_by_number.values(), strict=True):
            contender.spans = list(spans)
        keeping(everyone)

    in_turns({str(number): partial(run, contender) for number, contender in enumerate(running)}, repeats, keeping=keep)
    return everyone


def _count(
    contender: Contender,
    compressed: Model | CompressedModel,
    family: Family,
    inputs: Mapping[str, Tensor],
) -> None:
    """Set the tokens, FLOPs and KV-cache bytes of one run."""
    ids = inputs["input_ids"]
    vision = [family.vision_encoder]
    if family.projector not in family.vision_encoder.modules():  # in some families it is part of the encoder
        vision.append(family.projector)
    vision += [module for module in (getattr(compressed, "resampler", None),) if isinstance(module, nn.Module)]
    before_llm = flops_inside(
        vision, lambda: compressed.generate(**inputs, do_sample=False, max_new_tokens=1, min_new_tokens=1)
    )
    if isinstance(compressed, CompressedModel):
        contender.profiles = TokenProfile.rows(compressed.report, inputs["attention_mask"].sum(1).tolist())
    else:
        visual = (ids == family.placeholder_id).sum(1).tolist()
        layers = len(family.decoder_layers)
        contender.profiles = [TokenProfile(count, (count,) * layers, ids.shape[1] - count) for count in visual]
    prefill = sum(profile.prefill_flops(family) for profile in contender.profiles)
    contender.flops = {"prefill": prefill, "ttft": before_llm + prefill}
    contender.kv_bytes = sum(profile.kv_bytes(family) for profile in contender.profiles)


def peaks(
    model: Model,
    inputs: Mapping[str, Tensor],
    compressors: Sequence[Compressor | None],
    new_tokens: int,
    telling: Callable[[int], object] = lambda _: None,
) -> Iterator[int | None]:
    """Yield the peak memory of an answer beyond the weights, in bytes, for each compressor (`None`: the plain model).

    Yield `None` if the run fails or the system does not report memory. On a CPU, call this in a separate process, see
    `peak_bytes`. `telling` is called before each run with the number of completed ones.
    """
    for done, compressor in enumerate(compressors):
        telling(done)
        try:
            with Contender("", compressor).on(model) as compressed:
                run = partial(compressed.generate, **inputs, do_sample=False, max_new_tokens=new_tokens)
                peak = peak_bytes(run, inputs["input_ids"].device)
        except Exception:  # `bench` runs the same method and reports the error
            peak = None
        yield peak
