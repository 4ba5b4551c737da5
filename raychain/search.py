"""`python -m raychain.search` is `raychain search`; imported, `raychain.search` is the function in raychain/api."""

from raychain.cli.program import as_module

as_module(__name__, "search")
