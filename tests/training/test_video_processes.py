"""Two processes that train on videos, images and text: each forward runs both encoders, on a black image or video."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.families import FAMILIES
from tests.training.runs import losses, write_config
from tests.training.test_records import film, record, said

pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("video_llava" not in FAMILIES, reason="not in this version of transformers"),
]
WORKER = Path(__file__).with_name("video_worker.py")
#: With one record per process, one process may have a video while the other has an image or only text.
RUNS = {
    "one": {},
    "ddp": {"batch_per_process": 1},
    "fsdp": {"batch_per_process": 1, "sharding": "fsdp"},
}


def train(processes, *configs):
    """Train from some configurations, one after another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    shared = {**shared, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    started = [
        subprocess.Popen(
            [sys.executable, WORKER, *configs],
            env={**os.environ, **(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else shared)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    said = "".join(process.communicate()[1] for process in started)
    assert [process.returncode for process in started] == [0] * processes, said[-5000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    FAMILIES["video_llava"].build().save_pretrained(folder / "model")
    for n in range(4):
        Image.effect_noise((48, 48), 40 + 40 * n).convert("RGB").save(folder / f"{n}.png")
    content = [
        film("<video> w9", "w20", video=["0.png", "1.png", "2.png"], id=0),
        record("<image> w10", "w21", image="3.png", id=1),
        {"id": 2, "conversations": said("w11 w12", "w22 w23")},
        film("<image> <video> w13", "w24", video=["2.png", "3.png", "1.png"], image="0.png", id=3),
        {"id": 4, "conversations": said("w14", "w25")},
        film("w7 <video>", "w26 w27", video=["3.png", "0.png", "2.png"], id=5),
    ]
    (folder / "data.json").write_text(json.dumps(content))
    usual = {"batch": 2, "steps": 6, "frames": 3, "learn": ["vision", "projector", "llm"], "max_length": 500}
    usual["schedule"] = "visionzip(keep_per_view=9)"
    one, *others = [
        str(write_config(folder, f"{name}.yaml", out=str(folder / name), **usual, **settings))
        for name, settings in RUNS.items()
    ]
    train(1, one)
    train(2, *others)
    return folder


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns(folder, name):
    assert len(losses(folder / "one")) == 6
    assert losses(folder / name) == pytest.approx(losses(folder / "one"), rel=1e-5)
    ours, theirs = (load_file(folder / run / "model" / "model.safetensors") for run in (name, "one"))
    before = load_file(folder / "model" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for part in ("video_tower", "image_tower", "multi_modal_projector", "language_model"):
        assert any(not torch.equal(before[weight], ours[weight]) for weight in ours if part in weight)
    for weight in ours:
        if not weight.endswith("k_proj.bias"):  # softmax cancels it, so its gradients are rounding errors
            torch.testing.assert_close(ours[weight], theirs[weight], atol=5e-5, rtol=0)
