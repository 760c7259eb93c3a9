"""What `import vlmzip` gives, and what it and quick commands leave unimported."""

import ast
import inspect
import json
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vlmzip
from vlmzip import blueprint, catalogue, outline, schema
from vlmzip.cli.main import COMMANDS
from vlmzip.models import FAMILIES
from vlmzip.training.config import Config
from vlmzip.training.random_factor import RandomFactor

#: Packages that take long to import.
SLOW = ("torch", "transformers", "numpy", "PIL", "jaxtyping", "yaml", "matplotlib", "pydantic")
#: The files that are no code, with their readers.
DATA = {
    "py.typed": "type checkers",
    "mini/weights/*": "every command: the default of --model",
    "mini/assets/*": "the task mini of eval, tune and study",
    "lab/papers/*.csv": "eval --against and train --explain",
    "lab/conformance/results.json": "models",
    "templates/*.j2": "compare --html, eval --report, the playground of serve",
    "serving/playground/assets/*": "the playground of serve",
}
RUN = f"""
import contextlib, io, json, sys
for statement in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            exec(statement)
        except SystemExit:
            pass
    print(json.dumps([statement, [name for name in {SLOW} if name in sys.modules]]))
"""
QUICK = [
    ["--help"], ["--version"], ["methods"], ["methods", "--json"], ["models"], ["models", "--json"],
    ["shoe"], ["eval", "--limt", "3"], ["eval", "--limit", "x"], ["bench", "--factor", "3"],
    *([name, "--help"] for name in ("bench", "compare", "eval", "methods", "models", "study", "tune")),
]  # fmt: skip


def imported_by(*statements):
    """Which slow packages are imported after each statement; they run one after the other in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(statements)], capture_output=True, text=True, check=True
    )
    return dict(map(json.loads, done.stdout.splitlines()))


def test_python_runs_the_package_as_the_command(tmp_path):
    """A file of the current folder does not shadow a library."""
    (tmp_path / "difflib.py").write_text("raise SystemExit('shadowed')")
    for arguments, code in ((["--version"], 0), (["shoe"], 2), (["eval", "--limt", "3"], 2)):
        of_module, of_command = (
            subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True, cwd=tmp_path)
            for start in (
                ["-m", "vlmzip"],
                ["-P", "-c", "import sys; from vlmzip.cli.main import main; sys.exit(main())"],
            )
        )
        assert of_module.returncode == of_command.returncode == code
        assert (of_module.stdout, of_module.stderr) == (of_command.stdout, of_command.stderr)


def test_quick_commands_import_nothing_slow():
    commands = [f"from vlmzip.cli.main import main; main({arguments})" for arguments in QUICK]
    slow = "import vlmzip.compressor"
    found = imported_by("import vlmzip", *commands, slow)
    assert {"torch", "numpy"} <= set(found.pop(slow)), "this test must see what is imported"
    assert {statement: names for statement, names in found.items() if names} == {}
    assert len(found) == len(QUICK) + 1


def test_no_help_imports_torch():
    commands = [[name, "--help"] for name in COMMANDS]
    commands += [["ask", "--method", "adaptive_visionzip", "--help"], ["methods", "visionzip"]]
    found = imported_by(*(f"from vlmzip.cli.main import main; main({arguments})" for arguments in commands))
    assert set().union(*found.values()) == {"pydantic"}


def shown(described):
    """Methods inside a default are other classes in the source than those that are imported."""
    return [{**vars(field), "default": str(field.default)} for field in described]


@pytest.mark.parametrize("name", outline.shipped())
def test_fields_are_the_same_in_the_source_and_in_the_class(name):
    method, fields = blueprint.method(name)
    cls = catalogue.find(name)
    assert shown(fields) == shown(catalogue.describe(cls))
    assert (method.doc, method.values["examples"]) == (inspect.getdoc(cls), cls.examples)


def test_settings_of_a_run_are_the_same_in_the_source_and_in_the_class():
    assert blueprint.describe("vlmzip.training.config", "Config") == schema.describe(Config)


def test_fields_of_a_method_from_elsewhere_are_those_of_its_class():
    method, fields = blueprint.method("vlmzip.training.random_factor:RandomFactor")
    assert (method.name, fields) == (RandomFactor.name(), catalogue.describe(RandomFactor))


@pytest.mark.parametrize("name", vlmzip.__all__)
def test_every_name_is_there(name):
    assert getattr(vlmzip, name) is not None
    assert name in dir(vlmzip)


def test_type_checkers_see_the_same_names():
    (block,) = (node for node in ast.parse(inspect.getsource(vlmzip)).body if _is_for_checkers(node))
    names = [alias.name for statement in block.body for alias in statement.names]
    names.remove("*")  # of vlmzip.methods
    assert sorted([*names, *outline.method_classes(), "__version__"]) == sorted(vlmzip.__all__)
    assert all(alias.asname == alias.name for s in block.body for alias in s.names if alias.name != "*")


def _is_for_checkers(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


@pytest.mark.slow
def test_modules_are_attributes_and_other_names_are_not():
    code = "import vlmzip; vlmzip.errors.UserError; vlmzip.methods.VisionZip; from vlmzip import *; VisionZip"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in ("VisionZap", "_private", "torch"):
        with pytest.raises(AttributeError, match=f"module 'vlmzip' has no attribute {name!r}"):
            getattr(vlmzip, name)


def test_the_wheel_has_only_the_data_that_commands_read():
    """`make test-extras` compares the installed wheel with this folder."""
    package = Path(vlmzip.__file__).parent
    files = [path.relative_to(package) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    data = [path for path in files if path.suffix != ".py"]
    matched = {pattern: [path for path in data if path.match(pattern)] for pattern in DATA}
    assert [pattern for pattern, paths in matched.items() if not paths] == []
    assert set(data) - set().union(*matched.values()) == set()


def test_type_checkers_of_users_read_the_package():
    """Without `py.typed` in the wheel they would take every name for `Any`."""
    hatch = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert hatch == {"targets": {"wheel": {"packages": ["src/vlmzip"]}}}  # all files of the folder, then
    assert (Path(vlmzip.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("thing", [vlmzip.VisionZip(keep=7), vlmzip.Site.IN_LLM, vlmzip.Grid(1, 2, 3), vlmzip.attach])
def test_what_comes_from_the_package_can_be_pickled(thing):
    assert pickle.loads(pickle.dumps(thing)) == thing


def test_outlines_say_what_the_classes_say():
    for of_source, (name, cls) in zip(outline.methods(), vlmzip.available().items(), strict=True):
        assert (of_source.name, of_source.doc) == (name, inspect.getdoc(cls))
        values = {name: getattr(cls, name) for name in outline.VALUES if hasattr(cls, name)}
        assert len(values) == 10
        assert of_source.values == values
        assert of_source.fields == {field.name: field.doc for field in catalogue.describe(cls)}
    for of_source, family in zip(outline.families(), FAMILIES, strict=True):
        assert family.__module__ == f"vlmzip.models.{of_source.name}"
        assert of_source.values == {name: getattr(family, name) for name in ("model_types", "sites", "example")}


def test_methods_of_installed_packages_are_listed(tmp_path, monkeypatch):
    package = tmp_path / "other-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        "[vlmzip.methods]\nevery_other = vlmzip.methods.random_tokens:RandomTokens\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "every_other" in [method.name for method in outline.methods()]
    monkeypatch.undo()
    assert "every_other" not in [method.name for method in outline.methods()]


@pytest.mark.slow
def test_every_home_can_be_imported_first():
    """In a new process each, which forks from one that has the slow packages: no import may need another before it."""
    code = """
import importlib, os, sys, torch, transformers
for module in sys.argv[1:]:
    if not os.fork():
        importlib.import_module(module)
        os._exit(0)
    assert os.wait()[1] == 0, module
"""
    subprocess.run([sys.executable, "-c", code, *{f"vlmzip.{home}" for home in vlmzip._HOMES.values()}], check=True)
