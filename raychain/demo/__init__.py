"""The demo data maker: real OpenMoji pictures with true captions, as webdataset shards.

`make_demo` draws them, `is_current` says whether a folder already holds them. Only making needs the extra
`raychain[demo]`; importing this package does not.
"""

from raychain.demo.folder import DemoError, DemoSummary, is_current
from raychain.demo.maker import make_demo

__all__ = ["DemoError", "DemoSummary", "is_current", "make_demo"]
