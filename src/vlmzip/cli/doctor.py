"""`vlmzip doctor`: print versions and devices, and which commands miss a package."""

from __future__ import annotations

import platform
import re
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from types import ModuleType

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vlmzip.errors import UserError, how_to_install
from vlmzip.lab.table import NOTHING, print_json, print_table, show_bytes
from vlmzip.version import __version__

#: Packages whose import can fail although they are installed, because their versions do not fit together.
IMPORTED = ("torch", "transformers")
#: The extras of those who develop vlmzip. No command needs them.
DEVELOPERS = ("dev", "docs")


@dataclass(frozen=True)
class Use:
    """A use of some commands that needs packages of an extra."""

    name: str
    extra: str
    packages: tuple[str, ...]


USES = (
    Use("ask, show, calibrate on video files", "video", ("av", "torchvision")),
    Use("train", "train", ("accelerate",)),
    Use("train with lora", "train", ("peft",)),
    Use("train on video files", "video", ("av", "torchvision")),
    Use("study, and figures of other commands", "eval", ("matplotlib",)),
    Use("eval in several processes", "eval", ("accelerate",)),
    Use("tasks easy-vqa and easy-vqa:tuned", "eval", ("easy-vqa",)),
    Use("eval --suite", "lmms", ("filelock", "lmms-eval")),
    Use("serve", "serve", ("fastapi", "uvicorn")),
    Use("serve: the figures at /metrics", "serve", ("prometheus-client",)),
    Use("serve: the playground", "playground", ("gradio",)),
    Use("serve --engine vllm, and vLLM itself", "vllm", ("vllm",)),
    Use("encode, ask --store", "store", ("pyarrow",)),
    Use("encode --workers", "ray", ("ray",)),
    Use("shell completion", "completion", ("argcomplete",)),
)


@dataclass(frozen=True)
class Package:
    """A package that vlmzip requires, always or for an extra."""

    name: str
    needed: str
    """The versions that vlmzip accepts, such as ">=2.6"; empty for any."""
    installed: str | None
    extra: str = ""

    @property
    def fits(self) -> bool:
        return self.installed is not None and SpecifierSet(self.needed).contains(self.installed, prereleases=True)

    @property
    def lack(self) -> str:
        """Return what is missing if the package does not fit: the package, or a version of it."""
        return self.name if self.installed is None else f"{self.name}{self.needed}"


def run(args: Namespace) -> None:
    packages, (modules, failures) = _packages(), _imported()
    broken = _broken(packages, failures)
    devices = _devices(modules["torch"]) if "torch" in modules else []
    if args.json:
        _print_json(packages, devices, broken)
    else:
        _print(packages, devices, broken)
    if broken:
        raise UserError(f"vlmzip cannot work here: {'; '.join(broken)}")


def _packages() -> list[Package]:
    """Return the packages that the installed vlmzip requires, those of every command first."""
    try:
        requirements = [Requirement(line) for line in requires("vlmzip") or ()]
    except PackageNotFoundError:
        raise UserError("vlmzip itself is not installed: pip install .") from None
    packages = [_package(requirement) for requirement in requirements]
    packages = [package for package in packages if package.extra not in DEVELOPERS]
    return sorted(packages, key=lambda package: package.extra)


def _package(requirement: Requirement) -> Package:
    extra = re.search(r"extra == [\"']([\w-]+)[\"']", str(requirement.marker))
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        installed = None
    return Package(requirement.name, str(requirement.specifier), installed, extra[1] if extra else "")


def _broken(packages: Iterable[Package], failures: Mapping[str, Exception]) -> list[str]:
    """Return the reasons why no command can work, with remedies."""
    unfit = [package for package in packages if not package.extra and not package.fits]
    reasons = [f"{package.lack} is missing: pip install '{package.name}{package.needed}'" for package in unfit]
    for name, error in failures.items():
        if name not in [package.name for package in unfit]:
            reasons.append(f"{name} cannot be imported ({error}): pip install --force-reinstall {name}")
    return reasons


def _imported() -> tuple[dict[str, ModuleType], dict[str, Exception]]:
    """Return the modules of `IMPORTED` by name, and the errors of those that cannot be imported."""
    modules, failures = {}, {}
    for name in IMPORTED:
        try:
            modules[name] = import_module(name)
        except Exception as error:  # a library of the system may be missing, or a package may not fit
            failures[name] = error
    return modules, failures


def _devices(torch: ModuleType) -> list[dict[str, str]]:
    """Return name and description of every device on which models can run."""
    threads = torch.get_num_threads()
    devices = [{"name": "cpu", "description": f"{threads} thread{'s' * (threads != 1)}"}]
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        devices.append({"name": f"cuda:{number}", "description": f"{card.name}, {show_bytes(card.total_memory)}"})
    if torch.backends.mps.is_available():
        devices.append({"name": "mps", "description": "Apple GPU"})
    return devices


def _missing(use: Use, packages: Iterable[Package]) -> list[str]:
    """Return the packages and versions that a use lacks."""
    required = {(package.name, package.extra): package for package in packages}
    # An editable installation may have been made before the extra was there.
    needed = [required.get((name, use.extra)) or _package(Requirement(name)) for name in use.packages]
    return [package.lack for package in needed if not package.fits]


def _print_json(packages: list[Package], devices: list[dict[str, str]], broken: list[str]) -> None:
    uses = [{**asdict(use), "missing": _missing(use, packages), "install": how_to_install(use.extra)} for use in USES]
    print_json(
        {
            "vlmzip": __version__,
            "python": platform.python_version(),
            "system": platform.platform(),
            "devices": devices,
            "packages": [{**asdict(package), "fits": package.fits} for package in packages],
            "uses": uses,
            "broken": broken,
        }
    )


def _print(packages: list[Package], devices: list[dict[str, str]], broken: list[str]) -> None:
    print(f"vlmzip {__version__}, Python {platform.python_version()}, {platform.platform()}\n")
    print_table(["device", "what it is"], [[device["name"], device["description"]] for device in devices])
    print()
    by_name = {package.name: [other for other in packages if other.name == package.name] for package in packages}
    print_table(
        ["package", "installed", "needed by"],
        [[name, same[0].installed or NOTHING, ", ".join(map(_needed_by, same))] for name, same in by_name.items()],
    )
    print()
    rows = [[use.name, *_state(use.extra, _missing(use, packages))] for use in USES]
    print_table(["use", "state", "extra"], [*rows, ["all else", "does not work" if broken else "works", ""]])
    if any(extra for _, _, extra in rows):
        print(f"\nTo install an extra: {how_to_install('EXTRA')}")


def _state(extra: str, missing: list[str]) -> tuple[str, str]:
    return (f"needs {', '.join(missing)}", extra) if missing else ("works", "")


def _needed_by(package: Package) -> str:
    return f"{package.extra or 'every command'} {package.needed}".strip()
