"""`python -m raychain.data` is `raychain data`."""

from raychain.cli.program import as_module

as_module(__name__, "data")
