"""Between Tune's loop, in the thread that called, and the campaign, in a thread of its own."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence

from raychain.backend_ray.board import Waiting
from raychain.errors import RunFailed
from raychain.searching.campaign import Campaign, Runner, Stop, Unwanted, Wanted
from raychain.searching.reports import DONE, Report
from raychain.searching.trials import Trial

SETTLE_S = 5.0
"""How long no chain is asked for at most, while Tune has not heard of one that is over, so that the searcher knows."""
LEFT_S = 1.5
"""After a signal Tune's loop ends first, then trials that wait are let go: else Tune would take them for failed."""
ENDS_S = 10.0


class Desk:
    """Passes wishes on to the campaign, and its news to the trials. A context manager: the campaign's thread."""

    def __init__(self, runner: Runner) -> None:
        self._runner, self._usual = runner, signal.getsignal(signal.SIGUSR1)
        self._board = Waiting()
        self.trainable = self._board.trainable
        self.failed: dict[int, str] = {}
        """Why trials failed: to try them again is no use."""
        self.interrupted = False
        self.alive = 0
        """Trials that have a process, or soon will."""
        self._ended: dict[int, float] = {}
        """When trials were over for the campaign that are not yet for Tune."""
        self._hungry, self._heard, self._sent = threading.Event(), 0, 0
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    # What the campaign calls, in its thread

    def tell(self, trial: Trial, first: int, reports: Sequence[Report], end: str | None) -> None:
        """What a trial is to report, and whether it is over."""
        if end:
            self._ended.setdefault(trial.number, time.monotonic())
            if end != DONE:
                self.failed[trial.number] = end
        self._board.post(trial.number, first, reports, end)

    def hungry(self, yes: bool, heard: int) -> None:
        """Whether another chain is needed, as of so many `Wanted`."""
        self._heard = heard
        self._hungry.set() if yes else self._hungry.clear()

    # What Tune's side calls

    def start(self, campaign: Campaign) -> None:
        """Begins the campaign's thread, and waits until it has looked around."""
        self._thread = threading.Thread(target=self._run, args=(campaign,), name="campaign", daemon=True)
        self._thread.start()
        self._hungry.wait(ENDS_S)

    def want(self, trials: Sequence[Trial]) -> None:
        """Has the stages of these be trained."""
        self._sent += 1
        self.alive += len(trials)
        self._runner.put(Wanted(trials))

    def unwant(self, trial: Trial, *, for_good: bool) -> None:
        """The trial is over, or waits for others, and its process is let go."""
        self.alive -= 1
        self._ended.pop(trial.number, None)
        self._runner.put(Unwanted(trial))
        self._board.forget(trial.number, for_good=for_good)

    def needs_more(self, patience_s: float = 0.0) -> bool:
        """Whether a worker group is free and no stage ready, and Tune knows all that the campaign knows."""
        if patience_s:
            self._hungry.wait(patience_s)
        late = time.monotonic() - SETTLE_S
        settled = all(since < late for since in list(self._ended.values()))
        return settled and self._hungry.is_set() and self._heard == self._sent

    def check(self) -> None:
        """Raises RunFailed where the campaign or the board has ended: trials would wait for ever, or all fail."""
        if self._failure is not None:
            raise RunFailed(f"the search ended: {self._failure}") from self._failure
        self._board.check()

    def interrupt(self) -> None:
        """Has all workers save; trials that wait are let go a little later. Also in handlers of signals."""
        self.interrupted = True
        self._runner.put(Stop())
        if callable(signal.getsignal(signal.SIGUSR1)):  # Tune's own: its loop ends, and all trials stay as they are
            signal.raise_signal(signal.SIGUSR1)
        timer = threading.Timer(LEFT_S, self._board.release)
        timer.daemon = True
        timer.start()

    def end(self) -> None:
        """Has all workers save, and waits for them. Raises what ended the campaign before."""
        self._runner.put(Stop())
        while self._thread and self._thread.is_alive():
            self._thread.join(0.2)
        if self._failure is not None:
            raise RunFailed(f"the search ended: {self._failure}") from self._failure

    def close(self) -> None:
        """Ends the board."""
        self._board.close()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, self._usual)

    def _run(self, campaign: Campaign) -> None:
        try:
            campaign.run()
        except BaseException as error:
            self._failure = error
