import dataclasses

import pytest

from vlmzip import Pool2d, RandomTokens, UserError, VisionZip, available, catalogue


def test_available_is_sorted_and_named_by_file():
    assert list(available()) == sorted(available())
    assert available()["visionzip"] is VisionZip


def test_a_method_from_anywhere():
    assert catalogue.find("vlmzip.methods.pool2d:Pool2d") is Pool2d


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("visonzip", "did you mean 'visionzip'"),
        ("xyz", "choose one of adaptive_visionzip, cdpruner, chain, dart, dfmr"),
        ("no.such:Thing", "cannot import"),
        ("vlmzip.methods.pool2d:Nothing", "cannot import"),
        ("vlmzip:Compressor", "is not a method"),
        (":", "cannot import"),
        ("math:sqrt", "is not a method"),
    ],
)
def test_what_is_no_method_is_refused_with_the_closest(name, message):
    with pytest.raises(UserError, match=message):
        catalogue.find(name)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("dominant", "many", "dominant must be a whole number of at least 0, got 'many'"),
        ("merge", "meen", "did you mean 'mean'"),
        ("site", "in", "site must be pre_projector, got 'in'"),
        ("tau", "1", "no field 'tau'"),
    ],
)
def test_unreadable_settings_are_refused(name, text, message):
    with pytest.raises(UserError, match=message):
        catalogue.make(VisionZip, {name: text})


def test_settings_from_text():
    assert catalogue.make(VisionZip, {"dominant": "5", "contextual": "2", "merge": "mean"}) == VisionZip(
        dominant=5, contextual=2, merge="mean"
    )


def test_types_of_fields_are_named_in_files_without_postponed_annotations():
    made = dataclasses.make_dataclass("Made", [("stride", int, 4)], bases=(RandomTokens,), frozen=True, kw_only=True)
    assert {field.name: field.type for field in catalogue.describe(made)}["stride"] == "a whole number"
