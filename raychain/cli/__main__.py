"""`python -m raychain.cli` is `raychain`."""

from raychain.cli import app

if __name__ == "__main__":
    app()
