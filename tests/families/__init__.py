"""The families that the tests run over: each file here is one, and is found by being here.

A file has a class that derives from `tests.tiny.Family` and whose `name` is the file's. Tests take the fixture
`family`. In quick runs (`-m "not slow"`) they run over the families that lead, and those marked `every_family` run over
all. So a new file costs quick runs about a second, until its class says `leads = True`.
"""

from importlib import import_module
from pkgutil import iter_modules

import transformers
from packaging.version import Version

from tests.tiny import Family


def _in(module: str) -> type[Family]:
    """Return the class whose `name` is that of the module."""
    classes = vars(import_module(f"{__name__}.{module}")).values()
    (family,) = (cls for cls in classes if isinstance(cls, type) and getattr(cls, "name", None) == module)
    return family


ALL: dict[str, type[Family]] = {module.name: _in(module.name) for module in iter_modules(__path__)}
#: Name → class, for those that run with this version of transformers. Calling it gives a tiny model with inputs.
FAMILIES = {name: cls for name, cls in ALL.items() if Version(transformers.__version__) >= Version(cls.since)}
#: For tests that need any model.
tiny_llava = FAMILIES["llava"].build


def save_checkpoint(folder, model=None) -> None:
    """A tiny LLaVA with processor, as a folder that `from_pretrained` loads."""
    FAMILIES["llava"].processor().save_pretrained(folder)
    (model or tiny_llava()).save_pretrained(folder)
