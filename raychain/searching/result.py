"""What search.json and best.yaml say of trials."""

from __future__ import annotations

import yaml

from raychain.config.experiment import Experiment
from raychain.config.search import Proxy
from raychain.core.storage import Folder
from raychain.errors import without_secrets
from raychain.evaluators.metrics import Definition
from raychain.records import CheckRecord, ProxyRecord, TrialRecord
from raychain.searching.outcome import rank_correlation, score
from raychain.searching.trials import Trial

BEST = "best.yaml"


def trial_record(trial: Trial) -> TrialRecord:
    """The trial as it stands."""
    transfer = trial.task.experiment.transfer.model_dump(mode="json") if len(trial.chain) > 1 else None
    entry = TrialRecord(
        number=trial.number,
        kind=trial.kind,
        chain=trial.chain,
        transfer=transfer,
        macs=trial.macs,
        metrics=trial.metrics,
        status=trial.status,
        params=trial.params,
        keys=trial.keys,
    )
    if trial.reason:
        entry.reason = trial.reason
    if trial.status == "stopped":
        entry.reached = trial.reached
    return entry


def proxy_record(proxy: Proxy | None, trials: list[Trial], metric: Definition) -> ProxyRecord | None:
    """The proxy's settings, and how its metrics compare with those of the same chains trained in full; None without
    a proxy.
    """
    if proxy is None:
        return None
    pairs = []
    for full in (trial for trial in trials if trial.kind == "full"):
        cheap = next(t for t in trials if t.chosen and t.params == full.params)
        small, large = score(cheap, metric), score(full, metric)
        if small is not None and large is not None:
            pairs.append(CheckRecord(trial=cheap.number, full_trial=full.number, proxy=small, full=large))
    found = ProxyRecord.of(proxy.model_dump(mode="json"))
    found.checked = pairs
    found.rank_correlation = rank_correlation([(pair.proxy, pair.full) for pair in pairs])
    return found


def write_best(out: Folder, experiment: Experiment) -> None:
    """Writes the best chain as an experiment of its own."""
    plain = experiment.model_copy(update={"name": f"{experiment.name}-best"})
    tree = plain.model_dump(mode="json", exclude_unset=True)
    tree = {key: value for key, value in tree.items() if value is not None}
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)
    out.write(BEST, without_secrets(text).encode())
