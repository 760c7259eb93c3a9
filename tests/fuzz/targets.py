"""The targets of fuzzing: valid command lines with the files that they read, and ways to break them."""

from __future__ import annotations

import io
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml
from PIL import ExifTags, Image

from tests.fuzz import changes
from tests.fuzz.process import Case, run
from vlmzip import mini, spec
from vlmzip.compressor_file import write_compressor

PHOTO = Path(__file__).parents[2] / "examples" / "flat.png"
PHOTOS: dict[str, bytes | Path] = {"a.png": PHOTO, "b.png": PHOTO.with_name("cluttered.png")}
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
#: Modes that some formats store differently.
MODES = (("png", "P"), ("png", "I;16"), ("png", "LA"), ("jpeg", "CMYK"), ("tiff", "CMYK"), ("tiff", "F"), ("gif", "P"))
CONFIG = yaml.safe_load("""
model: mini
records: records.json
out: out
images: .
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
QUESTIONS = ["--tasks", "questions.jsonl:exact", "--limit", "2", "--batch", "2", "--out", "out"]
#: Commands that take at most seconds, even if any one word changes.
COMMANDS = (
    ASK,
    [*ASK, "--baseline", "--json", "--overlay", "o.png", "--keep", "25%"],
    [*ASK, "--method", "pool2d", "--factor", "2", "--device", "cpu"],
    ["methods", "visionzip"],
    ["models"],
    ["show", "a.png", "--keep", "9", "--out", "s.png"],
    ["calibrate", "a.png", "--keep", "36", "--method", "dfmr", "--json", "--histogram", "h.png"],
    ["compare", "a.png", QUESTION, "--methods", "visionzip,pool2d", "--repeats", "1", "--max-new-tokens", "1"],
    ["eval", *QUESTIONS, "--methods", "visionzip,pool2d", "--average-keep", "25%", "--report", "--seed", "1"],
    [
        "tune",
        *QUESTIONS,
        "--methods",
        "visionzip,pool2d",
        "--keep",
        "25%,11%",
        "--max-tokens",
        "40",
        "--max-loss",
        "50",
    ],
    ["study", "encoder_attention", *QUESTIONS, "--seed", "1", "--json"],
    ["train", "run.yaml", "--explain", "--shape", "llava-1.5-7b", "--set", "steps=10", "--staircase", "s.png"],
)


@dataclass(frozen=True)
class Target:
    """A kind of input to break."""

    name: str
    bases: Callable[[], list[Case]]
    """A function that returns valid cases, which all end with exit code 0."""
    change: Callable[[random.Random, Case], None]
    """A function that breaks a case in one place."""


# ---------------------------------------------------------------- valid cases


def _commands() -> list[Case]:
    asked, explained = _questions()[0], _explained()[0]
    return [Case(list(command), {**asked.files, **explained.files}) for command in COMMANDS]


def _specs() -> list[Case]:
    return [Case([*ASK, "--method", method], {"a.png": PHOTO}) for method in SPECS]


def _saved() -> list[Case]:
    cases = []
    for method in SPECS[:4]:
        with tempfile.TemporaryDirectory() as folder:
            write_compressor(spec.read(method), folder)
            content = (Path(folder) / "compressor.json").read_bytes()
        cases.append(Case([*ASK, "--method", "compressor.json"], {"a.png": PHOTO, "compressor.json": content}))
    return cases


def _images() -> list[Case]:
    stored = [*((kind, "RGB") for kind in FORMATS), *MODES]
    return [Case(["ask", f"a.{kind}", *ASK[2:]], {f"a.{kind}": drawn(kind, mode)}) for kind, mode in stored]


def drawn(kind: str, mode: str) -> bytes:
    """Return a small image file that uses its format's features: orientation, compression, a second frame."""
    image = Image.open(PHOTO).convert("RGB").resize((48, 40))
    image = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = 6
    more: dict = {"compression": "tiff_lzw"} if kind == "tiff" and mode != "F" else {}
    more |= {"exif": exif} if kind in ("png", "jpeg", "webp", "avif", "tiff") else {}
    more |= {"save_all": True, "append_images": [image.rotate(90)]} if kind in ("gif", "webp", "tiff") else {}
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def _explained() -> list[Case]:
    return [Case(["train", "run.yaml", "--explain", "--json"], {"run.yaml": yaml.safe_dump(CONFIG).encode()})]


def _training() -> list[Case]:
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "orange"}]
    records: list[dict] = [{"id": n, "image": "a.png", "conversations": turns} for n in range(2)]
    records += [{"id": 2, "conversations": [{**turns[0], "value": "what color is the sky ?"}, turns[1]]}]
    cases = []
    for name, text in (("records.json", json.dumps(records)), ("records.jsonl", _lines(records))):
        config = json.dumps(SHORT | {"records": name}).encode()
        cases.append(Case(["train", "run.yaml"], {"a.png": PHOTO, "run.yaml": config, name: text.encode()}))
    return cases


def _questions() -> list[Case]:
    asked = [{"image": name, "question": QUESTION, "answers": ["orange"], "type": "x", "id": name} for name in PHOTOS]
    command = ["eval", "--tasks", "questions.jsonl:exact", "--methods", "visionzip", "--keep", "25%", "--out", "out"]
    return [Case(command, {**PHOTOS, "questions.jsonl": _lines(asked).encode()})]


def _lines(contents: list[dict]) -> str:
    return "".join(json.dumps(content) + "\n" for content in contents)


def _results() -> list[Case]:
    """Return the commands `eval` and `train`, to be run again on the files that they left."""
    cases = []
    for case in (*_questions(), *_training()[:1]):
        with run(case, 120) as outcome:
            assert outcome.code == 0, outcome.stderr
            left = [path for path in outcome.folder.rglob("*") if path.is_file() and path.stat().st_size < 1 << 20]
            files = {str(path.relative_to(outcome.folder)): path.read_bytes() for path in left}
        cases.append(Case(case.arguments, case.files | files))
    return cases


def _store() -> list[Case]:
    """Return commands that read a store, with all its files."""
    encode = ["encode", ".", "--out", "store", "--keep", "16"]
    with run(Case(encode, dict(PHOTOS)), 120) as outcome:
        assert outcome.code == 0, outcome.stderr
        written = [path for path in (outcome.folder / "store").rglob("*") if path.is_file() and path.name != ".lock"]
        files = {str(path.relative_to(outcome.folder)): path.read_bytes() for path in written}
    ask = ["ask", "--store", "store", *ASK[1:]]
    return [Case(words, PHOTOS | files) for words in (ask, ["encode", "--verify", "store"], encode)]


def _model() -> list[Case]:
    files = {f"m/{path.name}": path for path in sorted(mini.weights_folder().iterdir()) if path.name != "README.md"}
    return [Case([*ASK, "--model", "m"], {"a.png": PHOTO, **files})]


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


def _one_file(how: Callable[[random.Random, bytes], bytes], rng: random.Random, case: Case) -> None:
    """Break the subject of the case, its last file."""
    name = list(case.files)[-1]
    case.files[name] = how(rng, case.read(name))


def _yaml(rng: random.Random, old: bytes) -> bytes:
    if rng.random() < 0.2:
        return changes.text(rng, old.decode(errors="replace")).encode(errors="replace")
    try:
        return yaml.safe_dump(changes.tree(rng, yaml.safe_load(old))).encode()
    except (yaml.YAMLError, UnicodeError, RecursionError, ValueError):  # an earlier change broke it
        return changes.data(rng, old)


def _any_file(rng: random.Random, case: Case) -> None:
    name = rng.choice([name for name in case.files if name not in PHOTOS])
    if rng.random() < 0.05:
        del case.files[name]
    else:
        case.files[name] = _by_name(name)(rng, case.read(name))


def _records(rng: random.Random, case: Case) -> None:
    name = list(case.files)[-1]
    case.files[name] = _by_name(name)(rng, case.read(name))


def _by_name(name: str) -> Callable[[random.Random, bytes], bytes]:
    return {".json": changes.json_file, ".jsonl": changes.json_lines}.get(Path(name).suffix, changes.data)


TARGETS = (
    Target("words", _commands, _one_of_the_words),
    Target("specs", _specs, _last_word),
    Target("compressor.json", _saved, partial(_one_file, changes.json_file)),
    Target("images", _images, partial(_one_file, changes.data)),
    Target("yaml", _explained, partial(_one_file, _yaml)),
    Target("records", _training, _records),
    Target("questions", _questions, partial(_one_file, changes.json_lines)),
    Target("results", _results, _any_file),
    Target("model", _model, _any_file),
    Target("store", _store, _any_file),
)
