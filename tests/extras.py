"""Use what an extra brings, in an environment that has nothing else: `make test-extras`.

    python -m tests.extras train

It ends with an error where the installed versions do not fit together, where a package cannot be imported, or where a
command that needs it fails.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from importlib.metadata import files, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
IMAGE = str(ROOT / "examples" / "flat.png")
QUESTION = "what color is the ring ?"


def base(folder):
    vlmzip("ask", IMAGE, QUESTION, "--baseline", "--overlay", str(folder / "tokens.png"))


def train(folder):
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "orange"}]
    (folder / "records.json").write_text(json.dumps([{"image": IMAGE, "conversations": turns}] * 4))
    run = {"model": "mini", "records": "records.json", "out": "out", "schedule": "two-stage"}
    run |= {"steps": 2, "batch": 2, "lora": {"r": 2}}
    (folder / "run.yaml").write_text(json.dumps(run))  # JSON is YAML
    vlmzip("train", "run.yaml", "--explain", "--staircase", "staircase.png", within=folder)
    vlmzip("train", "run.yaml", within=folder)
    assert list((folder / "out").rglob("events.out.tfevents*")), "TensorBoard's log is missing"


def eval(folder):
    usual = [
        "--methods",
        "visionzip",
        "--average-keep",
        "25%",
        "--limit",
        "2",
        "--report",
        "--out",
        str(folder / "eval"),
    ]
    vlmzip("eval", "--tasks", "mini,easy-vqa", *usual)


def video(folder):
    import transformers

    from tests.clips import write_clip
    from vlmzip.lab.conformance.tiny import tiny_model

    write_clip(folder / "clip.mp4")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "src" / "vlmzip" / "mini" / "weights")
    tokenizer.add_tokens(["<|video_pad|>"], special_tokens=True)
    image_id, video_id = tokenizer.convert_tokens_to_ids([tokenizer.image_token, "<|video_pad|>"])
    changes = {"text_config.vocab_size": len(tokenizer), "image_token_id": image_id, "video_token_id": video_id}
    size = dict(patch_size=4, merge_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 32 * 32})
    processor = transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(**size),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(**size),
        chat_template="{% for part in messages[0].content %}"
        "{{ {'image': '<image>', 'video': '<|video_pad|>', 'text': part.text}[part.type] }} {% endfor %}",
    )
    for part in (processor, tiny_model(transformers.Qwen2_5_VLForConditionalGeneration, changes)):
        part.save_pretrained(folder / "model")
    usual = ["--model", str(folder / "model"), "--frames", "6", "--keep-per-view", "4"]
    vlmzip("ask", "clip.mp4", QUESTION, *usual, "--overlay", "tokens.png", within=folder)
    vlmzip("show", "clip.mp4", "--method", "visionzip", *usual, within=folder)


def lmms(folder):
    from tests.lmms.mini_as_task import write_task

    write_task(folder / "tasks", 2)
    suite = ["--suite", "mini_exact", "--include-path", str(folder / "tasks")]
    vlmzip("eval", *suite, "--methods", "visionzip", "--average-keep", "25%", "--out", str(folder / "lmms"))


def serve(folder):
    from urllib.request import Request, urlopen

    from tests.serving.server.running import asking, serving
    from vlmzip.methods import VisionZip
    from vlmzip.runtime.loading import load
    from vlmzip.serving.server.metrics import Metrics
    from vlmzip.serving.server.settings import Settings
    from vlmzip.serving.server.worker import HuggingFaceEngine

    settings, metrics = Settings(), Metrics()
    with serving(HuggingFaceEngine(load("mini"), VisionZip(), settings, metrics), settings, metrics) as address:
        body = json.dumps(asking()).encode()
        request = Request(f"{address}/v1/chat/completions", body, {"Content-Type": "application/json"})
        with urlopen(request) as answer:
            assert json.load(answer)["choices"][0]["message"]["content"] == "orange"


def playground(folder):
    from tests.serving.playground.running import serving_page, submit
    from tests.serving.server.running import image_url
    from vlmzip.runtime.loading import load

    with serving_page(load("mini")) as (address, _):
        assert '<p class="vz-answer">orange' in submit(address, image_url(), ["visionzip"])


def completion(folder):
    line = {"COMP_LINE": "vlmzip comp", "COMP_POINT": "11", "COMP_TYPE": "9"}
    words = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(folder / "words")}
    subprocess.run([beside_python("vlmzip")], env=os.environ | words | line, check=True)
    assert (folder / "words").read_text().strip() == "compare"


def store(folder):
    vlmzip("encode", "examples", "--out", str(folder / "store"), "--keep", "36")
    vlmzip("ask", "--store", str(folder / "store"), "flat.png", QUESTION)
    vlmzip("encode", "--verify", str(folder / "store"))


def ray(folder):
    usual = ["--out", str(folder / "store"), "--shard", "1", "--batch", "1"]
    vlmzip("encode", "examples", *usual, "--workers", "2")
    vlmzip("encode", "examples", *usual)
    vlmzip("encode", "--verify", str(folder / "store"))


def dev(folder):
    call(sys.executable, "-m", "pytest", "-q", "-n", "1", "tests/test_spec.py")
    for tool in ("ruff", "mypy", "pre-commit"):
        call(beside_python(tool), "--version")


def docs(folder):
    call(beside_python("mkdocs"), "build", "--strict", "--quiet", "--site-dir", str(folder / "site"))
    assert (folder / "site" / "api" / "methods.html").exists()


#: `base` is an installation without extras.
USES = {
    "base": [base],
    "train": [train],
    "eval": [eval],
    "lmms": [lmms],
    "video": [video],
    "completion": [completion],
    "serve": [serve],
    "playground": [playground],
    "vllm": [],  # `make test-vllm` installs a build for the CPU
    "store": [store],
    "ray": [store, ray],
    "docs": [docs],
    "dev": [dev],  # the environments of the extras that it brings use those
}


def vlmzip(*arguments, within=ROOT):
    call(beside_python("vlmzip"), *arguments, within=within)


def beside_python(tool):
    return Path(sys.executable).with_name(tool)


def call(*command, within=ROOT):
    print("+", *command, flush=True)
    subprocess.run(command, cwd=within, check=True)


def brought(extra):
    """The top-level modules of the packages that an extra names."""
    named = [Requirement(line) for line in requires("vlmzip")]
    names = {canonicalize_name(one.name) for one in named if one.marker and one.marker.evaluate({"extra": extra})}
    for module, distributions in packages_distributions().items():
        if names & {canonicalize_name(one) for one in distributions} and not module.endswith("__mypyc"):
            yield module


def check_wheel():
    """Compare what the wheel installed with the package's folder: no file is missing, and none is beside it."""
    installed = {file.as_posix() for file in files("vlmzip") if file.suffix != ".pyc" and ".." not in file.parts}
    installed = {name for name in installed if not name.partition("/")[0].endswith(".dist-info")}
    source = [path for path in (ROOT / "src" / "vlmzip").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    differing = installed ^ {path.relative_to(ROOT / "src").as_posix() for path in source}
    assert not differing, f"the wheel and src/vlmzip differ: {sorted(differing)}"


def main(extra):
    call(sys.executable, "-m", "pip", "check")
    found = import_module("vlmzip").__file__
    assert Path(found).is_relative_to(sys.prefix), f"vlmzip comes from {found}, not from this environment"
    check_wheel()
    for module in brought(extra):
        import_module(module)
    report = subprocess.run([beside_python("vlmzip"), "doctor", "--json"], capture_output=True, text=True, check=True)
    lacking = {use["name"]: use["missing"] for use in json.loads(report.stdout)["uses"] if use["extra"] == extra}
    assert not any(lacking.values()), f"`vlmzip doctor` misses packages: {lacking}"
    for use in USES[extra]:
        with tempfile.TemporaryDirectory() as folder:
            use(Path(folder))


if __name__ == "__main__":
    main(sys.argv[1])
