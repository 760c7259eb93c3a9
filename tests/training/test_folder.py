"""A run's folder: other files are not touched, no run is lost, and a second run cannot write into it."""

import errno
import fcntl
import json
import os
import time

import pytest

from tests.training.runs import write_config
from vlmzip import UserError
from vlmzip.training.config import read_config
from vlmzip.training.folder import RunFolder, how_to_resume, refused_by_disk
from vlmzip.training.trainer import whole_checkpoints


@pytest.fixture
def config(tmp_path):
    (tmp_path / "run").mkdir()
    return lambda **settings: read_config(write_config(tmp_path / "run", **settings), [])


def begin(out, config, records=24, steps=6, bad=()):
    return RunFolder.begin(out, config, records, steps, bad)


def begun(tmp_path, config, *whole):
    """Begin a run and return its folder, with checkpoints."""
    out = tmp_path / "run" / "out"
    begin(out, config())
    for step in whole:
        checkpoint(out, step)
    return out


def checkpoint(out, step, whole=True):
    path = out / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"precious")
    if whole:
        (path / "whole").touch()
    return path


def test_a_new_run_writes_its_settings(tmp_path, config):
    out = tmp_path / "run" / "out"
    found = begin(out, config(), bad=[(3, "invalid JSON")])
    assert (found.checkpoint, found.finished) == (None, False)
    asked = json.loads((out / "run.json").read_text())
    assert asked["learning_rate"] == 0.003
    assert asked["schedule"] == {"name": "three-stage-deeper"}
    assert json.loads((out / "bad_records.jsonl").read_text()) == {"record": 3, "reason": "invalid JSON"}


def test_bad_records_of_an_earlier_try_are_not_counted(tmp_path, config):
    out = begun(tmp_path, config)
    (out / "bad_records.jsonl").write_text('{"record": 9, "reason": "an image is missing"}\n')
    begin(out, config())
    assert not (out / "bad_records.jsonl").exists()


@pytest.mark.parametrize("name", ["checkpoint-500", "checkpoint-best", "model", "log.jsonl", "bad_records.jsonl"])
def test_a_folder_with_other_files_is_refused_and_not_touched(tmp_path, config, name):
    out = tmp_path / "run" / "out"
    (out / name).mkdir(parents=True)
    (out / name / "precious.bin").write_bytes(b"1")
    with pytest.raises(UserError, match="is not from a training run; give another folder"):
        begin(out, config())
    assert (out / name / "precious.bin").exists()


def test_only_incomplete_checkpoints_of_a_run_are_removed(tmp_path, config):
    out = begun(tmp_path, config, 2, 10)
    torn, other = checkpoint(out, 12, whole=False), out / "checkpoint-best.pt"
    other.touch()
    (out / "checkpoint-best").mkdir()
    assert begin(out, config()).checkpoint == out / "checkpoint-10"
    assert not torn.exists()
    assert other.exists()
    assert (out / "checkpoint-best").exists()
    assert [path.name for path in whole_checkpoints(out)] == ["checkpoint-2", "checkpoint-10"]


@pytest.mark.parametrize(
    "changed",
    [{"steps": 4}, {"schedule": "none"}, {"learn": "projector"}, {"lora": {"r": 4}}, {"batch": 2}, {"seed": 1}],
)
def test_a_run_resumes_only_with_the_settings_it_was_begun_with(tmp_path, config, changed):
    out = begun(tmp_path, config, 2)
    with pytest.raises(UserError, match=f"begun with other settings \\({next(iter(changed))}: .*give another out"):
        begin(out, config(**changed))
    assert (out / "checkpoint-2" / "whole").exists()


def test_a_refused_run_touches_nothing(tmp_path, config):
    out = begun(tmp_path, config, 2)
    torn = checkpoint(out, 4, whole=False)
    with pytest.raises(UserError, match="other settings"):
        begin(out, config(seed=1))
    assert torn.exists()


@pytest.mark.parametrize(("records", "steps"), [(23, 6), (24, 5)])
def test_another_file_of_records_is_another_run(tmp_path, config, records, steps):
    out = begun(tmp_path, config, 2)
    with pytest.raises(UserError, match="begun with other settings"):
        begin(out, config(), records, steps)


def test_other_sources_are_another_run(tmp_path, config):
    out, sources = tmp_path / "run" / "out", {"records file": "a", "tokenizer": "b"}
    start = lambda **more: RunFolder.begin(out, config(), 24, 6, (), {**sources, **more})  # noqa: E731
    start()
    checkpoint(out, 2)
    assert start().checkpoint == out / "checkpoint-2"
    with pytest.raises(UserError, match=r"other settings \(records file: a, now c\); give another out"):
        start(**{"records file": "c"})


@pytest.mark.parametrize("name", ["code of vlmzip", "torch", "transformers"])
def test_an_upgrade_is_noted_and_the_run_resumes(tmp_path, config, name):
    out = tmp_path / "run" / "out"
    sources = {"code of vlmzip": "a", "torch": "1", "transformers": "1"}
    start = lambda **more: RunFolder.begin(out, config(), 24, 6, (), {**sources, **more})  # noqa: E731
    start()
    checkpoint(out, 2)
    assert start().notes == ()
    found = start(**{name: "2"})
    assert found.checkpoint == out / "checkpoint-2"
    (note,) = found.notes
    assert f"{name} has changed since the run began ({sources[name]}, now 2)" in note


def test_a_version_that_an_earlier_vlmzip_did_not_note_is_reported(tmp_path, config):
    out = begun(tmp_path, config, 2)
    (note,) = RunFolder.begin(out, config(), 24, 6, (), {"torch": "1", "method code": ""}).notes
    assert note == "not compared, because an earlier vlmzip began the run: torch, method code"


def test_the_spelling_of_a_path_may_differ(tmp_path, config, monkeypatch):
    out = begun(tmp_path, config, 2)
    monkeypatch.chdir(tmp_path)
    assert begin(out, config(model="./run/model/", records="run/data.json")).checkpoint == out / "checkpoint-2"
    with pytest.raises(UserError, match=r"other settings \(model: "):
        begin(out, config(model="run/model2"))


@pytest.mark.parametrize("content", ["[1]", '{"lr": 1}'])
def test_another_file_of_the_same_name_is_refused(tmp_path, config, content):
    out = tmp_path / "run" / "out"
    precious = checkpoint(out, 5, whole=False)
    (out / "run.json").write_text(content)
    with pytest.raises(UserError, match="is not from a training run"):
        begin(out, config())
    assert precious.exists()


def test_a_folder_that_cannot_be_written_is_a_line(tmp_path, config, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vlmzip.training.folder.note_bad", full)
    with pytest.raises(UserError, match=r"cannot write into .*: No space left on device"):
        begin(tmp_path / "run" / "out", config(), bad=[(1, "invalid JSON")])


def test_settings_without_effect_on_learning_may_differ(tmp_path, config):
    out = begun(tmp_path, config, 2)
    free = {"log_every": 5, "save_every": 1, "workers": 1, "batch_per_process": 1, "sharding": "fsdp"}
    assert begin(out, config(**free)).checkpoint == out / "checkpoint-2"


def test_before_the_first_checkpoint_anything_may_differ(tmp_path, config):
    out = begun(tmp_path, config)
    begin(out, config(seed=1))
    assert json.loads((out / "run.json").read_text())["seed"] == 1


def test_workers_of_a_run_that_was_killed_are_waited_for(tmp_path, config, monkeypatch):
    out = begun(tmp_path, config, 2)
    other = os.open(out / ".lock", os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    monkeypatch.setattr(time, "sleep", lambda _seconds: os.close(other))
    assert begin(out, config()).checkpoint == out / "checkpoint-2"


def test_another_run_is_kept_out(tmp_path, config, monkeypatch):
    monkeypatch.setattr("vlmzip.training.folder.PATIENCE", 0)
    out = begun(tmp_path, config, 2)
    torn = checkpoint(out, 4, whole=False)
    other = os.open(out / ".lock", os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another run is writing"):
        begin(out, config())
    assert torn.exists()  # the other run may be writing it
    os.close(other)
    found = begin(out, config())
    assert found.hold is not None


def test_how_to_resume(tmp_path, config):
    out = begun(tmp_path, config)
    assert how_to_resume(out) == "there is no checkpoint yet; run the same command again to start over"
    checkpoint(out, 2)
    assert f"resume from {out / 'checkpoint-2'}" in how_to_resume(out)


def test_only_disk_errors_are_reported_as_disk_errors():
    assert refused_by_disk(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device"
    worker = "Caught OSError in DataLoader worker process 0.\nOSError: [Errno 28] No space left on device"
    assert refused_by_disk(OSError(worker)) == "No space left on device"
    assert refused_by_disk(FileNotFoundError(errno.ENOENT, "No such file or directory")) is None
    assert refused_by_disk(BrokenPipeError(errno.EPIPE, "Broken pipe")) is None


def test_a_run_file_of_another_version_is_refused(tmp_path, config):
    out = begun(tmp_path, config, 2)
    (out / "run.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        begin(out, config())
