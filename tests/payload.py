"""What must never be unpickled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class Payload:
    """Makes the folder `path` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)
