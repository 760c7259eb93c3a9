"""Run lmms-eval for each configuration and benchmark. Completed benchmarks are not run again.

In the output folder, `suite.json` says which model was asked and how. results/TASK/COMPRESSOR.json holds lmms-eval's
results and the costs of every request. Result files are written whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeGuard, cast

from vlmzip import spec
from vlmzip.errors import UserError, how_to_install, reason
from vlmzip.lab.answers import AnswerStore
from vlmzip.lab.attacher import Attacher
from vlmzip.lab.configurations import Configuration, Configurator, read_calibrated
from vlmzip.lab.lmms.requests import NO_LIKELIHOODS, AnswerFailed
from vlmzip.lab.lmms.suites import NO_JUDGE, Benchmark, Suite, has_judge, no_such_task
from vlmzip.lab.machine import about
from vlmzip.lab.names import slug
from vlmzip.lab.records import is_count, is_number, is_text
from vlmzip.lab.tasks.metrics import METRICS
from vlmzip.lab.tasks.task import CalibrationSet, Task
from vlmzip.processes import Processes
from vlmzip.progress import Work
from vlmzip.runtime.answering import Answerer
from vlmzip.runtime.fingerprint import of_files, of_model, of_name, refuse_changed
from vlmzip.runtime.loading import Loaded
from vlmzip.spec import Candidate
from vlmzip.version import __version__

if TYPE_CHECKING:  # lmms-eval is an extra
    from lmms_eval.tasks import TaskManager

    from vlmzip.lab.lmms.adapter import CompressedForLmms

log = logging.getLogger(__name__)

FILE = "suite.json"
RESULTS = "results"
INSTALL = f"--suite needs lmms-eval, which is large: {how_to_install('lmms')}"
#: A task's value for a question that its judge did not answer. lmms-eval would count it as a wrong answer.
UNJUDGED = ("", "Failed Request")

Content = dict[str, object]


class StoredResult(TypedDict, total=False):
    """The content of a result file. There are further fields, such as the conditions."""

    task: str
    method: str
    results: dict[str, float]
    questions: int
    visual_tokens: float
    retention: float


class RequestCosts(TypedDict):
    """The costs of a round, as the adapter gave them to lmms-eval. There are further fields."""

    visual_tokens: int
    retention: float


class LmmsSample(TypedDict):
    """A question of lmms-eval with its answer. There are further fields, such as a verdict by each metric's name."""

    doc_id: int
    filtered_resps: list[object]
    token_counts: list[RequestCosts | None]
    """The costs that the adapter gave for each round; `None` for unknown costs."""


def import_lmms_eval() -> None:
    """Raise `UserError` if lmms-eval is not installed or cannot be imported."""
    if find_spec("lmms_eval") is None:
        raise UserError(INSTALL)
    try:
        import lmms_eval.evaluator  # noqa: F401
        from loguru import logger
    except Exception as error:  # for example, a broken torchvision
        raise UserError(f"lmms-eval cannot be imported: {reason(error)}") from error
    logger.remove()  # it logs dozens of lines for each benchmark
    logger.add(sys.stderr, level="ERROR", format="lmms-eval: {message}")


@dataclass
class SuiteRun:
    """A run of one suite with one model in one output folder."""

    loaded: Loaded
    suite: Suite
    folder: Path
    batch: int
    limit: int | None
    include: str | None = None
    """A folder with further tasks in lmms-eval's format."""
    _loaded_tasks: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._attacher = Attacher(self.loaded.model, self.loaded.name)
        self._store = AnswerStore(self.folder, FILE, Processes(), content=RESULTS)
        for benchmark in self.suite.benchmarks:
            kind = self._manager.task_index.get(benchmark.task, {}).get("type")
            if kind is None:
                raise no_such_task(benchmark.task, self._manager.task_index)
            if kind not in ("task", "python_task"):
                raise UserError(f"{benchmark.task!r} is a {kind} of tasks in lmms-eval: name the tasks that you want")

    @cached_property
    def _manager(self) -> TaskManager:
        from lmms_eval.tasks import TaskManager

        if self.include is not None:  # reading all of lmms-eval's task files is slow
            included = TaskManager("ERROR", include_path=self.include, include_defaults=False, model_name="vlmzip")
            if all(benchmark.task in included.task_index for benchmark in self.suite.benchmarks):
                return included
        return TaskManager("ERROR", include_path=self.include, model_name="vlmzip")

    @property
    def conditions(self) -> dict[str, str]:
        """Return the conditions of a result: model, versions and machine."""
        model = self.loaded.model
        return {
            "model": self.loaded.name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "vlmzip": __version__,
            "lmms_eval": version("lmms-eval"),
            **about(model.device),
        }

    def configure(
        self,
        methods: Sequence[Candidate],
        budgets: Sequence[str],
        calibration: CalibrationSet | None,
        uncalibrated: str,
    ) -> list[Configuration]:
        """Return the uncompressed model and all methods at all budgets, and write them to the folder.

        Budgets are set once for all benchmarks, for images of the model's own size. Raise `UserError` if the folder
        holds results of another model or for another number of questions.
        """
        known = self._store.open(self._identity, "results of other conditions")
        loaded = self.loaded
        configurator = Configurator(
            loaded.model,
            Answerer(loaded.family, loaded.processor),
            loaded.name,
            read_calibrated(self.folder / FILE, known),
        )
        every = Task("suite", self.suite.about, METRICS["exact"], (), 0, calibration, uncalibrated)
        configurations = list(configurator.rows(every, methods, budgets))
        content = {"model": self.loaded.name, **self._identity, "calibrated": configurator.calibrated}
        self._store.note(content)
        return configurations

    @cached_property
    def _identity(self) -> dict[str, object]:
        """Return what all results in the folder depend on. Which questions a benchmark has is not checked."""
        return {
            **of_name(self.loaded.name),
            "limit": self.limit,
            "lmms_eval": version("lmms-eval"),
            "tasks of your own": "" if self.include is None else of_files(task_files(Path(self.include))),
            **of_model(self.loaded.model, self.loaded.processor),
        }

    def run(self, configurations: Sequence[Configuration]) -> None:
        """Run everything without a result, the uncompressed model first.

        Raise `UserError` with the benchmark that cannot be fetched or scored, and `AnswerFailed` if the model or the
        method breaks. Results so far are kept in both cases.
        """
        runs = {
            configuration.file_stem: configuration
            for configuration in configurations
            if configuration.compressor is not None
        }
        benchmarks = {benchmark.task: benchmark for benchmark in self.suite.benchmarks if not self.left_out(benchmark)}
        pairs = [(configuration, benchmark) for configuration in runs.values() for benchmark in benchmarks.values()]
        missing = [self.result(benchmark, configuration) is None for configuration, benchmark in pairs]
        work = Work("answering", sum(missing))  # within a benchmark, the adapter shows a bar
        for number, (configuration, benchmark) in enumerate(pairs, 1):
            if not missing[number - 1]:
                continue
            start = time.perf_counter()
            result = self._evaluate(benchmark, configuration)
            self._store.write_json(self._file(benchmark.task, configuration), result)
            work.advance()
            done = f"{result['questions']:,} in {time.perf_counter() - start:.0f} s"
            left = f", {work.left}" if work.left else ""
            log.info(f"[{number}/{len(pairs)}] {benchmark.task}, {result['method']}: {done}{left}")

    def left_out(self, benchmark: Benchmark) -> str:
        """Return why a benchmark is not run, or ""."""
        return NO_JUDGE if benchmark.judge == "always" and not has_judge() else ""

    def result(self, benchmark: Benchmark, configuration: Configuration) -> StoredResult | None:
        """Return the stored result, or `None`. Raise `UserError` for a file that is not this configuration's."""
        path = self.folder / self._file(benchmark.task, configuration)
        if not path.exists():
            return None
        stored = self._store.read_json(self._file(benchmark.task, configuration), "move it away")
        if stored.get("task") != benchmark.task or stored.get("compressor") != configuration.settings:
            raise UserError(f"{str(path)!r} is not a result of {benchmark.task} with these settings; move it away")
        if wrong := wrong_result(stored):
            raise UserError(f"{str(path)!r} is not a result of vlmzip: {wrong}; move it away")
        refuse_changed(
            f"{str(path)!r} is a result of another {stored['method']}", stored, self._attacher.identity(configuration)
        )
        return cast(StoredResult, stored)

    def _file(self, task: str, configuration: Configuration) -> str:
        """Return the path of a result in the folder."""
        return f"{RESULTS}/{slug(task)}/{configuration.file_stem}.json"

    def _evaluate(self, benchmark: Benchmark, configuration: Configuration) -> Content:
        from vlmzip.lab.lmms.adapter import CompressedForLmms

        written, identity = spec.write(configuration.chosen), self._attacher.identity(configuration)
        compressed = self._attacher.attach(configuration.chosen)
        try:
            model = CompressedForLmms(compressed, self.loaded.processor, self.batch)
            scores, samples = self._ask(benchmark.task, model)
        except AnswerFailed as error:
            raise AnswerFailed(f"{written} broke on {error}") from error
        finally:
            compressed.detach()
        _check_judged(benchmark, samples)
        return {
            "task": benchmark.task,
            "method": written,
            "compressor": configuration.settings,
            **identity,
            "results": {key: float(value) for key, value in scores.items() if _is_finite(value)},
            "questions": len(samples),
            **_costs(samples),
            "batch": self.batch,
            **self.conditions,
            "requests": [_request(sample) for sample in samples],
        }

    def _ask(self, task: str, model: CompressedForLmms) -> tuple[dict[str, object], list[LmmsSample]]:
        """Return lmms-eval's results of one task and its samples, sorted by document."""
        from lmms_eval.evaluator import simple_evaluate

        ready = self._load(task)
        try:
            with _quietly():
                out = simple_evaluate(
                    model=model, tasks=[ready], task_manager=self._manager, limit=self.limit,
                    batch_size=self.batch, bootstrap_iters=0, verbosity="ERROR",
                    cli_args=Namespace(output_path=str(self.folder), process_with_media=False),
                )  # fmt: skip
        except (AnswerFailed, KeyboardInterrupt):
            raise
        except Exception as error:
            raise UserError(f"lmms-eval could not score {task}: {_why(error)}") from error
        first = {sample["doc_id"]: sample for sample in reversed(out["samples"][task])}
        return out["results"][task], [first[number] for number in sorted(first)]

    def _load(self, task: str) -> object:
        """Return lmms-eval's task with its questions. Raise `UserError` if it is unavailable or needs likelihoods."""
        if task in self._loaded_tasks:
            return self._loaded_tasks[task]
        log.info(f"fetching {task}")
        try:
            with _quietly():
                loaded = self._manager.load_task_or_group([task], task_type="chat")[task]
        except Exception as error:  # no network, no access, or an invalid task file
            raise UserError(
                f"lmms-eval cannot get the benchmark {task}: {_why(error)}; finished benchmarks are kept:"
                " run the same command again to resume"
            ) from error
        if not str(loaded.OUTPUT_TYPE).startswith("generate_until"):
            raise UserError(f"{task} {NO_LIKELIHOODS}")
        self._loaded_tasks[task] = loaded
        return loaded


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Redirect the tables that tasks print to stderr, because stdout is for vlmzip's output."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _why(error: BaseException) -> str:
    """Return the reason for an error. lmms-eval wraps download errors in one that only says that it tried again."""
    attempt = getattr(error, "last_attempt", None)
    behind = attempt.exception() if attempt is not None else None
    return _why(behind) if behind is not None else reason(error) if isinstance(error, Exception) else str(error)


def _check_judged(benchmark: Benchmark, samples: Sequence[LmmsSample]) -> None:
    """Raise `UserError` if the judge left answers without a score: lmms-eval counts them as 0."""
    if benchmark.judge != "always":
        return
    judged = [sample.get(metric) for sample in samples for metric in benchmark.metrics]
    failed = [verdict for verdict in judged if isinstance(verdict, dict) and _unjudged(verdict)]
    if failed:
        raise UserError(
            f"the judge of {benchmark.task} gave no score for {len(failed)} of {len(samples)} answers, which would"
            " count as wrong; check OPENAI_API_KEY, MODEL_VERSION and your quota"
        )


def _unjudged(verdict: Content) -> bool:
    scores = verdict.get("scores")
    return verdict.get("eval_model") in UNJUDGED or (isinstance(scores, list) and -1 in scores)


def _request(sample: LmmsSample) -> Content:
    """Return the stored part of a question: the answer and its costs."""
    costs = sample["token_counts"][0] if sample["token_counts"] else None
    answers = sample["filtered_resps"]
    return {"document": sample["doc_id"], "given": answers[0] if len(answers) == 1 else answers, **(costs or {})}


def _costs(samples: Sequence[LmmsSample]) -> Content:
    """Return the mean costs of the questions with an image; `None` for unknown costs, as in several rounds."""
    firsts = [sample["token_counts"][0] for sample in samples if sample["token_counts"]]
    costs = [cost for cost in firsts if cost and cost["visual_tokens"]]
    if not costs:
        return {"visual_tokens": None, "retention": None}
    return {
        "visual_tokens": round(sum(cost["visual_tokens"] for cost in costs) / len(costs), 6),
        "retention": round(sum(cost["retention"] for cost in costs) / len(costs), 6),
    }


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def wrong_result(result: Content) -> str:
    """Return what is wrong with a result that was read; an empty text if nothing is."""
    scores = result.get("results")
    if not isinstance(scores, dict) or not all(map(is_number, scores.values())):
        return "its results are not numbers by name"
    if not is_text(result.get("method")):
        return "its method is not a text"
    if not is_count(result.get("questions")):
        return "its questions is not a whole number"
    costs = [result.get(name) for name in ("visual_tokens", "retention")]
    known = all(is_number(cost) and cost >= 0 for cost in costs)
    return "" if known or costs == [None, None] else "its visual_tokens and retention are not numbers from 0"


def task_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml", ".py"))
