"""Two processes on the CPU against one: losses, weights, stages and checkpoints, with copied and with sharded weights.

All runs of two processes are made in two launches, the first of which is killed. The tests check the files they left.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.families import FAMILIES, tiny_llava
from tests.training.runs import losses, stages, write_config, write_run
from vlmzip import NoCompression, UserError
from vlmzip.cli.main import main
from vlmzip.runtime.attach import attach
from vlmzip.training.run import _save
from vlmzip.training.sharding import check_sharded

pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.slow,
    # peft reads `is_gradient_checkpointing`; the Q-Former is trained here
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is untrained"),
]
WORKER = Path(__file__).with_name("worker.py")
#: Random numbers of visual tokens; attention that is read in a hook inside the LLM; pooled hidden states.
STAGES = ["random_factor(per=step)", "fastv", "llavolta(layer=1,stride=4)"]
USUAL = {"schedule": {"stages": [{"compressor": one} for one in STAGES]}, "save_every": 3}
#: One record per forward, so that one process has the record without image while the other has an image.
SINGLY = {"batch_per_process": 1}
FSDP = {"sharding": "fsdp", **SINGLY}
LORA = {"lora": {"r": 4, "alpha": 8, "dropout": 0.0}, "learn": ["vision", "projector", "llm"]}
#: No checkpoints: a checkpoint after the last evaluation would reshard the weights that the evaluation has gathered.
UNSAVED = {"trainer": {"save_strategy": "no"}}
EVALUATED = {"precision": "bf16", "evaluation": {"every": 4, "task": "QUESTIONS:exact"}, "steps": 4, **UNSAVED}
QFORMER = {"schedule": "qformer(queries=4,width=32,heads=2,depth=2)", "learn": "projector", "steps": 3}
ALONE = {"one": {}, "lora-one": LORA, "qformer-one": QFORMER, "evaluated-one": EVALUATED}
TOGETHER = {
    "ddp": SINGLY | {"gradient_checkpointing": True},
    "fsdp": FSDP,
    "killed": FSDP | {"save_every": 1},
    "one-fsdp": FSDP | {"gradient_checkpointing": True},
    "one-ddp": {},
    "lora-fsdp": LORA | FSDP,
    "qformer-fsdp": QFORMER | FSDP,
    "evaluated-fsdp": EVALUATED | FSDP,
    "evaluated-ddp": EVALUATED | {"schedule": "random_factor"},
}


class Launch:
    """Two processes that train one configuration after another."""

    def __init__(self, *configs):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, WORKER, *configs],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]

    def kill_when(self, path):
        while not path.exists():
            assert all(process.poll() is None for process in self.processes), self.said()
            time.sleep(0.01)
        for process in self.processes:
            process.kill()
        self.said()

    def said(self):
        return "".join(process.communicate()[1] for process in self.processes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a folder with all runs: NAME.yaml and the run's folder NAME."""
    folder = tmp_path_factory.mktemp("processes")
    write_run(folder)
    (folder / "questions").mkdir()
    shutil.copy(folder / "0.png", folder / "questions")
    asked = [{"image": "0.png", "question": word, "answers": ["w50"]} for word in ("w9", "w10 w11", "w12")]
    # These are correct if the answer is the question, as in worker.py.
    asked[1]["answers"], asked[2]["answers"] = ["w10 w11"], ["w12"]
    (folder / "questions" / "q.jsonl").write_text("\n".join(map(json.dumps, asked)))
    configs = {}
    for name, settings in (ALONE | TOGETHER).items():
        path = write_config(folder, f"{name}.yaml", out=str(folder / name), **USUAL | settings)
        path.write_text(path.read_text().replace("QUESTIONS", str(folder / "questions")))
        configs[name] = str(path)
    killed = Launch(configs["killed"])
    for name in ALONE:
        assert main(["train", configs[name]]) == 0
    killed.kill_when(folder / "killed" / "checkpoint-3" / "whole")
    cut_short(folder / "one", folder / "one-fsdp")
    cut_short(folder / "one", folder / "one-ddp")
    launch = Launch(*(configs[name] for name in TOGETHER))
    said = launch.said()
    assert [process.returncode for process in launch.processes] == [0, 0], said[-5000:]
    return folder


def cut_short(complete, out):
    """Copy a run as if it had stopped after its third step."""
    shutil.copytree(complete, out)
    shutil.rmtree(out / "checkpoint-6")
    shutil.rmtree(out / "model")


def seen(out):
    """Return the lines that each of the two processes wrote."""
    return [[json.loads(line) for line in (out / f"seen-{rank}.jsonl").open()] for rank in range(2)]


def forwards(out):
    return [[line for line in lines if "step" in line] for lines in seen(out)]


def same_weights(one, other, tolerance=2e-5):
    ours, theirs = load_file(one / "model" / "model.safetensors"), load_file(other / "model" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.endswith("k_proj.bias") and tolerance:
            continue  # softmax cancels it: its gradients are rounding errors, which Adam scales up like any other
        torch.testing.assert_close(ours[name], theirs[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns(runs, name):
    """With accumulation, and with a forward in which one process has only text and the other an image."""
    blank = [[line["blank"] for line in lines] for lines in forwards(runs / name)]
    assert len(blank[0]) == len(blank[1]) == 12
    assert sum(blank[0]) + sum(blank[1]) == 1
    assert losses(runs / name) == pytest.approx(losses(runs / "one"), rel=1e-6)
    assert stages(runs / name) == stages(runs / "one")
    same_weights(runs / name, runs / "one")


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_stages_switch_on_the_same_step_in_every_process(runs, name):
    """All forwards of a step draw the same factor, too."""
    steps = [[(line["step"], line["compressor"].split("(")[0]) for line in lines] for lines in forwards(runs / name)]
    methods = ["pool2d"] * 4 + ["fastv"] * 4 + ["llavolta"] * 4
    assert steps[0] == steps[1] == [(n // 2, method) for n, method in enumerate(methods)]
    whole = [[line["compressor"] for line in lines] for lines in forwards(runs / name)]
    assert whole[0] == whole[1]


def test_each_process_holds_half_of_the_parameters(runs):
    """Frozen parameters are sharded, too."""
    count = sum(parameter.numel() for parameter in tiny_llava().parameters())
    first, second = [{line["held"] for line in lines} for lines in forwards(runs / "fsdp")]
    assert first | second != {count}
    assert sum(first) + sum(second) == count
    assert max(first) < 0.55 * count
    assert {line["held"] for line in forwards(runs / "ddp")[0]} == {count}


def test_killed_and_started_again(runs):
    """After `kill -9` of both in the second stage, the losses are those of a run that was never stopped."""
    steps = [line["step"] for line in forwards(runs / "killed")[0]]
    assert steps.count(0) == 2  # the first launch's two forwards; the second launch did not begin anew
    assert losses(runs / "killed") == losses(runs / "fsdp")
    same_weights(runs / "killed", runs / "fsdp", tolerance=0)


@pytest.mark.parametrize("name", ["one-ddp", "one-fsdp"])
def test_two_processes_resume_the_run_of_one(runs, name):
    assert {line["step"] for line in forwards(runs / name)[0]} == {3, 4, 5}
    assert losses(runs / name) == pytest.approx(losses(runs / "one"), rel=1e-6)
    same_weights(runs / name, runs / "one")


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_one_process_resumes_the_run_of_two(runs, tmp_path, capsys, name):
    cut_short(runs / name, tmp_path / "out")
    settings = USUAL | TOGETHER[name] | {"out": str(tmp_path / "out")}
    assert main(["train", str(write_config(runs, f"{name}-again.yaml", **settings))]) == 0
    assert "resuming from" in capsys.readouterr().err
    assert losses(tmp_path / "out") == pytest.approx(losses(runs / "one"), rel=1e-6)
    same_weights(tmp_path / "out", runs / "one")


@pytest.mark.parametrize("method", ["lora", "qformer"])
def test_adapters_and_weights_of_a_method_are_sharded_and_saved_whole(runs, method):
    assert losses(runs / f"{method}-fsdp") == pytest.approx(losses(runs / f"{method}-one"), rel=1e-6)
    same_weights(runs / f"{method}-fsdp", runs / f"{method}-one")
    resamplers = [runs / f"{method}-{how}" / "model" / "resampler.safetensors" for how in ("one", "fsdp")]
    assert [path.exists() for path in resamplers] == [method == "qformer"] * 2
    if method == "qformer":
        ours, theirs = map(load_file, resamplers)
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_evaluation_with_sharded_weights(runs):
    """The evaluation runs in bfloat16 after the last step; the saved weights are float32."""
    answers = [[line["answers"] for line in lines if "answers" in line] for lines in seen(runs / "evaluated-fsdp")]
    assert answers[0] == answers[1]
    assert [len(batch) for batch in answers[0]] == [3]
    scored = [[line for line in map(json.loads, (runs / name / "log.jsonl").open()) if "eval_score" in line]
              for name in ("evaluated-fsdp", "evaluated-one")]  # fmt: skip
    assert scored[0] == scored[1]
    assert losses(runs / "evaluated-fsdp") == pytest.approx(losses(runs / "evaluated-one"), rel=0.01)
    saved = load_file(runs / "evaluated-fsdp" / "model" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    same_weights(runs / "evaluated-fsdp", runs / "evaluated-one", tolerance=0.02)


def test_evaluation_is_divided_among_processes(runs):
    """The first process gets two questions, the second gets one; the score is over all three."""
    answers = [[line["answers"] for line in lines if "answers" in line] for lines in seen(runs / "evaluated-ddp")]
    assert answers == [[["w9", "w10 w11"]], [["w12"]]]
    scored = [line for line in map(json.loads, (runs / "evaluated-ddp" / "log.jsonl").open()) if "eval_score" in line]
    assert [line["eval_score"] for line in scored] == [66.667]


def test_counts_are_over_all_processes(runs):
    """Each process draws different factors, so neither knows the sum alone."""
    logged = [line for line in map(json.loads, (runs / "evaluated-ddp" / "log.jsonl").open()) if "loss" in line]
    both = [{name: one[name] + other[name] for name in ("kept", "of", "padding", "positions")}
            for one, other in zip(*forwards(runs / "evaluated-ddp"), strict=True)]  # fmt: skip
    assert [line["retention"] for line in logged] == [round(sums["kept"] / sums["of"], 4) for sums in both]
    assert [line["padding"] for line in logged] == [round(sums["padding"] / sums["positions"], 4) for sums in both]


def test_parameters_that_are_not_sharded_are_refused():
    with pytest.raises(UserError, match=r"sharding: inner\..* is not sharded"):
        check_sharded(attach(tiny_llava(), NoCompression()))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"trainer": {"fsdp": "full_shard"}}, "trainer: fsdp is ignored by transformers on a CPU"),
        ({"sharding": "fsdp", "trainer": {"deepspeed": "x.json"}}, "choose one of them"),
        ({"sharding": "zero3"}, "sharding"),
    ],
)
def test_other_ways_of_sharding_are_refused(tmp_path, capsys, settings, said):
    assert main(["train", str(write_config(tmp_path, **settings))]) == 2
    assert said in capsys.readouterr().err


def test_lora_is_refused_under_zero_3(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True)
    assert main(["train", str(write_run(tmp_path, lora={"r": 4}))]) == 2
    assert "use ZeRO-2 or sharding: fsdp" in capsys.readouterr().err


def test_a_gathered_state_is_saved(tmp_path):
    """Under ZeRO-3, the model itself has no weights to save."""
    compressed = attach(tiny_llava(), NoCompression())
    gathered = {name: value + 1 for name, value in compressed.state_dict().items()}
    _save(compressed, NoCompression(), FAMILIES["llava"].processor(), tmp_path / "model", gathered)
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").state_dict()
    for name, value in compressed.inner.state_dict().items():
        torch.testing.assert_close(saved[name], value + 1)


def test_accelerates_own_sharding_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["train", str(write_run(tmp_path))]) == 2
    assert "write sharding: fsdp into the configuration" in capsys.readouterr().err
