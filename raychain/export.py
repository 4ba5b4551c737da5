"""`python -m raychain.export` is `raychain export`; imported, `raychain.export` is the function in raychain/api."""

from raychain.cli.program import as_module

as_module(__name__, "export")
