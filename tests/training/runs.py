"""Small training runs for tests: a tiny LLaVA, two dozen records and a configuration."""

import json
import random

from PIL import Image

from tests.families import FAMILIES, save_checkpoint
from tests.training.test_batches import TEMPLATE
from tests.training.test_records import record, said

COUNT = 24


def write_run(folder, **settings):
    """Write a checkpoint, records and a configuration into `folder`; return the configuration's path."""
    save_checkpoint(folder / "model")
    processor = FAMILIES["llava"].processor()
    processor.chat_template = TEMPLATE
    processor.save_pretrained(folder / "model")
    rng = random.Random(0)
    content = []
    for n in range(COUNT):
        Image.new("RGB", (24, 24), (10 * n, 255 - 10 * n, 7)).save(folder / f"{n}.png")
        words = " ".join(f"w{rng.randrange(6, 40)}" for _ in range(rng.randrange(1, 9)))
        content.append(record(f"<image>\n{words}", f"w{50 + n}", image=f"{n}.png", id=n))
    content[5] = {"id": 5, "conversations": said("w9 w8", "w7")}
    (folder / "data.json").write_text(json.dumps(content))
    return write_config(folder, **settings)


def write_config(folder, name="run.yaml", **settings):
    """Write a configuration into `folder`; return its path."""
    usual = {
        "model": str(folder / "model"),
        "records": str(folder / "data.json"),
        "out": str(folder / "out"),
        "schedule": {"name": "three-stage-deeper"},
        "steps": 6,
        "batch": 4,
        "learning_rate": 0.003,
        "warmup": 0.2,
        "precision": "float32",
        "log_every": 1,
        "save_every": 2,
        "max_length": 200,
    }
    (folder / name).write_text(json.dumps(usual | settings))  # JSON is valid YAML
    return folder / name


def losses(out):
    """Return the logged loss of each step."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def stages(out):
    """Return the logged stage and compressor of each step."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [(line["stage"], line["compressor"]) for line in lines if "loss" in line]
