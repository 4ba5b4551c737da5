"""`python -m raychain.grow` is `raychain grow`; imported, `raychain.grow` is the function in raychain/api."""

from raychain.cli.program import as_module

as_module(__name__, "grow")
