"""`vlmzip doctor`: what is installed, and what is missing for which command."""

import json
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from vlmzip.cli import doctor
from vlmzip.cli.main import main
from vlmzip.errors import how_to_install
from vlmzip.version import __version__

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
REQUIRED = [
    "torch>=2.6", "transformers>=5.18", "accelerate>=1.10; extra == 'train'", "peft>=0.17; extra == 'train'",
    "accelerate>=1.10; extra == 'eval'", "matplotlib>=3.9; extra == 'eval'", "easy-vqa==1.0; extra == 'eval'",
    "filelock<4; extra == 'lmms'", "lmms-eval>=0.7.3,<0.8; extra == 'lmms'", "ruff>=0.12; extra == 'dev'",
]  # fmt: skip
INSTALLED = {
    "torch": "2.13.0+cpu", "transformers": "5.25.0.dev0", "accelerate": "1.15.0", "peft": "0.21.2", "filelock": "4.3.1",
    "lmms-eval": "0.7.3", "matplotlib": "3.11.2", "easy-vqa": "1.0", "argcomplete": "3.7.2",
}  # fmt: skip


@pytest.fixture
def installed(monkeypatch):
    """The installed packages; a test changes them."""
    versions = dict(INSTALLED)

    def version(name):
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor, "requires", lambda name: REQUIRED)
    monkeypatch.setattr(doctor, "version", version)
    return versions


def ran(capsys, *options):
    code = main(["doctor", *options])
    out, err = capsys.readouterr()
    return code, out, err


def test_versions_devices_and_what_is_missing(capsys, installed):
    del installed["peft"]
    code, out, err = ran(capsys, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert (report["vlmzip"], report["broken"]) == (__version__, [])
    assert report["devices"][0]["name"] == "cpu"
    packages = {(package["name"], package["extra"]): package for package in report["packages"]}
    assert packages["torch", ""]["installed"] == "2.13.0+cpu"
    assert [key for key, package in packages.items() if not package["fits"]] == [
        ("filelock", "lmms"),
        ("peft", "train"),
    ]
    uses = {use["name"]: (use["missing"], use["install"]) for use in report["uses"]}
    assert uses["train"] == ([], how_to_install("train"))
    assert uses["train with lora"] == (["peft"], how_to_install("train"))
    assert uses["eval --suite"] == (["filelock<4"], how_to_install("lmms"))
    assert uses["ask, show, calibrate on video files"] == (["av", "torchvision"], how_to_install("video"))


def test_text_says_the_same_in_100_columns(capsys, installed):
    code, out, _ = ran(capsys)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 100
    lines = [line.split() for line in out.splitlines()]
    assert ["eval", "--suite", "needs", "filelock<4", "lmms"] in lines
    assert ["train", "works"] in lines
    assert ["accelerate", "1.15.0", "eval", ">=1.10,", "train", ">=1.10"] in lines
    assert lines[-3] == ["all", "else", "works"]
    assert out.splitlines()[-1] == f"To install an extra: {how_to_install('EXTRA')}"
    assert "ruff" not in out


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_only_a_core_that_cannot_work_is_an_error(capsys, installed, options):
    installed["torch"] = "2.3.1"
    code, out, err = ran(capsys, *options)
    assert code == 2
    assert err == "vlmzip: vlmzip cannot work here: torch>=2.6 is missing: pip install 'torch>=2.6'\n"
    assert "peft" in out


def test_a_package_that_cannot_be_imported():
    code = "import sys; sys.modules['torch'] = None; from vlmzip.cli.main import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "vlmzip cannot work here: torch cannot be imported (" in done.stderr
    assert "Traceback" not in done.stderr
    assert "transformers" in done.stdout


def test_uses_name_packages_of_their_extras():
    extras = PROJECT["optional-dependencies"]
    named = {extra: {Requirement(line).name for line in lines} for extra, lines in extras.items()}
    assert {use.extra for use in doctor.USES} == set(extras) - {*doctor.DEVELOPERS}
    assert [use.name for use in doctor.USES if not set(use.packages) <= named[use.extra]] == []
