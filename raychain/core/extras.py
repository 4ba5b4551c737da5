"""Libraries that not every installation has, imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from raychain.errors import InputError


def language_library(name: str) -> Any:
    """The module `transformers` or `tokenizers`. Raises InputError where the extra `lm` is not installed."""
    try:
        found = importlib.import_module(name)
        if name == "transformers":  # which would draw bars for every file that it reads or writes
            found.utils.logging.disable_progress_bar()
        return found
    except ImportError as error:
        raise InputError("task.paradigm", "lm", f"raychain with the extra lm, which has {name} ({error})",
                         "pip install 'raychain[lm]'") from None  # fmt: skip
