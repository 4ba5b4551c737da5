"""raychain: pre-train a family of vision foundation models as a chain, on Ray."""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType
from typing import Any

from raychain import signals
from raychain.terminal import LogLines

__version__ = "0.1.0"
__all__ = ["evaluate", "grow", "plan", "report", "run", "search"]

if sys.argv and sys.argv[0].rpartition("/")[2] in ("-m", "raychain"):  # this process is a command of raychain's
    signals.early()
logging.getLogger(__name__).addHandler(LogLines())


class _Command(ModuleType):
    """A command's module, callable as its function: `raychain.run(...)` beside `python -m raychain.run`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **options)


def command(name: str) -> None:
    """Makes the module `name` (its `__name__`) callable."""
    if name in sys.modules and name != "__main__":
        sys.modules[name].__class__ = _Command


def __getattr__(name: str) -> Any:
    # Imported on use: drawing processes and --help need neither torch nor Ray.
    if name in __all__:
        return importlib.import_module(f"raychain.{name}")
    raise AttributeError(f"module 'raychain' has no attribute {name!r}")
