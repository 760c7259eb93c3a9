"""Tests with real processes: a killed one, and two that share the work."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlmzip.cli.main import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ASK = ["eval", "--methods", "pool2d", "--average-keep", "25%", "--limit", "18", "--batch", "3"]


def start(*command, folder):
    paths = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", *command, "vlmzip.cli.main", *ASK, "--out", str(folder)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def records(folder):
    """Return all records without the number of threads, in an order that does not depend on the process."""
    found = []
    for path in (folder / "records").rglob("*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            del record["device"]
            found.append(record)
    return sorted(found, key=lambda record: (record["method"], record["sample"]))


def rows(folder):
    """Return the table without the number of threads."""
    with (folder / "results.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "device"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main([*ASK, "--out", str(folder)]) == 0
    assert len(records(folder)) == 36
    return folder


def test_a_killed_run_resumes_where_it_was(undisturbed, tmp_path, capsys):
    process = start(folder=tmp_path)
    shards, deadline = [], time.monotonic() + 120
    while not any(path.stat().st_size for path in shards) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
        shards = list((tmp_path / "records").rglob("*.jsonl"))
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    process.communicate()
    kept = records(tmp_path)
    assert 0 < len(kept) < 36
    with shards[0].open("a") as file:
        file.write('{"task": "mini", "sample": "20000')  # a half line, as after a kill
    assert main([*ASK, "--out", str(tmp_path)]) == 0
    assert records(tmp_path) == records(undisturbed)
    assert rows(tmp_path) == rows(undisturbed)
    assert shards[0].read_text().splitlines()[: len(kept)]


@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"],
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_two_processes_give_what_one_gives(undisturbed, tmp_path, launcher):
    process = start(*launcher, folder=tmp_path)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert {path.suffixes[-2] for path in (tmp_path / "records").rglob("*.jsonl")} == {".0", ".1"}
    assert records(tmp_path) == records(undisturbed)
    assert rows(tmp_path) == rows(undisturbed)
    assert out.count("no_compression") == 1  # only one process prints
