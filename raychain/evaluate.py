"""`python -m raychain.evaluate` is `raychain evaluate`; `raychain.evaluate` is the function in raychain/api."""

from raychain.cli.program import as_module

as_module(__name__, "evaluate")
