"""`python -m raychain.run` is `raychain run`; imported, `raychain.run` is the function in raychain/api."""

from raychain.cli.program import as_module

as_module(__name__, "run")
