"""`python -m raychain.report` is `raychain report`; imported, `raychain.report` is the function in raychain/api."""

from raychain.cli.program import as_module

as_module(__name__, "report")
