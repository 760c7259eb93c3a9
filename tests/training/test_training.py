"""Complete runs of `vlmzip train` on a tiny model: stages, resuming, trained parts, saved files and failures."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText

import vlmzip
from tests.training.runs import COUNT, losses, stages, write_config, write_run
from vlmzip import LLaVolta, NoCompression
from vlmzip.cli.main import main
from vlmzip.runtime.answering import Answerer
from vlmzip.training.random_factor import RandomFactor
from vlmzip.training.trainer import StagedTrainer

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return a folder with a complete run."""
    folder = tmp_path_factory.mktemp("run")
    assert main(["train", str(write_run(folder))]) == 0
    return folder


@pytest.fixture
def again(start, tmp_path, capsys):
    """Return a function that trains on the same data with other settings: it returns the run's folder and stderr."""

    def run(code=0, **settings):
        settings = {"out": str(tmp_path / "out")} | settings
        path = write_config(start, name=f"{tmp_path.name}.yaml", **settings)
        assert main(["train", str(path)]) == code
        return tmp_path / "out", capsys.readouterr().err

    return run


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_stages_switch_on_their_step_and_the_loss_falls(start):
    deeper = ["llavolta(layer=1)", "llavolta", "no_compression"]  # layers 2 and 16 of 32 are 1 and 2 of 4
    assert stages(start / "out") == [(1, deeper[0])] * 2 + [(2, deeper[1])] * 2 + [(3, deeper[2])] * 2
    found = losses(start / "out")
    assert len(found) == 6
    assert found[-1] < found[0]


def test_accumulation_changes_neither_stages_nor_losses(start, again):
    out, _ = again(batch_per_process=1)
    assert stages(out) == stages(start / "out")
    assert losses(out) == pytest.approx(losses(start / "out"), rel=2e-4)


def test_evaluation_during_training_leaves_the_losses_as_they_are(start, again):
    out, _ = again(evaluation={"every": 1, "task": f"{start / 'questions'}:exact", "compressor": "pool2d(factor=2)"})
    assert losses(out) == losses(start / "out")
    scored = [line for line in map(json.loads, (out / "log.jsonl").open()) if "eval_score" in line]
    assert [line["step"] for line in scored] == [1, 2, 3, 4, 5, 6]
    assert {line["eval_retention"] for line in scored} == {0.25}


@pytest.fixture(scope="module", autouse=True)
def questions(start):
    folder = start / "questions"
    folder.mkdir()
    (folder / "0.png").write_bytes((start / "0.png").read_bytes())
    (folder / "q.jsonl").write_text(json.dumps({"image": "0.png", "question": "w9", "answers": ["w50"]}) + "\n")


@pytest.mark.slow
def test_a_stopped_run_resumes_as_if_it_had_not_been_stopped(start, again):
    """The run stops in the middle of stage two, whose steps are the third and the fourth."""
    out, _ = again(save_every=3)
    subprocess.run(["rm", "-r", out / "checkpoint-6", out / "model"], check=True)
    (out / "checkpoint-5").mkdir()  # incomplete: it lacks the file `whole`
    out, said = again(save_every=3)
    assert f"resuming from {out / 'checkpoint-3'}" in said.replace("\n", "")
    assert losses(out) == losses(start / "out")


def stop_at(out, step):
    """Leave the files of a killed run: after the checkpoint of that step, only the log."""
    for path in out.glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) > step:
            subprocess.run(["rm", "-r", path], check=True)
    subprocess.run(["rm", "-r", out / "model"], check=True)


@pytest.mark.slow
def test_a_run_stopped_in_its_second_epoch_resumes(again):
    """The second epoch has another order of records than the first; records of similar length are grouped."""
    settings = {"schedule": "two-stage", "steps": 14, "save_every": 8, "checkpoints": 3}
    out, _ = again(**settings)
    whole = losses(out)
    stop_at(out, 8)
    again(**settings)
    assert losses(out) == whole


@pytest.mark.slow
def test_logs_of_a_resumed_run_are_the_same_if_logs_and_checkpoints_differ_in_steps(again):
    out, _ = again(log_every=4, save_every=3)
    whole = losses(out)
    summed_up = len((out / "log.jsonl").read_text().splitlines())
    stop_at(out, 3)
    again(log_every=4, save_every=3)
    assert losses(out) == whole
    assert len((out / "log.jsonl").read_text().splitlines()) == summed_up


CONSTANT = {"trainer": {"lr_scheduler_type": "constant"}, "steps": 5}


def test_a_finished_run_is_left_as_it_is(again):
    """Another step would still change the weights."""
    out, _ = again(**CONSTANT)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    _, said = again(**CONSTANT)
    assert "this run is finished" in said
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_a_run_that_lacks_only_its_model_takes_no_further_step(again):
    out, _ = again(**CONSTANT)
    trained = weights(out / "model")
    stop_at(out, 5)
    again(**CONSTANT)
    assert changed(weights(out / "model"), trained) == set()
    assert not (out / "checkpoint-6").exists()


def test_other_settings_are_refused_in_the_same_folder(again):
    out, _ = again(steps=2)
    _, said = again(code=2, steps=2, schedule="none")
    assert "begun with other settings (schedule:" in said.replace("\n", "")
    assert (out / "model").exists()


def test_other_records_and_another_base_are_refused_in_the_same_folder(again, start):
    """There are as many records, and the names are the same."""
    again(steps=2)
    data, model = start / "data.json", start / "model" / "model.safetensors"
    for path, name in ((data, "records file"), (model, "base model")):
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]) if path == model else before.replace(b"w51", b"w52", 1))
        try:
            _, said = again(code=2, steps=2)
        finally:
            path.write_bytes(before)
        assert f"begun with other settings ({name}:" in said.replace("\n", "")


def test_a_model_with_other_settings_is_refused_in_the_same_folder(again, start):
    again(steps=2)
    path = start / "model" / "config.json"
    before = path.read_text()
    content = json.loads(before)
    content["text_config"]["rms_norm_eps"] = 0.5
    path.write_text(json.dumps(content))
    try:
        _, said = again(code=2, steps=2)
    finally:
        path.write_text(before)
    assert "begun with other settings (configuration:" in said.replace("\n", "")
    assert "give another out" in said.replace("\n", " ")


def test_a_changed_method_file_is_refused_in_the_same_folder(again, tmp_path, monkeypatch):
    (tmp_path / "trained_method.py").write_text(
        "import trained_helper\nfrom vlmzip import Pool2d\n\nclass Mine(Pool2d):\n    pass\n"
    )
    helper = tmp_path / "trained_helper.py"
    helper.write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"schedule": "trained_method:Mine(factor=2)", "steps": 2}
    again(**settings)
    again(**settings)
    helper.write_text("# other code\n")
    _, said = again(code=2, **settings)
    assert "begun with other settings (method code:" in said.replace("\n", "")


@pytest.mark.slow
def test_the_only_checkpoint_goes_when_the_next_is_whole(again, monkeypatch):
    """The run stops between the two: the disk has no room for the file `whole` of the second checkpoint."""
    touch, calls = Path.touch, []

    def full(path, *args, **kwargs):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        touch(path, *args, **kwargs)

    monkeypatch.setattr(Path, "touch", full)
    out, said = again(code=2, checkpoints=1)
    assert "resume from" in said
    assert [path.parent.name for path in out.glob("checkpoint-*/whole")] == ["checkpoint-2"]
    monkeypatch.undo()
    _, said = again(checkpoints=1)
    assert "resuming from" in said
    assert [path.parent.name for path in out.glob("checkpoint-*/whole")] == ["checkpoint-6"]


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": {"stages": [{"compressor": "none"}, {"compressor": "llavolta(layer=9)"}]}},
        {"schedule": {"name": "two-stage", "afterwards": "llavolta(layer=9)"}},
        {"evaluation": {"every": 1, "task": "mini", "limit": 1, "compressor": "llavolta(layer=9)"}},
        {"schedule": {"stages": [{"compressor": "qformer(queries=4,width=32,heads=2,depth=2)"}], "afterwards": "none"}},
    ],
)
@pytest.mark.filterwarnings("ignore:.*is untrained")
def test_later_stages_are_checked_before_the_first_step(again, settings):
    out, said = again(code=2, **settings)
    assert "layer must be from 1 to" in said or "cannot add, remove or replace" in said
    assert not (out / "log.jsonl").exists()


def test_a_loss_of_nan_ends_the_run(again):
    """Its weights are not saved, and no earlier loss is lost."""
    out, said = again(code=2, learning_rate=1e20, warmup=0, trainer={"max_grad_norm": 0})
    assert "the loss is nan at step" in said
    assert not (out / "model").exists()
    assert all(loss == loss for loss in losses(out))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"log_every": 100, "trainer": {"save_strategy": "no"}}])
def test_infinite_gradients_are_not_saved(again, monkeypatch, settings):
    """The loss of the last step is still finite; only the gradients show the failure."""
    step = StagedTrainer.training_step

    def overflowing(trainer, *args, **kwargs):
        loss = step(trainer, *args, **kwargs)
        if trainer.state.global_step == 5:
            next(one for one in trainer.compressed.parameters() if one.grad is not None).grad[0] = float("inf")
        return loss

    monkeypatch.setattr(StagedTrainer, "training_step", overflowing)
    out, said = again(code=2, **settings)
    assert "the grad_norm is" in said
    assert not (out / "model").exists()
    assert not (out / "checkpoint-6").exists()


def test_a_smoothed_loss_is_refused(again):
    """transformers computes it outside the model, where it would compare each logit with the token just read."""
    out, said = again(code=2, schedule="none", trainer={"label_smoothing_factor": 0.1})
    assert "vlmzip: trainer: label_smoothing_factor cannot be set: its loss compares logits and labels outside" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Path.touch, "cannot write into '.*taken'"),
        (lambda path: path.parent.joinpath("file").touch(), "'.*out' cannot be written: Not a directory"),
    ],
)
def test_a_folder_that_cannot_be_made_is_a_line(again, tmp_path, make, words):
    out = tmp_path / "taken"
    make(out)
    _, said = again(code=2, out=str(out if out.exists() else tmp_path / "file" / "out"))
    assert re.search(f"vlmzip: out: {words}", said)
    assert said.count("vlmzip: ") == 1


def test_a_package_that_the_trainer_lacks_is_reported_in_a_line(again, monkeypatch):
    def lacking(*_, **__):
        raise RuntimeError("WandbCallback requires wandb to be installed.")

    monkeypatch.setattr("vlmzip.training.run.StagedTrainer", lacking)
    _, said = again(code=2)
    assert "vlmzip: trainer: WandbCallback requires wandb" in said


def test_a_mistake_in_a_worker_is_a_line_too(again):
    _, said = again(code=2, workers=1, max_length=3, max_left_out="100%")
    assert "no record of" in said
    assert "Traceback" not in said
    assert said.count("vlmzip: ") == 1


@pytest.mark.slow
def test_ctrl_c_says_how_to_resume(again, monkeypatch):
    step = StagedTrainer.training_step

    def interrupted(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(StagedTrainer, "training_step", interrupted)
    out, said = again(code=130)
    assert f"run the same command again to resume from {out / 'checkpoint-2'}" in said.replace("\n", "")


def test_the_plan_of_the_run_is_printed(again):
    _, said = again(steps=2, learn="projector")
    assert re.search(r"\d\.\d of \d\.\d million weights learn, in 2 steps of 4 from 24 records; float32 on cpu", said)
    assert "the trained model uses no_compression" in said


@pytest.mark.slow
def test_killed_in_the_middle_of_stage_two(start, tmp_path):
    """After `kill -9` and the same command again, the losses are those of a run that was never stopped."""
    path = write_config(start, name="killed.yaml", out=str(tmp_path / "out"), save_every=1)
    command = [sys.executable, "-m", "vlmzip.cli.main", "train", str(path)]
    process = subprocess.Popen(command, env={**os.environ}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while not (tmp_path / "out" / "checkpoint-3" / "whole").exists():
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "model").exists()
    assert main(["train", str(path)]) == 0
    assert losses(tmp_path / "out") == losses(start / "out")
    assert changed(weights(tmp_path / "out" / "model"), weights(start / "out" / "model")) == set()


def test_a_saved_model_loads_in_transformers_and_answers_with_the_compressor_for_afterwards(start, again):
    compressed = vlmzip.from_pretrained(start / "out" / "model")
    assert compressed.compressor == NoCompression()
    before, after = weights(start / "model"), weights(start / "out" / "model")
    learned = changed(before, after)
    assert {name for name in before if "vision_tower" in name} & learned == set()
    assert {"model.multi_modal_projector.linear_1.weight", "lm_head.weight"} <= learned
    out, _ = again(schedule="last-stage-compression", steps=3)
    assert vlmzip.from_pretrained(out / "model").compressor == LLaVolta(layer=2, stride=4)


def test_visionzips_tuning_trains_the_projector_alone(start, again):
    out, _ = again(learn="projector", schedule="visionzip(keep=9)", fraction="50%", steps=3)
    learned = changed(weights(start / "model"), weights(out / "model"))
    assert learned
    assert all("multi_modal_projector" in name for name in learned)
    assert vlmzip.from_pretrained(out / "model").compressor == vlmzip.VisionZip(keep=9)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft reads it
def test_lora_trains_the_llm_and_is_merged(start, again):
    out, _ = again(lora={"r": 4, "alpha": 8}, learn=["projector", "llm"], steps=3)
    learned = changed(weights(start / "model"), weights(out / "model"))
    layers = {name for name in learned if "language_model.layers" in name}
    assert {name.split(".")[-2] for name in layers} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert "lm_head.weight" not in learned
    assert not any("vision_tower" in name for name in learned)


@pytest.mark.filterwarnings("ignore:.*is untrained")
def test_a_qformer_is_trained_and_saved_with_its_weights(start, again):
    out, _ = again(schedule="qformer(queries=4,width=32,heads=2,depth=2)", steps=2, learn="projector")
    assert (out / "model" / "resampler.safetensors").exists()
    assert vlmzip.from_pretrained(out / "model").compressor == vlmzip.QFormer(queries=4, width=32, heads=2, depth=2)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["random_factor", "random_factor(per=step)", "dfmr"])
def test_varying_lengths_train_and_resume(again, schedule):
    out, _ = again(schedule=schedule, steps=4, save_every=2)
    whole = losses(out)
    subprocess.run(["rm", "-r", out / "checkpoint-4", out / "model"], check=True)
    out, said = again(schedule=schedule, steps=4, save_every=2)
    assert "resuming from" in said
    assert losses(out) == whole
    retained = {line.get("retention") for line in map(json.loads, (out / "log.jsonl").open()) if "loss" in line}
    assert len(retained) > 1 or schedule == "dfmr"


def test_bad_records_are_reported_and_training_continues(start, again, tmp_path):
    content = json.loads((start / "data.json").read_text())
    content[0]["image"] = "missing.png"
    content[1]["conversations"][1]["value"] = "w9 " * 300
    content[2]["image"] = ["2.png", "3.png"]
    text = json.dumps(content).replace(json.dumps(content[3]), '{"id": , "conversations": []}')
    (start / "bad.json").write_text(text)
    out, said = again(records=str(start / "bad.json"), images=str(start), steps=10)
    assert len(losses(out)) == 10
    for reason in ("an image is missing", "longer than 200 tokens", "not as many <image> as images", "invalid JSON"):
        assert f"1 of {COUNT} records left out: {reason}" in said


def spoil(start, count):
    """Write the same records into another file, `count` of them with a missing image."""
    content = json.loads((start / "data.json").read_text())
    for one in [one for one in content if "image" in one][:count]:
        one["image"] = "missing.png"
    (start / "spoilt.json").write_text(json.dumps(content))
    return {"records": str(start / "spoilt.json"), "images": str(start)}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_length": 30}, "about 96% of them are left out, .* of 24 looked at: 23 longer than 30 tokens"),
        ({"max_length": 30, "max_left_out": "95%"}, "more than max_left_out, 95%"),
        ({"max_length": 30, "fraction": "50%"}, "of 12 looked at: 1[12] longer than 30 tokens"),
        (7, r"about 29% of them are left out, .* 25%; of 24 looked at: 7 an image is missing \(there is no file .*\)"),
        (23, "23 an image is missing"),
    ],
)
def test_where_many_records_would_be_left_out_no_step_is_taken(start, again, settings, said):
    settings = settings if isinstance(settings, dict) else spoil(start, settings)
    out, told = again(code=2, **settings)
    assert re.search(
        f"vlmzip: records: .*{said}.*; correct the records, or set max_left_out: 100% to train on the rest", told
    )
    assert {path.name for path in out.iterdir()} == {".lock", "run.json", "bad_records.jsonl"}


def test_invalid_records_count_among_those_left_out(start, again):
    content = json.loads((start / "data.json").read_text())
    (start / "none.json").write_text(json.dumps([*content, *[{"id": "none"}] * 12]))
    settings = {"records": str(start / "none.json"), "images": str(start)}
    _, said = again(code=2, **settings)
    assert "about 33% of them are left out" in said
    assert "of 24 looked at: no conversations" in said


def test_bad_records_are_reported_before_the_first_step_and_can_be_allowed(start, again, tmp_path):
    few = "note: 6 of 24 records looked at are left out: 6 an image is missing"
    _, said = again(**spoil(start, 6))
    assert said.index(few) < said.index("records left out: an image is missing")
    shutil.rmtree(tmp_path / "out")
    out, said = again(**spoil(start, 23), max_left_out="100%")
    assert len(losses(out)) == 6
    assert "note: 23 of 24 records looked at are left out: 23 an image is missing" in said


def test_the_records_tried_first_are_spread_over_the_file():
    from vlmzip.training.batches import Examples

    seen = []

    def looks_good(record, folder):
        seen.append(record)

    many = Examples.__new__(Examples)
    many.chosen, many.records, many.folder, many.conversations = range(5, 1005), range(1005), None, looks_good
    assert many.look_at(64) == (64, {}, "")
    assert (seen[0], seen[-1] > 980, len(set(seen))) == (5, True, 64)
    seen.clear()
    many.chosen = range(3)
    assert many.look_at(64) == (3, {}, "")
    assert seen == [0, 1, 2]


def summary(out):
    return json.loads((out / "log.jsonl").read_text().splitlines()[-1])


@pytest.mark.slow
def test_the_mean_loss_is_over_all_steps_of_a_resumed_run(again):
    """The logs cover unequal numbers of steps, and the run is stopped twice."""
    settings = {"log_every": 4, "save_every": 3, "steps": 8, "checkpoints": 9}
    out, _ = again(**settings)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    stretches = [step - before for before, step in zip([0, *steps], steps, strict=False)]
    assert len(set(stretches)) > 1
    wanted = sum(loss * steps for loss, steps in zip(losses(out), stretches, strict=True)) / 8
    once = summary(out)["train_loss"]
    assert once == pytest.approx(wanted, rel=1e-12)
    for step in (6, 3):
        stop_at(out, step)
        again(**settings)
        assert summary(out)["train_loss"] == once


def logged(out, name):
    return [line[name] for line in map(json.loads, (out / "log.jsonl").open()) if "loss" in line]


def test_another_seed_draws_other_factors(again, tmp_path):
    for seed in (0, 1):
        again(schedule="random_factor(per=step)", seed=seed, out=str(tmp_path / str(seed)))
    assert logged(tmp_path / "0", "retention") != logged(tmp_path / "1", "retention")


def test_padding_is_logged(start, again):
    """One record per forward needs no padding, except the record without image, which gets a blank image's row."""
    assert sum(share > 0 for share in logged(start / "out", "padding")) > 1
    out, _ = again(batch_per_process=1, schedule="llavolta(layer=1)")
    assert sum(share > 0 for share in logged(out, "padding")) == 1
    seconds = logged(out, "cpu_seconds")
    assert seconds == sorted(seconds)
    assert seconds[-1] > seconds[0]


def test_ragged_rows_are_packed(again):
    """They are packed side by side in the LLM's input if no compressor acts inside the LLM."""
    out, _ = again(batch_per_process=1, schedule="none")
    assert logged(out, "padding") == [0] * 6


def test_the_blank_image_of_a_text_batch_is_not_counted(again):
    out, _ = again(schedule="pool2d(factor=2)", batch=1, steps=COUNT)
    lines = [line for line in map(json.loads, (out / "log.jsonl").open()) if "loss" in line]
    assert sorted(line.get("retention", 1) for line in lines) == [0.25] * (COUNT - 1) + [1]


def test_each_forward_of_a_step_draws_anew(again, monkeypatch):
    salts = []

    def drawn(compressor, step, salt, plain=RandomFactor.at_step):
        salts.append((step, salt))
        return plain(compressor, step, salt)

    monkeypatch.setattr(RandomFactor, "at_step", drawn)
    again(schedule="random_factor", batch_per_process=2, steps=3)
    assert len(salts) == len(set(salts)) == 6
    steps = [step for step, _ in salts]
    assert steps[::2] == steps[1::2]
    assert len(set(steps)) == 3


def test_every_question_is_asked(start, again, monkeypatch, tmp_path):
    (tmp_path / "0.png").write_bytes((start / "0.png").read_bytes())
    lines = [json.dumps({"image": "0.png", "question": f"w{n}", "answers": ["w50"]}) for n in range(6, 11)]
    (tmp_path / "q.jsonl").write_text("\n".join(lines) + "\n")
    asked, answer = [], Answerer.answer

    def counted(answerer, compressed, images, questions, *rest):
        asked.extend(questions)
        return answer(answerer, compressed, images, questions, *rest)

    monkeypatch.setattr(Answerer, "answer", counted)
    monkeypatch.setattr("vlmzip.lab.score.BATCH", 2)
    again(steps=1, evaluation={"every": 1, "task": f"{tmp_path}:exact"})
    assert asked == ["w6", "w7", "w8", "w9", "w10"]


#: The error that each writer raises on a full disk; the second and third were seen on a small tmpfs.
FULL = {
    "python": OSError(errno.ENOSPC, "No space left on device"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 368192 vs 368084"),
}


@pytest.mark.slow
@pytest.mark.parametrize("who", FULL)
def test_a_full_disk_leaves_the_checkpoint_before(start, again, monkeypatch, who):
    """The disk is full while the second checkpoint is written. With room again, the same command resumes."""
    write, calls = safetensors.torch.save_file, []

    def full(tensors, filename, *args, **kwargs):
        calls.append(filename)
        if len(calls) == 2:
            raise FULL[who]
        return write(tensors, filename, *args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    out, said = again(code=2)
    assert f"vlmzip: cannot write into '{out}'" in said
    assert ("No space left on device" in said) == (who != "torch")
    assert f"run the same command again to resume from {out / 'checkpoint-2'}" in said.replace("\n", "")
    assert (out / "checkpoint-2" / "whole").exists()
    monkeypatch.undo()
    out, said = again()
    assert f"resuming from {out / 'checkpoint-2'}" in said.replace("\n", "")
    assert losses(out) == losses(start / "out")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"schedule": "llavolta(layer=9)"}, "layer must be from 1 to"),
        ({"images": "nowhere"}, "there is no folder 'nowhere'"),
        ({"records": "nowhere.json"}, "cannot read 'nowhere.json'"),
        ({"batch": 4, "batch_per_process": 3}, "batch_per_process must divide"),
        ({"trainer": {"optimm": "sgd"}}, "trainer: .*optimm"),
        ({"trainer": {"lr_scheduler_kwargs": {"nonsense": 1}}}, "trainer: .*nonsense"),
        ({"trainer": {"optim": "galore_adamw"}}, "trainer: .*galore_torch"),
        ({"trainer": {"torch_compile_backend": "nonsense"}}, "trainer: .*NONSENSE"),
        ({"evaluation": {"every": 1, "task": "nothing"}}, "unknown task or folder 'nothing'"),
    ],
)
def test_runs_that_cannot_be_trained_are_refused_in_a_line(again, settings, said):
    _, err = again(code=2, **settings)
    assert re.search(said, err)
    assert err.count("vlmzip: ") == 1


def test_explain_takes_no_step(start, tmp_path, capsys):
    path = write_config(start, name="explained.yaml", out=str(tmp_path / "out"))
    assert main(["train", str(path), "--explain", "--staircase", str(tmp_path / "stairs.png")]) == 0
    out = capsys.readouterr().out
    assert "llavolta(layer=1,stride=8)" in out
    assert (tmp_path / "stairs.png").stat().st_size > 5000
    assert not (tmp_path / "out").exists()
    assert main(["train", str(path), "--explain", "--json"]) == 0
    assert [stage["steps"] for stage in json.loads(capsys.readouterr().out)["stages"]] == [2, 2, 2]
    assert main(["train", str(path), "--staircase", "x.png"]) == 2


def test_tensorboard_has_what_is_logged(start):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (file,) = (start / "out").rglob("events.out.tfevents.*")
    found = events.EventAccumulator(str(file.parent)).Reload()
    assert [event.value for event in found.Scalars("train/loss")] == pytest.approx(losses(start / "out"))
    assert [event.step for event in found.Scalars("train/retention")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_bitsandbytes_log_about_its_kernels_is_silenced():
    """transformers' Trainer imports peft, which imports bitsandbytes."""
    code = (
        "import vlmzip.training.run, logging; logger = logging.getLogger('bitsandbytes.backends.cpu.ops');"
        " logger.warning('Failed to load CPU gemm_4bit_forward from kernels-community: %s.', 'x');"
        " logger.warning('something else')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "something else\n")
