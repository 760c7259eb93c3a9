"""Every block of Python on the pages runs as it stands and prints what the page says, or a comment says why not."""

import re
import sys
from types import ModuleType

import pytest

import vlmzip
from tests.docs.blocks import PAGES, ROOT, commands, name, python_blocks, words

#: Two pages show a model of seven billion weights; mini stands in for it.
STAND_INS = {
    '"llava-hf/llava-1.5-7b-hf"': "str(vlmzip.mini.weights_folder())",
    '"photo.jpg"': '"examples/flat.png"',
    'device_map="cuda"': 'device_map="cpu"',
}
WITH_PYTHON = [page for page in PAGES if any(not block.reason for block in python_blocks(page))]
HAVE_MODULES = re.compile(r"python -m ((?:recipes|tests)(?:\.\w+)+)")


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_blocks_run_and_print_what_the_page_says(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for block in python_blocks(page):
        if block.reason:
            continue
        code = block.code
        for shown, run in STAND_INS.items():
            code = code.replace(shown, run)
        capsys.readouterr()
        exec(compile(code, block.page, "exec"), vars(module))
        printed = capsys.readouterr().out
        assert block.printed is None or printed == block.printed
        assert block.printed is not None or not printed or page.name != "tour.md", (
            f"the page omits what this prints: {code}"
        )
    if page.name == "add_a_method.md":
        check_method(module.EveryNth)


def check_method(cls):
    model, processor = vlmzip.mini.load()
    from PIL import Image

    image = Image.open(ROOT / "examples" / "flat.png")
    inputs = processor(images=image, text="USER: <image>\nwhat color is the ring ? ASSISTANT:", return_tensors="pt")
    with vlmzip.attach(model, cls(stride=8)) as compressed:
        compressed(**inputs)
        assert compressed.report.after == 18


def test_makes_and_modules_of_the_pages_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for command in commands(page):
            if words(command.code)[:1] == ["make"]:
                target = words(command.code)[1]
                assert re.search(rf"^{re.escape(target)}:", makefile.replace("$(LMMS)", ".venv-lmms"), re.M), command
        for module in HAVE_MODULES.findall(page.read_text(encoding="utf-8")):
            path = ROOT / module.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").exists(), f"{name(page)} runs {module}"
