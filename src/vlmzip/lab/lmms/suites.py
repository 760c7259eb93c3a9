"""The benchmarks that papers average over, as tasks of lmms-eval 0.7.3: names, metrics, units, and differences."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vlmzip.errors import UserError, closest
from vlmzip.lab.papers.averages import weight

Average = Literal["scores", "relative scores", "none"]
Judge = Literal["never", "always", "sometimes"]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of a suite."""

    name: str
    """The name in the papers and in `vlmzip.lab.papers`."""
    task: str
    """The name in lmms-eval."""
    metrics: tuple[str, ...] = ()
    """The metrics whose sum is the benchmark's score. If empty, the first number of lmms-eval is the score."""
    scale: float = 1.0
    """The factor from lmms-eval's number to percent, or to MME's points."""
    judge: Judge = "never"
    """Whether a language model behind an API scores the answers; "sometimes": only those that name no option."""
    note: str = ""
    """The difference from the papers' measurement."""

    def score(self, numbers: Mapping[str, object]) -> float | None:
        """Return the benchmark's score from lmms-eval's numbers by "metric,filter", or `None` if one is missing."""
        names = self.metrics or tuple(_numbers(numbers))[:1]
        parts = [_numbers(numbers).get(name) for name in names]
        if not parts or any(part is None for part in parts):
            return None
        return self.scale * sum(part for part in parts if part is not None)


def _numbers(numbers: Mapping[str, object]) -> dict[str, float]:
    """Return the numbers by metric, from the first filter, without standard errors."""
    out: dict[str, float] = {}
    for key, value in numbers.items():
        metric, comma, _ = key.partition(",")
        if comma and isinstance(value, int | float) and "_stderr" not in metric:
            out.setdefault(metric, float(value))
    return out


@dataclass(frozen=True)
class Suite:
    """A set of benchmarks that are run together."""

    name: str
    about: str
    benchmarks: tuple[Benchmark, ...]
    average: Average = "none"
    """"scores": their mean, MME in percent of 2,000 (LLaVolta); "relative scores": the mean share of the plain model's
    (VisionZip)."""
    refused: str = ""
    """Why it cannot be run, or ""."""

    def mean(self, scores: Mapping[str, float], plain: Mapping[str, float]) -> float | None:
        """Return the suite's average in percent over the benchmarks (by name) in `scores`, or `None` without an
        average.

        Relative scores leave out benchmarks on which the uncompressed model has 0.
        """
        if self.average == "scores":
            parts = [weight(name) * score for name, score in scores.items()]
        elif self.average == "relative scores":
            parts = [100 * score / plain[name] for name, score in scores.items() if plain.get(name)]
        else:
            parts = []
        return sum(parts) / len(parts) if parts else None


_GQA = Benchmark("GQA", "gqa", ("exact_match",), 100)
_SCIENCE_QA = Benchmark("ScienceQA", "scienceqa_img", ("exact_match",), 100)
_TEXT_VQA = Benchmark(
    "TextVQA", "textvqa_val", ("exact_match",), 100, note="LLaVA's own evaluation adds words found by OCR to the prompt"
)
_POPE = Benchmark("POPE", "pope", ("pope_f1_score",), 100)
_VQA_V2 = Benchmark(
    "VQAv2", "vqav2_val", ("exact_match",), 100, note="validation split; the papers' test-dev is scored by a server"
)
_MMBENCH = Benchmark("MMBench", "mmbench_en_dev", ("gpt_eval_score",), judge="sometimes")
_MMMU = Benchmark("MMMU", "mmmu_val", ("mmmu_acc",), 100)
_MM_VET = Benchmark("MM-Vet", "mmvet", ("gpt_eval_score",), judge="always")
_LLAVA_BENCH = Benchmark("LLaVA-Bench", "llava_in_the_wild", ("gpt_eval_llava_all",), judge="always")
_PERCEPTION = Benchmark("MME", "mme", ("mme_perception_score",))
_PERCEPTION_AND_COGNITION = Benchmark("MME", "mme", ("mme_perception_score", "mme_cognition_score"))

LLAVOLTA = Suite(
    "llavolta13",
    "the 13 benchmarks of LLaVolta (arXiv:2406.20092)",
    (
        _GQA,
        _MM_VET,
        _SCIENCE_QA,
        _PERCEPTION,
        _TEXT_VQA,
        _POPE,
        _MMBENCH,
        Benchmark("MMBench-CN", "mmbench_cn_dev", ("gpt_eval_score",), judge="sometimes"),
        _VQA_V2,
        _LLAVA_BENCH,
        Benchmark(
            "VizWiz", "vizwiz_vqa_val", ("exact_match",), 100, note="validation split; the test split is on a server"
        ),
        Benchmark("SEED-Image", "seedbench", ("seed_image",), 100, note="lmms-eval asks the video questions as well"),
        _MMMU,
    ),
    "scores",
)

VISIONZIP = Suite(
    "visionzip11",
    "the 11 benchmarks of VisionZip (arXiv:2412.04467)",
    (
        _GQA,
        _MMBENCH,
        _PERCEPTION_AND_COGNITION,
        _POPE,
        _SCIENCE_QA,
        _VQA_V2,
        _TEXT_VQA,
        _MMMU,
        Benchmark("SEED-Bench", "seedbench", ("seed_all",), 100),
        _MM_VET,
        _LLAVA_BENCH,
    ),
    "relative scores",
)

VIDEO_LLAVA = Suite(
    "videollava4",
    "Video-LLaVA's four (TGIF, MSVD, MSRVTT, ActivityNet)",
    (Benchmark("ActivityNet", "activitynetqa", ("gpt_eval_accuracy",), judge="always"),),
    refused="vlmzip gives lmms-eval no videos yet; and of the four, lmms-eval 0.7.3 has activitynetqa alone (no task"
    " for TGIF, MSVD or MSRVTT)",
)

SUITES = {suite.name: suite for suite in (LLAVOLTA, VISIONZIP, VIDEO_LLAVA)}
#: The values of --suite, for help texts.
FORMS = f"{', '.join(SUITES)}, or tasks of lmms-eval separated by commas"


def read_suite(text: str) -> Suite:
    """Return the suite of that name, or one with the named tasks. Raise `UserError` for a suite that cannot run."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise UserError(f"--suite names nothing; give {FORMS}")
    suite = SUITES.get(names[0]) if len(names) == 1 else None
    if suite is None:
        if mixed := [name for name in names if name in SUITES]:
            raise UserError(f"--suite takes one suite or a list of tasks, not both: {mixed[0]!r} is a suite")
        return Suite(text, "tasks of lmms-eval", tuple(Benchmark(name, name) for name in names))
    if suite.refused:
        raise UserError(f"{suite.name}: {suite.refused}")
    return suite


def no_such_task(name: str, known: Mapping[str, object]) -> UserError:
    """Return the error for a task that lmms-eval does not have."""
    return UserError(
        f"lmms-eval has no task {name!r}{_near(name, known)}; tasks of your own need --include-path FOLDER"
    )


def _near(name: str, known: Mapping[str, object]) -> str:
    suggestion = closest(name, [*known, *SUITES])
    return suggestion if "did you mean" in suggestion else ""  # the list of all tasks has thousands of names


def has_judge() -> bool:
    """Return whether there is a key for the language model that scores some benchmarks."""
    keys = {"openai": "OPENAI_API_KEY", "azure": "AZURE_API_KEY"}
    return bool(os.environ.get(keys.get(os.environ.get("API_TYPE", "openai"), "OPENAI_API_KEY")))


NO_JUDGE = "left out: a language model scores its answers, and OPENAI_API_KEY is not set"
GUESSES = (
    "answers that name no option are judged by a language model; without OPENAI_API_KEY lmms-eval guesses for them"
)
