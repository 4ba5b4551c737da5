"""Work that others go before."""

from __future__ import annotations

import os


def run_when_idle() -> None:
    """Lowest priority for this thread and those it starts. Ray's workers themselves run at nice 15, next to which 19
    would be no difference; Linux has a class below.
    """
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.nice(19)
