"""When a search, or a chain, is over before its end: any stoppers of Tune's."""

from __future__ import annotations

from collections.abc import Sequence

from ray.tune import Stopper

from raychain.core.json import Json
from raychain.searching.trials import CHOSEN
from raychain.searching.tune.live import Live


class ChainStopper(Live, Stopper):
    """Asks all of these, of chosen chains; of controls it asks none."""

    def __init__(self, stoppers: Sequence[Stopper]) -> None:
        self._stoppers = list(stoppers)

    def __call__(self, trial_id: str, result: Json) -> bool:
        if result["config"]["kind"] not in CHOSEN:
            return False
        told = [stopper(trial_id, result) for stopper in self._stoppers]  # each is to hear of every result
        return any(told) and not result["complete"]  # which ends by itself, and was not stopped

    def stop_all(self) -> bool:
        """Whether everything is over."""
        return any(stopper.stop_all() for stopper in self._stoppers)
