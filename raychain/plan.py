"""`python -m raychain.plan` is `raychain plan`; imported, `raychain.plan` is the function in raychain/api."""

from raychain.cli.program import as_module

as_module(__name__, "plan")
