"""Every `vlmzip` command of the pages ends in success on mini, or a comment before its block says why none runs it."""

import json
import re
import shutil

import pytest

from tests.docs.blocks import PAGES, ROOT, commands, name, words
from vlmzip.cli.main import main
from vlmzip.mini import splits

#: What the pages say, and what the test runs: mini instead of a large model, one method, images that are here.
STAND_INS = {
    "llava-hf/llava-1.5-7b-hf": "mini",
    "photo.jpg": "examples/first.png",
    "FOLDER": "other_photos",
    "$(cat examples/cluttered.txt)": (ROOT / "examples" / "cluttered.txt").read_text().strip(),
    "--calibrate-on other_photos --model": "--calibrate-on other_photos --methods visionzip,dfmr --model",
    "--max-prefill-ms 60": "--max-prefill-ms 6000 --methods visionzip",
}
LIMITED = ("eval", "study", "tune")
QUESTIONS = "12"
#: Programs of the pages that are not tried: they install, or test_blocks.py checks that what they name exists.
OTHERS = ("pip", "make", "eval")
WITH_COMMANDS = [page for page in PAGES if commands(page)]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name)
def test_a_command_that_no_test_runs_is_marked(page):
    for command in commands(page):
        assert command.reason or words(command.code)[0] in ("vlmzip", *OTHERS), f"{command} needs <!-- not run: … -->"


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name)
def test_commands_end_in_success(page, tmp_path, monkeypatch, capsys):
    """The commands of a page run in one folder, in the page's order."""
    runnable = [command for command in commands(page) if not command.reason and words(command.code)[0] == "vlmzip"]
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path, page)
    for command in runnable:
        arguments = small(command.code)
        assert main(arguments) == 0, (command.code, capsys.readouterr().err)


def small(code):
    """Return the arguments of a command that takes seconds."""
    for shown, run in STAND_INS.items():
        code = code.replace(shown, run)
    _, command, *options = words(code)
    if "--limit" in options:
        options[options.index("--limit") + 1] = QUESTIONS
    elif command in LIMITED:
        options += ["--limit", QUESTIONS]
    return [command, *options]


def furnish(folder, page):
    """Put what the commands read into a folder: examples, photos, questions, and the files of the guide to training."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "runs").mkdir()
    asked = []
    for target in ("other_photos", "my_questions"):
        (folder / target).mkdir()
    for question in splits.test_split(120):
        image = f"{question.seed}.png"
        question.image.save(folder / "other_photos" / image)
        question.image.save(folder / "my_questions" / image)
        asked.append({"image": image, "question": question.question, "answers": [question.answer] * 4})
    (folder / "my_questions" / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    for path, text in re.findall(r"^`(\S+\.yaml)`:\n\n```yaml\n(.*?)^```", page.read_text(), flags=re.S | re.M):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(re.sub(r"steps: \d+", "steps: 2", text))
        records = folder / "runs" / "guide" / "data" / "records.json"
        records.parent.mkdir(exist_ok=True)
        records.write_text(json.dumps([as_record(row, folder / "other_photos") for row in asked]))


def as_record(row, images):
    said = [("human", f"<image>\n{row['question']}"), ("gpt", row["answers"][0])]
    return {"image": str(images / row["image"]), "conversations": [{"from": who, "value": text} for who, text in said]}
