"""The `ray` command for nodes that listen on 127.0.0.1 alone, as `cluster/local.py` starts them."""

from __future__ import annotations

from raychain.backend_ray import internals


def main() -> None:
    """Runs the command of `sys.argv`."""
    internals.stay_on_loopback()
    from ray.scripts.scripts import main as ray

    ray()


if __name__ == "__main__":
    main()
