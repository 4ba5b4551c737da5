"""The former name of `raychain.data`: `raychain.feed.decode` gives what `raychain.data.decode` has, with a warning."""

from __future__ import annotations

import warnings

from raychain import data

warnings.warn("raychain.feed is now raychain.data", DeprecationWarning, stacklevel=2)
__path__ = data.__path__
