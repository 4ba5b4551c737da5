"""JSON values: what they are called in signatures, and whatever Python has, as JSON can hold it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from raychain.errors import without_secrets

Json = dict[str, Any]
"""A JSON object of any content: a file of another program, or what a function of the API returns."""


def plain(value: Any) -> Any:
    """`value` as a record holds it: numbers that are not finite become None, other types their number or their text,
    and text loses the secrets of addresses.
    """
    match value:
        case None | bool() | int():
            return value
        case str():
            return without_secrets(value)
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(k): plain(v) for k, v in value.items()}
        case list() | tuple():
            return [plain(v) for v in value]
    try:
        return plain(float(value))
    except (TypeError, ValueError):
        return str(value)
