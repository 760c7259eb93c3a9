"""Every command that asks an LLM says where a prompt takes more positions than the LLM has; no other command does."""

import json

import pytest

from tests.families import save_checkpoint, tiny_llava
from tests.lab.test_tasks import question, write
from vlmzip.cli.main import main
from vlmzip.lab.bench.presets import PRESETS

#: With an image's 36 tokens a prompt takes more, with 8 of them fewer.
LIMIT = 30
PLAIN = "without compression the prompt takes"
BEYOND = f"positions and the LLM has {LIMIT}: the answer may be wrong"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = tiny_llava()
    model.config.text_config.max_position_embeddings = LIMIT
    folder = tmp_path_factory.mktemp("few-positions")
    save_checkpoint(folder, model)
    return str(folder)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")
    return write(folder, *(question("abc"[n % 3] + ".png", question=f"w{n + 4}") for n in range(40)))


@pytest.fixture
def run(capsys, checkpoint):
    def run(*arguments):
        code = main([*map(str, arguments), "--model", checkpoint])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out, [line.removeprefix("note: ") for line in err.splitlines() if "positions" in line]

    return run


@pytest.fixture
def image(asked):
    return f"{asked}/a.png"


def test_ask_says_it_of_the_side_that_it_is_about(run, image):
    ask = ("ask", image, "w4", "--max-new-tokens", 2)
    assert run(*ask, "--keep", 8)[1] == []
    (note,) = run(*ask, "--keep", 8, "--baseline")[1]
    assert note.startswith(PLAIN)
    assert BEYOND in note
    (note,) = run(*ask, "--keep", 30)[1]
    assert note.startswith("with visionzip the prompt takes")
    assert len(run(*ask, "--keep", 30, "--baseline")[1]) == 2


def test_ask_says_it_of_an_answer_that_grows(run, image):
    (note,) = run("ask", image, "w4", "--keep", 8, "--max-new-tokens", 40)[1]
    assert note.startswith("with visionzip the prompt and its answer take")


def test_commands_that_ask_nothing_say_nothing(run, image, tmp_path):
    assert run("show", image, "--keep", 30, "--out", tmp_path / "tokens.png")[1] == []
    assert run("calibrate", image, "--keep", 36, "--method", "dfmr", "--json")[1] == []


def test_compare_says_it_in_the_rows(run, image):
    out, notes = run("compare", image, "w4", "--methods", "visionzip", "--keep", 8, "--json", "--max-new-tokens", 2)
    assert notes == []
    rows = {row["method"]: row for row in json.loads(out)["rows"]}
    assert rows["no_compression"]["note"].startswith(PLAIN)
    assert not rows["visionzip"]["note"]


def test_eval_says_it_at_once_and_in_the_table(run, asked, tmp_path):
    """The table says it also of answers that an earlier run kept."""
    evaluate = (
        "eval", "--tasks", f"{asked}:exact", "--methods", "visionzip", "--keep", 8, "--limit", 5,
        "--max-new-tokens", 2, "--out", tmp_path,
    )  # fmt: skip
    for expected in (1, 0):
        out, notes = run(*evaluate)
        assert len(notes) == expected
        assert "no_compression at 100%: 5 of 5 prompts took more positions than the LLM has" in out
        assert "visionzip at 8" not in out


def test_tune_says_it(run, asked, tmp_path):
    _, notes = run(
        "tune", "--tasks", f"{asked}:exact", "--methods", "visionzip", "--keep", 8, "--max-tokens", 9,
        "--max-new-tokens", 2, "--out", tmp_path,
    )  # fmt: skip
    assert [note.startswith(PLAIN) for note in notes] == [True]


@pytest.mark.parametrize("name", ["attention_by_depth", "ablation"])
def test_study_says_it(run, asked, tmp_path, name):
    _, notes = run("study", name, "--task", f"{asked}:exact", "--limit", 3, "--out", tmp_path)
    assert notes
    assert all(BEYOND in note for note in notes)
    assert len(notes) == len(set(notes))


@pytest.mark.parametrize("name", PRESETS)
def test_bench_makes_its_llm_large_enough(name):
    preset = PRESETS[name]
    config = preset.config(text_tokens=5000, new_tokens=300)
    assert config.text_config.max_position_embeddings >= preset.visual_tokens + 5300
