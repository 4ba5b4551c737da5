"""raychain: pre-train a family of models as a chain, on Ray."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import TYPE_CHECKING, Any

from raychain import signals
from raychain.terminal import LogLines

if TYPE_CHECKING:
    from raychain.api.evaluate import evaluate
    from raychain.api.export import export
    from raychain.api.grow import grow
    from raychain.api.plan import plan
    from raychain.api.report import report
    from raychain.api.run import run
    from raychain.api.search import search

__version__ = "0.1.0"
__all__ = ["evaluate", "export", "grow", "plan", "report", "run", "search"]

if sys.argv and sys.argv[0].rpartition("/")[2] in ("-m", "raychain"):  # this process is a command of raychain's
    signals.early()
logging.getLogger(__name__).addHandler(LogLines())


def __getattr__(name: str) -> Any:
    # Imported on use: drawing processes and --help need neither torch nor Ray.
    if name in __all__:
        return getattr(importlib.import_module(f"raychain.api.{name}"), name)
    raise AttributeError(f"module 'raychain' has no attribute {name!r}")
