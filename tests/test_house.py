"""The plan of the house, read from the source of `vlmzip`: which room may import which, and who knows whom by name.

What does not hold yet stands in a list with its reason. An entry that is mended fails, too: remove it then.
"""

import ast
from collections import defaultdict
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import vlmzip

#: From the ground up. A room imports itself and the rooms above it in this list.
ROOMS = {
    "ground": (
        "version",
        "errors",
        "files",
        "json_text",
        "children",
        "locks",
        "processes",
        "progress",
        "noise",
        "sites",
        "field_docs",
        "seeds",
        "own_files",
    ),
    "vocabulary": ("schema", "keep", "processor", "visual_tokens", "token_map", "selection", "compressor", "resampler"),
    "methods": ("methods",),
    "catalogue": ("outline", "blueprint", "catalogue", "compressor_file", "spec"),
    "mini_gemini": ("mini_gemini",),
    "models": ("models",),
    "runtime": ("runtime",),
    "visualize": ("visualize",),
    "training": ("training",),
    "serving": ("serving",),
    "mini": ("mini",),
    "lab": ("lab",),
    "cli": ("cli", "__main__"),
    "package": ("",),
}
#: (importer, imported): rooms that must not know each other, though the list above would let them.
STRANGERS = {("models", "methods"), ("models", "catalogue")}

#: (importer, imported): imports that break the rules or tie a circle, and what will untie them.
IMPORTS_NOT_YET_RIGHT: dict[tuple[str, str], str] = {
    ("runtime.fingerprint", ""): "the folder of the package is that of vlmzip.version",
    ("runtime.imported", ""): "the folder of the package is that of vlmzip.version",
}
#: (module, name): where `runtime/` names a method or a type of model.
NAMED_IN_RUNTIME: dict[tuple[str, str], str] = {}
#: Imports inside functions. Each needs a reason, such as a package that takes long to import.
MOST_INSIDE_FUNCTIONS = 31

#: The modules of vlmzip by their path below it, with dots; the package itself is "".
Plan = dict[str, ast.Module]


@pytest.fixture(scope="module")
def plan() -> Plan:
    root = Path(vlmzip.__file__).parent
    return {
        below(".".join(("vlmzip", *path.relative_to(root).with_suffix("").parts))): ast.parse(path.read_bytes())
        for path in sorted(root.rglob("*.py"))
    }


def below(name: str) -> str:
    """`vlmzip.methods.dfmr` is methods.dfmr, and `vlmzip.methods.__init__` is methods."""
    return name.removeprefix("vlmzip").removesuffix("__init__").strip(".")


def room_of(name: str) -> str:
    top = name.partition(".")[0]
    rooms = [room for room, members in ROOMS.items() if top in members]
    assert rooms, f"vlmzip.{top} has no room: add it to ROOMS in tests/test_house.py"
    return rooms[0]


def imports_of(plan: Plan) -> set[tuple[str, str]]:
    """(importer, imported), wherever the import stands: also in a function, and for type checkers."""
    pairs = {(name, target) for name, tree in plan.items() for node in ast.walk(tree) for target in targets(node, plan)}
    return {(importer, imported) for importer, imported in pairs if importer != imported}


def targets(node: ast.AST, plan: Plan) -> list[str]:
    """The modules of vlmzip that a statement imports."""
    if isinstance(node, ast.Import):
        return [below(alias.name) for alias in node.names if is_ours(alias.name)]
    if isinstance(node, ast.ImportFrom) and is_ours(node.module or ""):
        modules = [below(f"{node.module}.{alias.name}") for alias in node.names]
        return [module if module in plan else below(node.module) for module in modules]
    return []


def is_ours(name: str) -> bool:
    return name.partition(".")[0] == "vlmzip"


def is_forbidden(importer: str, imported: str) -> bool:
    order = list(ROOMS)
    rooms = room_of(importer), room_of(imported)
    return order.index(rooms[1]) > order.index(rooms[0]) or rooms in STRANGERS


def circles(pairs: set[tuple[str, str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""
    imported_by = defaultdict(set)
    for importer, imported in pairs:
        imported_by[importer].add(imported)
    reached = {name: reachable(name, imported_by) for name in list(imported_by)}
    groups = {tuple(sorted(other for other in reached[name] if name in reached.get(other, ()))) for name in reached}
    return sorted(list(group) for group in groups if group)


def reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    """What can be reached from `start` in one step or more."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = edges.get(waiting.pop(), set()) - seen
        seen |= new
        waiting += new
    return seen


def functions_that_import(plan: Plan) -> set[tuple[str, int]]:
    """Module and line of every import inside a function."""
    return {
        (name, node.lineno)
        for name, tree in plan.items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }


def method_classes(plan: Plan) -> set[str]:
    """Public classes of `methods/`, and those of other rooms that derive from them or from `Compressor`."""
    found = {cls.name for name, cls in classes(plan) if room_of(name) == "methods" and not cls.name.startswith("_")}
    above = {"Compressor", *found}
    return found | {
        cls.name
        for name, cls in classes(plan)
        if room_of(name) not in ("ground", "vocabulary") and any(names_in(base) & above for base in cls.bases)
    }


def family_classes(plan: Plan) -> set[str]:
    """Classes of `models/` that say which models are theirs."""
    ours = [cls for name, cls in classes(plan) if room_of(name) == "models"]
    return {cls.name for cls in ours if any("model_types" in assigned_by(statement) for statement in cls.body)}


def classes(plan: Plan) -> list[tuple[str, ast.ClassDef]]:
    return [(name, node) for name, tree in plan.items() for node in tree.body if isinstance(node, ast.ClassDef)]


def assigned_by(statement: ast.stmt) -> set[str]:
    return set().union(*map(names_in, statement.targets)) if isinstance(statement, ast.Assign) else set()


def names_in(node: ast.AST) -> set[str]:
    """The last part of every name in the code: `a.b.C` and `C` are both C."""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return names | {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}


def texts_in(node: ast.AST) -> set[str]:
    return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}


def classes_tested_for(node: ast.AST) -> set[str]:
    """The classes in `isinstance`, `issubclass`, `type(x) is C` and `case C():`."""
    if isinstance(node, ast.Call) and names_in(node.func) & {"isinstance", "issubclass"}:
        return set().union(*map(names_in, node.args[1:]))
    if isinstance(node, ast.Compare) and isinstance(node.left, ast.Call) and "type" in names_in(node.left.func):
        return set().union(*map(names_in, node.comparators))
    return names_in(node.cls) if isinstance(node, ast.MatchClass) else set()


def methods_known_by_class(plan: Plan) -> set[tuple[str, str]]:
    methods = method_classes(plan)
    others = [name for name in plan if room_of(name) != "methods"]
    return {
        (name, cls) for name in others for node in ast.walk(plan[name]) for cls in classes_tested_for(node) & methods
    }


def named_in_runtime(plan: Plan) -> set[tuple[str, str]]:
    """Classes of methods and families, and texts that are the name of a method or a `model_type` of transformers."""
    classes = method_classes(plan) | family_classes(plan)
    words = {name.removeprefix("methods.") for name in plan if name.startswith("methods.")} | set(CONFIG_MAPPING_NAMES)
    rooms = {name: tree for name, tree in plan.items() if room_of(name) == "runtime"}
    return {
        (name, word) for name, tree in rooms.items() for word in (names_in(tree) & classes) | (texts_in(tree) & words)
    }


def check_list(found: set, listed: dict, advice: str) -> None:
    """Fail for what is not listed, and for what is listed but no longer found."""
    new, gone = sorted(found - listed.keys()), sorted(listed.keys() - found)
    assert not new, f"{advice}: {new}"
    assert not gone, f"mended: remove it from the list in tests/test_house.py: {gone}"


# --- the house as it is -----------------------------------------------------------------------------------------


def test_a_room_imports_only_rooms_above_it(plan):
    forbidden = {pair for pair in imports_of(plan) if is_forbidden(*pair)}
    listed = {pair: why for pair, why in IMPORTS_NOT_YET_RIGHT.items() if is_forbidden(*pair)}
    check_list(forbidden, listed, "these imports go against the order of ROOMS")


def test_there_are_no_circles(plan):
    pairs = imports_of(plan)
    right = pairs - IMPORTS_NOT_YET_RIGHT.keys()
    assert circles(right) == [], "these modules import each other"
    wrong = {pair for pair in pairs - right if is_forbidden(*pair) or circles(right | {pair})}
    check_list(wrong, IMPORTS_NOT_YET_RIGHT, "")


def test_imports_name_the_whole_path(plan):
    """`from . import x` would escape the tests above."""
    nodes = [(name, node) for name, tree in plan.items() for node in ast.walk(tree)]
    assert [name for name, node in nodes if isinstance(node, ast.ImportFrom) and node.level] == []


def test_imports_stand_at_the_head_of_a_file(plan):
    assert len(functions_that_import(plan)) <= MOST_INSIDE_FUNCTIONS, "an import inside a function is one too many"


def test_only_methods_know_a_method_by_its_class(plan):
    assert methods_known_by_class(plan) == set(), "ask something that every method answers instead"


def test_the_runtime_names_no_method_and_no_family(plan):
    check_list(named_in_runtime(plan), NAMED_IN_RUNTIME, "ask the method or the family instead")


# --- the rules find what they look for ---------------------------------------------------------------------------


def planned(**sources: str) -> Plan:
    """Modules from their sources; `runtime__facade` is runtime.facade."""
    return {name.replace("__", "."): ast.parse(source) for name, source in sources.items()}


@pytest.mark.parametrize(
    ("importer", "statement", "imported"),
    [
        ("methods__dfmr", "from vlmzip.models import llava", "models.llava"),
        ("models__llava", "import vlmzip.methods.dfmr", "methods.dfmr"),
        ("runtime__facade", "def f():\n    from vlmzip.lab.study import Study", "lab.study"),
        ("lab__study", "if TYPE_CHECKING:\n    from vlmzip.cli import main", "cli.main"),
        ("keep", "from vlmzip import attach", ""),
    ],
)
def test_forbidden_imports_are_found_wherever_they_stand(importer, statement, imported):
    targets = {"models__llava": "", "methods__dfmr": "", "lab__study": "", "cli__main": ""}
    plan = planned(**targets | {importer: statement})
    (pair,) = imports_of(plan)
    assert pair == (importer.replace("__", "."), imported)
    assert is_forbidden(*pair)


def test_circles_are_found():
    plan = planned(keep="import vlmzip.files", files="def f():\n    from vlmzip.errors import x", errors="")
    assert circles(imports_of(plan)) == []
    plan |= planned(errors="from vlmzip import keep")
    assert circles(imports_of(plan)) == [["errors", "files", "keep"]]


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(x, FastV)", "isinstance(x, (int, methods.FastV))", "issubclass(cls, int | FastV)",
        "type(x) is FastV", "match x:\n    case FastV(keep=k):\n        pass",
    ],
)  # fmt: skip
def test_methods_known_by_class_are_found(code):
    plan = planned(methods__fastv="class FastV(Compressor): pass", training__run=code, spec="FastV(keep=3)")
    assert methods_known_by_class(plan) == {("training.run", "FastV")}


@pytest.mark.parametrize("code", ["FastV(keep=3)", "name == 'fastv'", "Llava", "kind in ('llava', 'other')"])
def test_names_in_the_runtime_are_found(code):
    families = planned(models__llava="class Llava(Family):\n    model_types = ('llava',)\nclass Helper: pass")
    plan = families | planned(methods__fastv="class FastV(Compressor): pass", runtime__facade=code, spec=code)
    assert len(named_in_runtime(plan)) == 1


def test_imports_inside_functions_are_counted_once():
    code = "import a\nclass C:\n    def f(self):\n        import b\n        def g():\n            import c"
    assert functions_that_import(planned(keep=code)) == {("keep", 4), ("keep", 6)}


@pytest.mark.parametrize(("found", "message"), [({"new", "old"}, "advice.*new"), (set(), "mended.*old")])
def test_a_list_shrinks(found, message):
    with pytest.raises(AssertionError, match=message):
        check_list(found, {"old": "why"}, "advice")
