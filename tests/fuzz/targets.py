"""What is fuzzed: command lines and the files that they read, valid ones, and the ways to break them."""

from __future__ import annotations

import io
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from PIL import Image

from tests.fuzz import changes
from tests.fuzz.process import Case, run
from vlmzip import mini, spec
from vlmzip.runtime.saving import write_compressor

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTION = "what color is the ring ?"
ASK = ["ask", "a.png", QUESTION, "--max-new-tokens", "1"]
SPECS = (
    "visionzip",
    "visionzip(dominant=10,contextual=6)",
    "dfmr(tau=0.3)+fastv(layer=3)",
    "pool2d(factor=2)+fastv(layer=1)",
    "sparsevlm",
    "kmeans(keep=16)",
    "downsample(keep=36)",
    "llavolta(layer=2,stride=4)",
    "random_tokens(keep=9,site=in_llm)",
)
FORMATS = ("png", "jpeg", "gif", "webp", "tiff", "bmp", "avif", "ppm", "ico", "tga", "pcx", "jpeg2000")
CONFIG = yaml.safe_load("""
model: mini
records: records.json
out: out
pictures: .
learn: [projector, llm]
schedule:
  stages:
  - {compressor: "llavolta(layer=1,stride=4)", share: 50%}
  - {compressor: none, share: 50%}
lora: {r: 4, alpha: 8, dropout: 0.0}
fraction: 100%
steps: 1
batch: 2
batch_per_process: 1
learning_rate: 0.001
warmup: 0.1
weight_decay: 0.0
precision: bf16
weights: float32
attention: sdpa
gradient_checkpointing: false
max_length: 300
group_by_length: true
save_every: 5
checkpoints: 2
log_every: 1
workers: 0
seed: 0
sharding: none
text_tokens: 62
evaluation: {every: 1, task: mini, limit: 2, compressor: visionzip}
trainer: {max_grad_norm: 0.5, adam_beta2: 0.9, lr_scheduler_type: linear, optim: sgd, report_to: []}
""")
SHORT = {name: CONFIG[name] for name in ("model", "records", "out", "steps", "batch", "max_length", "save_every")}
#: Commands that take seconds at most, whatever becomes of a word of theirs.
COMMANDS = (
    ASK,
    [*ASK, "--baseline", "--json", "--overlay", "o.png", "--keep", "25%"],
    [*ASK, "--method", "pool2d", "--factor", "2", "--device", "cpu"],
    ["methods", "visionzip"],
    ["models"],
    ["show", "a.png", "--keep", "9", "--out", "s.png"],
    ["calibrate", "a.png", "--keep", "36", "--method", "dfmr", "--json", "--histogram", "h.png"],
    ["compare", "a.png", QUESTION, "--methods", "visionzip,pool2d", "--repeats", "1", "--max-new-tokens", "1"],
)


@dataclass(frozen=True)
class Target:
    name: str
    bases: Callable[[], list[Case]]
    """Valid cases: each ends with 0."""
    change: Callable[[random.Random, Case], None]
    """Breaks a case in one place."""


def targets() -> Iterator[Target]:
    photo: dict[str, bytes | Path] = {"a.png": EXAMPLES / "flat.png"}
    yield Target("words", lambda: [Case(list(one), dict(photo)) for one in COMMANDS], _one_of_the_words)
    yield Target("specs", lambda: [Case([*ASK, "--method", one], dict(photo)) for one in SPECS], _last_word)
    yield Target("compressor.json", lambda: [_saved(one) for one in SPECS[:4]], _json_of("compressor.json"))
    yield Target(
        "images", lambda: [Case([*ASK[:1], f"a.{one}", *ASK[2:]], {f"a.{one}": drawn(one)}) for one in FORMATS], _image
    )
    explain = ["train", "run.yaml", "--explain", "--json"]
    yield Target("yaml", lambda: [Case(list(explain), {"run.yaml": yaml.safe_dump(CONFIG).encode()})], _yaml)
    yield Target("records", lambda: [_training(), _training(".jsonl")], _records)
    yield Target("questions", lambda: [_questions()], _jsonl_of("questions.jsonl"))
    yield Target("results", _results, _any_file)
    yield Target("model", lambda: [_model()], _any_file)


# ---------------------------------------------------------------- valid cases


def _saved(written: str) -> Case:
    with tempfile.TemporaryDirectory() as folder:
        write_compressor(spec.read(written), folder)
        content = (Path(folder) / "compressor.json").read_bytes()
    return Case([*ASK, "--method", "compressor.json"], {"a.png": EXAMPLES / "flat.png", "compressor.json": content})


def drawn(kind: str) -> bytes:
    image = Image.open(EXAMPLES / "flat.png").convert("RGB").resize((48, 40))
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def _training(ending: str = ".json") -> Case:
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "orange"}]
    records = [{"id": n, "image": "a.png", "conversations": turns} for n in range(2)]
    records += [{"id": 2, "conversations": [{**turns[0], "value": "what color is the sky ?"}, turns[1]]}]
    text = "\n".join(map(json.dumps, records)) + "\n" if ending == ".jsonl" else json.dumps(records)
    name = f"records{ending}"
    config = json.dumps(SHORT | {"records": name}).encode()
    return Case(["train", "run.yaml"], {"a.png": EXAMPLES / "flat.png", name: text.encode(), "run.yaml": config})


def _questions() -> Case:
    lines = [{"image": "a.png", "question": QUESTION, "answers": ["orange"], "type": "x", "id": n} for n in range(3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    command = ["eval", "--tasks", "questions.jsonl:exact", "--methods", "visionzip", "--keep", "25%", "--out", "out"]
    return Case(command, {"a.png": EXAMPLES / "flat.png", "questions.jsonl": text.encode()})


def _results() -> list[Case]:
    """What a finished `eval` and a finished `train` left, and the same commands again."""
    found = []
    for case in (_questions(), _training()):
        with run(case, 120) as outcome:
            assert outcome.code == 0, outcome.stderr
            left = [path for path in outcome.folder.rglob("*") if path.is_file() and path.stat().st_size < 1 << 20]
            files = {str(path.relative_to(outcome.folder)): path.read_bytes() for path in left}
        found.append(Case(case.arguments, case.files | files))
    return found


def _model() -> Case:
    files = {f"m/{path.name}": path for path in sorted(mini.weights_folder().iterdir()) if path.name != "README.md"}
    return Case([*ASK, "--model", "m"], {"a.png": EXAMPLES / "flat.png", **files})


# ---------------------------------------------------------------- ways to break them


def _one_of_the_words(rng: random.Random, case: Case) -> None:
    words = case.arguments
    place = rng.randrange(len(words))
    how = rng.random()
    if how < 0.6:
        words[place] = changes.text(rng, words[place]).replace("\0", "")
    elif how < 0.8:
        words.insert(place, rng.choice((*words, rng.choice(changes.WORDS))))
    else:
        del words[place]
    words[:] = words or ["--version"]


def _last_word(rng: random.Random, case: Case) -> None:
    case.arguments[-1] = changes.text(rng, case.arguments[-1])


def _json_of(name: str) -> Callable[[random.Random, Case], None]:
    def change(rng: random.Random, case: Case) -> None:
        case.files[name] = changes.json_file(rng, case.read(name))

    return change


def _jsonl_of(name: str) -> Callable[[random.Random, Case], None]:
    def change(rng: random.Random, case: Case) -> None:
        case.files[name] = changes.json_lines(rng, case.read(name))

    return change


def _image(rng: random.Random, case: Case) -> None:
    (name,) = case.files
    case.files[name] = changes.data(rng, case.read(name))


def _yaml(rng: random.Random, case: Case) -> None:
    old = case.read("run.yaml")
    try:
        new = yaml.safe_dump(changes.tree(rng, yaml.safe_load(old))).encode()
    except (yaml.YAMLError, UnicodeError, RecursionError, ValueError):
        new = changes.data(rng, old)
    case.files["run.yaml"] = (
        new if rng.random() < 0.8 else changes.text(rng, old.decode(errors="replace")).encode(errors="replace")
    )


def _records(rng: random.Random, case: Case) -> None:
    (name,) = (name for name in case.files if name.startswith("records"))
    how = changes.json_lines if name.endswith(".jsonl") else changes.json_file
    case.files[name] = how(rng, case.read(name))


def _any_file(rng: random.Random, case: Case) -> None:
    name = rng.choice([name for name in case.files if name != "a.png"])
    how = changes.json_file if name.endswith(".json") else changes.data
    how = changes.json_lines if name.endswith(".jsonl") else how
    if rng.random() < 0.05:
        del case.files[name]
    else:
        case.files[name] = how(rng, case.read(name))
