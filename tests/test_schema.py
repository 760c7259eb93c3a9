"""One schema: what text, YAML and JSON can say for each type of a field, and one line for what they cannot."""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pytest
from annotated_types import Ge, Gt, Le, Lt

from vlmzip import Compressor, Keep, Pool2d, UserError, VisionZip, schema


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, kw_only=True)
class Part:
    size: Annotated[int, Ge(1)]
    """How large it is."""
    share: Annotated[float, Ge(0), Lt(1)] = 0.5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every type that a field can have."""

    kinds: ClassVar[tuple[str, ...]] = ()

    name: str = "x"
    """What it is called,
    in one line."""
    count: Annotated[int, Ge(1), Le(1000)] = 3
    number: Annotated[float, Gt(0)] = 1 / 9
    plain: int = 0
    truth: bool = False
    merge: Literal["reference", "mean"] = "mean"
    colour: Colour | None = None
    keep: Keep | None = None
    """Tokens."""
    layers: Annotated[int, Ge(1)] | tuple[Annotated[int, Ge(1)], ...] = 2
    learn: tuple[Literal["projector", "llm"], ...] = ("llm",)
    counts: tuple[Keep, ...] | None = None
    note: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    part: Part | None = None

    def __post_init__(self):
        schema.check(self)


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("name", 5, "5"),
        ("name", 0.25, "0.25"),
        ("name", "none", "none"),
        ("count", "7", 7),
        ("count", np.int64(7), 7),
        ("number", "1e-3", 0.001),
        ("number", 2, 2.0),
        ("number", np.float32(0.5), 0.5),
        ("number", Fraction(1, 2), 0.5),
        ("truth", "True", True),
        ("truth", "false", False),
        ("merge", "reference", "reference"),
        ("colour", "blue", Colour.BLUE),
        ("colour", "none", None),
        ("keep", "64", 64),
        ("keep", "0.25", 0.25),
        ("keep", "1.0", "100%"),
        ("keep", "25%", "25%"),
        ("keep", "none", None),
        ("keep", np.float32(0.5), 0.5),
        ("layers", "2", 2),
        ("layers", "2, 4", (2, 4)),
        ("layers", [2, 4], (2, 4)),
        ("layers", (2, 4), (2, 4)),
        ("learn", "projector", ("projector",)),
        ("learn", ["projector", "llm"], ("projector", "llm")),
        ("learn", [], ()),
        ("counts", "300,0.5,11%", (300, 0.5, "11%")),
        ("counts", [300, 0.5], (300, 0.5)),
        ("note", "none", "none"),
        ("note", None, None),
        ("more", {"a": [1]}, {"a": [1]}),
        ("part", {"size": "3"}, Part(size=3)),
        ("part", None, None),
        ("part", Part(size=4), Part(size=4)),
    ],
)
def test_what_a_field_takes(name, given, value):
    for made in (schema.read(Settings, {name: given}), Settings(**{name: given})):
        assert getattr(made, name) == value
        assert type(getattr(made, name)) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("name", None, "name must be text, got None"),
        ("name", True, "name must be text, got True"),
        ("count", "many", "count must be a whole number from 1 to 1,000, got 'many'"),
        ("count", 0, "count must be a whole number from 1 to 1,000, got 0"),
        ("count", 2.0, "count must be a whole number from 1 to 1,000, got 2.0"),
        ("count", "2.0", "count must be a whole number from 1 to 1,000, got '2.0'"),
        ("count", True, "count must be a whole number from 1 to 1,000, got True"),
        ("count", None, "count must be a whole number from 1 to 1,000, got None"),
        ("count", [3], r"count must be a whole number from 1 to 1,000, got \[3\]"),
        ("number", 0, "number must be a number above 0, got 0"),
        ("number", math.nan, "number must be a number above 0, got nan"),
        ("number", "nan", "number must be a number above 0, got 'nan'"),
        ("number", "inf", "number must be a number above 0, got 'inf'"),
        ("number", 10**400, "number must be a number above 0, got 1000"),
        ("number", False, "number must be a number above 0, got False"),
        ("plain", True, "plain must be a whole number, got True"),
        ("truth", 1, "truth must be true or false, got 1"),
        ("truth", "yes", "truth must be true or false, got 'yes'"),
        ("merge", "meen", r"merge must be reference or mean, got 'meen'; did you mean 'mean'\?$"),
        ("merge", 3, "merge must be reference or mean, got 3$"),
        ("colour", "green", "colour must be red or blue, got 'green'$"),
        ("keep", 0, "keep=0 keeps nothing"),
        ("keep", "many", "keep must be a number, got 'many'; write 64, 0.25 or '25%'"),
        ("keep", True, "keep must be 64, 0.25 or '25%', got True"),
        ("layers", "2,x", "layers must be a whole number of at least 1 or several, such as 1,3, got '2,x'"),
        ("layers", "2,0", "layers must be .* got '2,0'"),
        ("layers", [True], r"layers must be .* got \[True\]"),
        (
            "learn",
            ["projektor"],
            r"learn must be .* projector or llm, got \['projektor'\]; did you mean 'projector'\?$",
        ),
        ("learn", 5, "learn must be one or several, separated by commas: projector or llm, got 5$"),
        ("counts", "300,x", "keep must be a number, got 'x'"),
        ("more", 5, "more must be a mapping, got 5"),
        ("part", 5, "part must be a mapping of settings such as {size: …}, got 5"),
    ],
)
def test_what_a_field_refuses_is_named_in_a_line(name, given, message):
    for make in (lambda: schema.read(Settings, {name: given}), lambda: Settings(**{name: given})):
        with pytest.raises(UserError, match=f"^{message}") as caught:
            make()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cuont": 1}, "the file: unknown key 'cuont'; did you mean 'count'?"),
        ({"kinds": 1}, "the file: unknown key 'kinds'"),
        ({5: 1}, "the file: unknown key 5"),
        ({"part": {"sise": 1}}, "part: unknown key 'sise'; did you mean 'size'?"),
        ({"part": {}}, "part.size is missing"),
        ({"part": True}, "part.size is missing"),
        ({"part": {"size": 0}}, "part.size must be a whole number of at least 1, got 0"),
        ({"part": {"size": 1, "share": 1}}, "part.share must be a number of at least 0 and below 1, got 1"),
        ([1], r"the file must be a mapping of settings such as {name: …}, got \[1\]"),
    ],
)
def test_keys_and_parts(content, message):
    with pytest.raises(UserError, match=f"^{message}"):
        schema.read(Settings, content)


def test_dataclasses_as_they_are():
    @dataclass(frozen=True, kw_only=True)
    class Holds:
        part: Part
        method: Compressor = field(default_factory=VisionZip)

        def __post_init__(self):
            schema.check(self)

    assert schema.read(Holds, {"part": {"size": 2}}) == Holds(part=Part(size=2))
    assert Holds(part=Part(size=2), method=Pool2d()).method == Pool2d()
    with pytest.raises(UserError, match="part must be a Part, got None"):
        schema.read(Holds, {"part": None})
    with pytest.raises(UserError, match=r"method must be a Compressor, got \{\}"):
        schema.read(Holds, {"part": {"size": 2}, "method": {}})


def test_fields_are_described_from_their_types_and_the_strings_below_them():
    fields = {described.name: described for described in schema.describe(Settings)}
    assert list(fields)[:3] == ["name", "count", "number"]
    assert list(fields)[-2:] == ["part.size", "part.share"]
    assert fields["name"].doc == "What it is called, in one line."
    assert (fields["part.size"].doc, fields["part.size"].default) == ("How large it is.", "required")
    assert fields["number"].default == 0.1111
    assert {name: fields[name].type for name in ("count", "merge", "colour", "keep", "layers", "part.share")} == {
        "count": "a whole number from 1 to 1,000",
        "merge": "reference or mean",
        "colour": "red or blue",
        "keep": "64, 0.25 or '25%'",
        "layers": "a whole number of at least 1 or several, such as 1,3",
        "part.share": "a number of at least 0 and below 1",
    }


def test_fields_of_the_class_itself_stand_before_those_of_its_bases():
    @dataclass(frozen=True, kw_only=True)
    class More(Settings):
        own: int = 1
        """Its own."""
        count: Annotated[int, Ge(5)] = 5

    names = [described.name for described in schema.describe(More)]
    assert names[:3] == ["count", "own", "name"]
    with pytest.raises(UserError, match="count must be a whole number of at least 5, got 4"):
        More(count=4)
