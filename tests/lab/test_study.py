"""A study with a tiny model asks each question once, and a failing method only loses its own row."""

import gc
import json
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from tests.families import FAMILIES, tiny_llava
from tests.lab.test_tasks import question, write
from tests.test_locks import another_run
from vlmzip import Chain, FastV, Grid, LLaVolta, Pool2d, SparseVLM, TokenMap
from vlmzip.compressor import Compressor, Profile
from vlmzip.errors import UserError
from vlmzip.lab.attacher import Attacher
from vlmzip.lab.budgets import fit, read_budgets
from vlmzip.lab.results import results
from vlmzip.lab.study import Study
from vlmzip.lab.tasks.catalogue import read_task
from vlmzip.locks import LOCK
from vlmzip.processes import Processes
from vlmzip.spec import Candidate, candidates

WORDS = ("w4 w5", "w6", "w7 w8 w9", "w10", "w11 w12", "w13", "w14")


@dataclass(frozen=True, kw_only=True)
class BreaksLater(Compressor):
    """A compressor that works on a batch of three and fails on the last, smaller one."""

    def token_count(self, grid):
        return 9

    def assign(self, tokens):
        if len(tokens.features) < 3:
            raise RuntimeError("boom")
        return Pool2d(factor=2).assign(tokens)


@dataclass(frozen=True, kw_only=True)
class Demanding(Compressor):
    """A compressor with a required setting."""

    every: int

    def token_count(self, grid):
        return -(-grid.size // self.every)

    def assign(self, tokens):
        place = torch.arange(tokens.features.shape[1]) - tokens.prefix
        return TokenMap.keep(((place >= 0) & (place % self.every == 0)).expand(len(tokens.features), -1))


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


@pytest.fixture
def task(tmp_path):
    lines = [question("abc"[n % 3] + ".png", question=words, type="xy"[n % 2]) for n, words in enumerate(WORDS)]
    return read_task(write(tmp_path / "q", *lines) + ":exact", None, None)


@pytest.fixture
def study(model, tmp_path):
    return make_study(model, tmp_path / "out")


def make_study(model, folder, batch=3):
    return Study(model, FAMILIES["llava"].processor(), "tiny", folder, batch, Processes())


def noise(seed):
    """Return the image that `write` makes from a number."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8))


def edit(folder, old, new):
    path = folder / "questions.jsonl"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def asked(monkeypatch):
    """Record the questions that the model gets from now on."""
    from vlmzip.runtime.answering import Answerer

    heard, real = [], Answerer.answer

    def answer(self, compressed, images, questions, most):
        heard.append(questions)
        return real(self, compressed, images, questions, most)

    monkeypatch.setattr(Answerer, "answer", answer)
    return heard


def everything(study):
    """Return the content of all files of records, by file."""
    return {path.name: path.read_text() for path in sorted((study.folder / "records").rglob("*.jsonl"))}


def test_one_record_for_each_question_with_all_it_takes_to_check_it(study, task):
    configurations = study.configure([task], candidates("pool2d"), ["25%"])
    study.run([task], configurations)
    plain, compressed = (study.records(task, one) for one in configurations)
    assert [r["sample"] for r in compressed] == [r["sample"] for r in plain] == [str(n) for n in range(1, 8)]
    record = compressed[2]
    assert (record["question"], record["answers"], record["score"]) == ("w7 w8 w9", ["it"], 0)
    assert (record["method"], record["compressor"]["factor"]) == ("pool2d(factor=2)", 2)
    assert (record["visual_tokens"], record["visual_tokens_by_layer"], record["retention"]) == (36, [9] * 4, 0.25)
    assert record["text_tokens"] == 7  # USER : w7 w8 w9 ASSISTANT :
    assert record["prefill_flops"] < plain[2]["prefill_flops"]
    assert record["groups"] == {"type": "x"}
    assert {"model", "dtype", "device", "vlmzip", "torch", "transformers", "commit"} < set(record)
    assert sum(1 for file in everything(study).values() for _ in file.splitlines()) == 14


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # PaliGemma's processor and NumPy's newest
def test_each_answer_is_the_models_own(fresh, task, tmp_path):
    """The records have the answers of `generate` to each question alone."""
    model = fresh.model
    study = Study(model, fresh.processor(), "tiny", tmp_path / "out", 3, Processes())
    (one,) = study.configure([task], candidates("no_compression"), ["25%"])
    study.run([task], [one])
    for sample, record in zip(task.samples, study.records(task, one), strict=True):
        inputs = study.answerer.inputs([sample.load()], [sample.question])
        ids = model.generate(**inputs, max_new_tokens=task.max_new_tokens, do_sample=False)
        text = study.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert record["given"] == text.strip()
    assert len({record["given"] for record in study.records(task, one)}) > 1


def test_budgets_are_set_for_the_grids_of_the_images(task, tmp_path):
    """A tiny Qwen supports images of 16 x 16 tokens; these images have 36 tokens."""
    model = FAMILIES["qwen2_5_vl"]().model
    study = Study(model, FAMILIES["qwen2_5_vl"].processor(), "tiny", tmp_path / "out", 3, Processes())
    configurations = study.configure([task], candidates("fastv"), ["75%"])
    study.run([task], configurations)
    assert {tuple(record["visual_tokens_by_layer"]) for record in study.records(task, configurations[1])} == {
        (36, 36, 18, 18)
    }


class TestGoingOn:
    def test_nothing_is_asked_twice(self, study, task, monkeypatch):
        study.run([task], study.configure([task], candidates("pool2d"), ["25%"]))
        before, heard = everything(study), asked(monkeypatch)
        study.run([task], study.configure([task], candidates("pool2d,visionzip"), ["25%"]))
        assert [question for some in heard for question in some] == list(WORDS)  # visionzip alone
        assert before.items() < everything(study).items()

    @pytest.mark.slow
    def test_a_stop_in_the_middle_leaves_the_same_records(self, model, task, tmp_path, monkeypatch):
        whole, cut = make_study(model, tmp_path / "whole"), make_study(model, tmp_path / "cut")
        for study in (whole, cut):
            study.run([task], study.configure([task], candidates("pool2d"), ["25%"]))
        assert everything(whole) == everything(cut)
        path = next((cut.folder / "records").rglob("pool2d*"))
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:4]) + lines[4][:50])
        heard = asked(monkeypatch)
        cut.run([task], cut.configure([task], candidates("pool2d"), ["25%"]))
        # Whole batches are asked, so that each question has the same neighbours.
        assert heard == [list(WORDS[3:6]), list(WORDS[6:])]
        assert everything(whole) == everything(cut)

    def test_more_questions_than_before(self, model, task, tmp_path, monkeypatch):
        from dataclasses import replace

        study, few = make_study(model, tmp_path / "out"), replace(task, samples=task.samples[:3])
        study.run([few], study.configure([few], candidates("pool2d"), ["25%"]))
        heard = asked(monkeypatch)
        study.run([task], study.configure([task], candidates("pool2d"), ["25%"]))
        assert [len(some) for some in heard] == [3, 1] * 2
        assert len(study.records(few, study.configure([few], candidates("pool2d"), ["25%"])[1])) == 3

    def test_another_model_is_refused(self, study, task, tmp_path):
        study.configure([task], candidates("pool2d"), ["25%"])
        other = tiny_llava()
        with torch.no_grad():
            other.model.language_model.layers[1].mlp.up_proj.weight[0, 0] += 1
        with pytest.raises(UserError, match=r"answers of another model: weights is '[0-9a-f]{16}' there and"):
            make_study(other, study.folder).configure([task], candidates("pool2d"), ["25%"])

    def test_a_local_model_may_be_written_in_another_way(self, study, task, tmp_path, monkeypatch):
        (tmp_path / "m1").mkdir()
        monkeypatch.chdir(tmp_path)
        for name in ("m1", "./m1/", str(tmp_path / "m1")):
            study = make_study(study.model, study.folder)
            study.name = study.conditions["model"] = name
            heard = asked(monkeypatch)
            study.run([task], study.configure([task], [], ["as-set"]))
            assert bool(heard) == (name == "m1")
        assert json.loads((study.folder / "study.json").read_text())["model"] == name

    def test_other_questions_are_refused(self, study, task, tmp_path):
        study.run([task], study.configure([task], candidates("pool2d"), ["25%"]))
        path = tmp_path / "q" / "questions.jsonl"
        path.write_text(path.read_text().replace("w13", "w15"))
        changed = read_task(f"{task.name}:exact", None, None)
        with pytest.raises(
            UserError, match=r"another question or other reference answers: sample '6' of .* has changed"
        ):
            study.run([changed], study.configure([changed], candidates("pool2d"), ["25%"]))

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda q: noise(9).save(q / "b.png"), r"an earlier version of the image '.*b\.png': sample '2' of"),
            (lambda q: edit(q, '"b.png"', '"c.png"'), r"an image other than '.*c\.png': sample '2' of"),
            (
                lambda q: edit(q, '"w6", "answers": ["it"]', '"w6", "answers": ["no"]'),
                "other reference answers: sample '2'",
            ),
            (
                lambda q: edit(q, '"w6", "answers": ["it"], "type": "y"', '"w6", "answers": ["it"]'),
                "another type: sample",
            ),
        ],
    )
    def test_whatever_changes_in_a_task_is_named(self, study, task, tmp_path, change, said):
        study.run([task], study.configure([task], candidates("pool2d"), ["25%"]))
        noise(1).save(tmp_path / "q" / "b.png", compress_level=0)  # another file with the same image
        same = read_task(f"{task.name}:exact", None, None)
        study.run([same], study.configure([same], candidates("pool2d"), ["25%"]))
        change(tmp_path / "q")
        other = read_task(f"{task.name}:exact", None, None)
        with pytest.raises(UserError, match=f"{said}.* has changed; give another --out"):
            study.run([other], study.configure([other], candidates("pool2d"), ["25%"]))

    def test_an_image_that_is_replaced_while_it_is_asked_about_is_noticed_the_next_time(self, study, task, tmp_path):
        configurations = study.configure([task], [], ["as-set"])
        noise(9).save(tmp_path / "q" / "b.png")
        study.run([task], configurations)
        with pytest.raises(UserError, match=r"an earlier version of the image '.*b\.png'"):
            study.records(task, configurations[0])

    def test_another_processor_is_refused(self, study, task):
        study.configure([task], [], ["as-set"])
        other = make_study(study.model, study.folder)
        other.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
        with pytest.raises(UserError, match=r"image processor is '.*' there and '.*' here; give another --out"):
            other.configure([task], [], ["as-set"])

    @pytest.mark.parametrize("name", ["tokenizer", "weights", "transformers"])
    def test_a_folder_of_an_earlier_version_is_refused(self, study, task, name):
        study.configure([task], [], ["as-set"])
        path = study.folder / "study.json"
        known = json.loads(path.read_text())
        del known[name]
        path.write_text(json.dumps(known))
        with pytest.raises(UserError, match=f"an earlier vlmzip: it lacks {name!r}; give another --out"):
            make_study(study.model, study.folder).configure([task], [], ["as-set"])

    def test_a_method_of_ones_own_whose_code_has_changed_is_refused(self, study, task, tmp_path, monkeypatch):
        path = tmp_path / "my_method_of_this_test.py"
        path.write_text("from vlmzip import Pool2d\n\nclass Mine(Pool2d):\n    pass\n")
        monkeypatch.syspath_prepend(tmp_path)
        mine = candidates("my_method_of_this_test:Mine(factor=2),pool2d(factor=2)")
        study.run([task], study.configure([task], mine, ["as-set"]))
        study.run([task], study.configure([task], mine, ["as-set"]))
        path.write_text(path.read_text() + "# other code\n")
        again = make_study(study.model, study.folder)
        with pytest.raises(UserError, match=r"answers of another my_method_of_this_test:Mine\(factor=2\): method code"):
            again.run([task], again.configure([task], mine, ["as-set"]))

    def test_weights_of_a_method_that_have_changed_are_refused(self, study, task, monkeypatch):
        trained = candidates("qformer(queries=4,depth=1,heads=2)")
        study.run([task], study.configure([task], trained, ["as-set"]))
        again, real = make_study(study.model, study.folder), Attacher.attach

        def other_weights(self, compressor):
            compressed = real(self, compressor)
            if compressed.resampler is not None:
                next(compressed.resampler.parameters()).data += 1
            return compressed

        again.run([task], again.configure([task], trained, ["as-set"]))
        again = make_study(study.model, study.folder)
        monkeypatch.setattr(Attacher, "attach", other_weights)
        with pytest.raises(UserError, match=r"answers of another qformer.*: method weights"):
            again.run([task], again.configure([task], trained, ["as-set"]))

    @pytest.mark.parametrize(
        ("name", "value", "said"),
        [
            ("score", 1e9, "its score is a number from 0 to 1, not 1000000000.0"),
            ("score", 1, "its score is 1, and exact gives 0.0 for its answer"),
            ("given", ["w4"], "its given is a text, not"),
            ("given", "it", "its score is 0.0, and exact gives 1.0"),
            ("retention", 0.5, "its retention is 0.5, not 1.0"),
            ("prefill_flops", 10**9, "its prefill_flops is 1000000000, not"),
            ("visual_tokens", 72, "its retention is 1.0, not 0.5"),
            ("visual_tokens_by_layer", [36] * 3, "its visual_tokens_by_layer are 3 numbers, and the model has 4"),
            ("visual_tokens_by_layer", [36, 36, 36, 9], "its retention is 1.0, not 0.8125"),
            ("text_tokens", 400, "its prefill_flops is"),
            ("model", "mini", "model is 'mini' there and 'tiny' here"),
            ("device", None, "its device is a text, not null"),
            ("compressor", {}, "were made with other settings than"),
            ("task", "mini", "another task: sample"),
        ],
    )
    def test_a_record_that_was_edited_enters_no_table(self, study, task, name, value, said):
        configurations = study.configure([task], [], ["as-set"])
        study.run([task], configurations)
        (path,) = study.folder.glob("records/*/*.jsonl")
        first, *rest = path.read_text().splitlines(keepends=True)
        path.write_text(json.dumps(json.loads(first) | {name: value}) + "\n" + "".join(rest))
        with pytest.raises(UserError, match=re.escape(said)):
            study.records(task, configurations[0])

    def test_a_folder_that_another_run_writes_is_refused_before_anything_is_asked(self, study, task, monkeypatch):
        """The other run can have a file of records for each process, or no records yet."""
        heard = asked(monkeypatch)
        with another_run(study.folder), pytest.raises(UserError, match=r"another run is writing .*out'; wait for it"):
            study.configure([task], candidates("pool2d"), ["25%"])
        assert [path.name for path in study.folder.iterdir()] == [LOCK]
        study.run([task], study.configure([task], candidates("pool2d"), ["25%"]))
        assert len(heard) == 6

    def test_the_folder_is_kept_until_the_run_ends(self, model, task, tmp_path):
        with Processes() as processes:
            study = Study(model, FAMILIES["llava"].processor(), "tiny", tmp_path / "out", 3, processes)
            study.configure([task], [], ["as-set"])
            del study
            gc.collect()
            with pytest.raises(AssertionError), another_run(tmp_path / "out"):
                pass
        with another_run(tmp_path / "out"):
            pass

    def test_another_metric_is_refused(self, study, task):
        study.configure([task], candidates("pool2d"), ["25%"])
        other = read_task(f"{task.name}:relaxed", None, None)
        with pytest.raises(UserError, match=r"was asked with .*exact.* not .*relaxed"):
            study.configure([other], candidates("pool2d"), ["25%"])

    @pytest.mark.parametrize("content", [None, "{", "[]", '{"tasks": 3}'])
    def test_records_that_belong_to_nothing_are_refused(self, study, task, content):
        study.run([task], study.configure([task], candidates("pool2d"), ["25%"]))
        path = study.folder / "study.json"
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(UserError, match="give another --out"):
            study.configure([task], candidates("pool2d"), ["25%"])

    @pytest.mark.parametrize("name", ["retention", "prefill_flops"])
    def test_records_without_their_costs_are_refused(self, study, task, name):
        configurations = study.configure([task], [], ["as-set"])
        study.run([task], configurations)
        (path,) = study.folder.glob("records/*/*.jsonl")
        path.write_text(path.read_text().replace(f'"{name}"', '"it"'))
        with pytest.raises(UserError, match=f"jsonl:1 is not a record of this run: it lacks {name}"):
            study.records(task, configurations[0])

    def test_an_image_that_vanishes_ends_the_run_and_keeps_the_rest(self, study, task, tmp_path):
        configurations = study.configure([task], candidates("pool2d"), ["25%"])
        (tmp_path / "q" / "a.png").rename(tmp_path / "q" / "d.png")
        for name in ("b.png", "c.png"):
            assert (tmp_path / "q" / name).exists()
        with pytest.raises(UserError, match=r"there is no file '.*a\.png'"):
            study.run([task], configurations)
        (tmp_path / "q" / "d.png").rename(tmp_path / "q" / "a.png")
        study.run([task], configurations)
        assert len(study.records(task, configurations[1])) == 7


class TestRows:
    def rows(self, study, task, methods, budgets):
        configurations = study.configure([task], methods, budgets)
        study.run([task], configurations)
        return list(results(study, task, configurations, 0))

    def test_the_plain_model_is_always_there_once(self, study, task):
        found = self.rows(study, task, candidates("no_compression,pool2d"), ["25%", "50%"])
        assert [r.configuration.method for r in found] == ["no_compression", "pool2d", "pool2d"]
        plain = found[0]
        assert (plain.reached, plain.flops, plain.against_plain.value, list(plain.changed)) == (1, 1, 0, [])

    def test_what_cannot_reach_a_budget_says_why(self, study, task):
        found = self.rows(study, task, candidates("pool2d,fastv,dfmr"), ["50%", "11%"])
        notes = {(r.configuration.method, r.configuration.budget): r.note for r in found if r.score is None}
        assert notes == {
            ("pool2d", "50%"): "the nearest to 50.0% that it has is 25.0%",
            ("fastv", "11%"): "2 of 4 layers see all tokens before fastv acts: on average at least 51.4%",
            ("fastv", "50%"): "2 of 4 layers see all tokens before fastv acts: on average at least 51.4%",
            ("dfmr", "50%"): task.uncalibrated,
            ("dfmr", "11%"): task.uncalibrated,
        }

    def test_all_methods_are_there_when_none_is_named(self, study, task):
        found = study.configure([task], candidates(None), ["25%"])
        notes = {one.method: one.note for one in found}
        assert "has to be trained" in notes["qformer"] or "have to be trained" in notes["qformer"]
        assert notes["visionzip"] == ""
        assert [one.method for one in found].count("no_compression") == 1

    def test_a_method_that_breaks_costs_the_others_nothing(self, study, task):
        found = self.rows(study, task, [Candidate("it", BreaksLater(), True), *candidates("pool2d")], ["as-set"])
        assert [r.score is None for r in found] == [False, True, False]
        assert found[1].note == "failed with RuntimeError: boom (6 of 7 questions were answered)"
        assert len(study.failures) == 1

    def test_without_compression_an_error_is_an_error(self, study, task, monkeypatch):
        configurations = study.configure([task], candidates("pool2d"), ["25%"])

        def broken(*_):
            raise RuntimeError("boom")

        monkeypatch.setattr("vlmzip.runtime.answering.Answerer.answer", broken)
        with pytest.raises(RuntimeError, match="boom"):
            study.run([task], configurations)

    def test_a_method_that_needs_settings(self, study, task):
        found = self.rows(
            study, task, [Candidate("it", Demanding(every=4), True), Candidate("no", None, False)], ["as-set"]
        )
        assert found[1].records[0]["method"].endswith("Demanding(every=4)")
        assert found[1].reached == 0.25
        assert "needs settings" in found[2].note

    def test_thresholds_are_set_from_other_images_once(self, model, task, tmp_path, monkeypatch):
        lines = [question(question=words) for words in WORDS]
        place = write(tmp_path / "asked", *lines)
        names = [f"{n}.png" for n in range(20, 32)]
        other = write(tmp_path / "others", images=names)
        task = read_task(f"{place}:exact", None, other)
        study = make_study(model, tmp_path / "out")
        first = study.configure([task], candidates("dfmr"), ["40%", "60%"])
        ran = [one for one in first if one.calibrated_on]
        assert {one.calibrated_on for one in ran} == {f"the 12 images of {other}"}
        monkeypatch.setattr("vlmzip.lab.configurations.measure", lambda *_, **__: pytest.fail("measured again"))
        assert make_study(model, study.folder).configure([task], candidates("dfmr"), ["40%", "60%"]) == first
        path = study.folder / "study.json"
        known = json.loads(path.read_text())
        for wrong in (3, [None], [{"task": 1}], [known["calibrated"][0] | {"compressor": {}}]):
            path.write_text(json.dumps(known | {"calibrated": wrong}))
            with pytest.raises(UserError, match="calibrated is not what vlmzip writes; give another --out"):
                make_study(model, study.folder).configure([task], candidates("dfmr"), ["40%"])
        path.write_text(json.dumps(known))
        noise(3).save(tmp_path / "others" / "20.png")
        with pytest.raises(pytest.fail.Exception, match="measured again"):  # one image has been replaced
            make_study(model, study.folder).configure([task], candidates("dfmr"), ["40%"])


def test_budgets_are_read_in_order_and_checked():
    assert read_budgets("75%, 64,64,as-set", None) == ["75%", "64", "as-set"]
    assert read_budgets("75%", "64,10%") == ["keep=64", "keep=10%"]
    with pytest.raises(UserError, match="--average-keep 0 keeps nothing"):
        read_budgets("75%,0", None)
    with pytest.raises(UserError, match="--keep 0 keeps nothing"):
        read_budgets("75%", "64,0")
    with pytest.raises(UserError, match="--average-keep names no budget"):
        read_budgets(" ,", None)


@pytest.mark.parametrize(
    ("method", "least"),
    [(FastV(layer=2), 1), (LLaVolta(layer=2), 1), (SparseVLM(), 2), (Pool2d(), 1)],  # SparseVLM recycles into one more
)
def test_a_budget_counts_what_remains_or_the_average(method, least):
    profile = Profile(Grid(1, 12, 12), layers=4)
    average, reached, _ = fit(method, "60%", profile)
    assert reached == pytest.approx(sum(average.tokens_by_layer(profile)) / (4 * 144))
    remaining, left, _ = fit(method, "keep=25%", profile)
    assert remaining.tokens_by_layer(profile)[-1] == 36
    assert left == 0.25
    assert fit(method, "keep=1", profile)[0].tokens_by_layer(profile)[-1] == least


def test_a_chain_leaves_the_tokens_of_its_budget():
    profile = Profile(Grid(1, 12, 12), layers=4)
    chain = Chain(compressors=(Pool2d(), FastV(layer=2, keep=0.5)))
    assert fit(chain, "keep=18", profile)[0].tokens_by_layer(profile) == [36, 36, 18, 18]
    assert "nearest to 9.7%" in fit(chain, "keep=14", profile)[2]


def test_a_question_with_a_placeholder_is_refused_before_anything_is_asked(study, tmp_path):
    task = read_task(write(tmp_path / "p", question(), question(question="<image> ?")) + ":exact", None, None)
    with pytest.raises(UserError, match="must not contain <image>"):
        study.configure([task], candidates("pool2d"), ["25%"])
    assert not study.folder.exists()


def test_records_are_json_lines(study, task):
    study.run([task], study.configure([task], candidates("visionzip"), ["25%"]))
    for text in everything(study).values():
        assert all(isinstance(json.loads(line), dict) for line in text.splitlines())
