"""The library imports no other folder of the repository, and configs/ has settings only."""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
BESIDE = {"recipes", "benchmarks", "docs", "tests"}


def imported(path: Path) -> set[str]:
    """Return the top-level packages that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_the_library_imports_no_recipe():
    found = {path: imported(path) & BESIDE for path in (ROOT / "src").rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}
    assert any("recipes" in imported(path) for path in (ROOT / "recipes").rglob("*.py")), "this test must see imports"


def test_the_wheel_holds_the_library_alone():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"] == {"packages": ["src/vlmzip"]}
    assert [path.name for path in (ROOT / "src").iterdir() if path.suffix != ".egg-info"] == ["vlmzip"]


def test_configs_hold_settings_alone():
    assert {path.suffix for path in (ROOT / "configs").iterdir()} == {".yaml", ".json"}
