"""States that are not finite are never saved, and a stage goes on from its last good one at another learning rate."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_checkpoint import follow_on, state, step

import raychain
from raychain.backend_ray import group
from raychain.backend_ray.worker import train_chain
from raychain.config.loading import validate
from raychain.core.storage import Folder
from raychain.errors import Diverged, InputError, RunFailed
from raychain.events import TrunkShared
from raychain.runs.policy import slower
from raychain.runs.resolve import make_task
from raychain.training.checkpoint import MARKER, OPTIMIZER, WEIGHTS, Checkpoints, _digest
from raychain.training.loop import StageLoop
from raychain.training.state import TrainState, all_finite
from raychain.training.states import StageStates
from raychain.training.task import StageTask

NAME = "checkpoints/0-model"
KEYS = tuple(digit * 32 for digit in "abc")


def moments(at: TrainState, kind: str) -> torch.Tensor:
    return at.optimizer.state[next(at.student.parameters())][kind]


PLACES: dict[str, Callable[[TrainState], torch.Tensor]] = {
    "weight": lambda at: next(at.student.parameters()),
    "scale": lambda at: at.student.model.logit_scale,
    "exp_avg": lambda at: moments(at, "exp_avg"),
    "exp_avg_sq": lambda at: moments(at, "exp_avg_sq"),
    "average": lambda at: next(at.average.module.parameters()),  # type: ignore[union-attr]
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", PLACES)
def test_a_state_that_is_not_finite_is_not_saved_and_pushes_no_good_one_out(place, value, tmp_path):
    checkpoints, at = Checkpoints(Folder(str(tmp_path)), NAME, KEYS[0], keep=1), state(0)
    step(at, 1)
    assert checkpoints.save(at, wait=True)
    step(at, 2)
    with torch.no_grad():
        PLACES[place](at).view(-1)[-1] = value
    assert not at.finite()
    for wait in (False, True):
        assert not checkpoints.save(at, wait=wait)
    checkpoints.finish()
    assert [path.name for path in (tmp_path / NAME).iterdir()] == ["0000000001"]
    assert checkpoints.latest() == 1


def test_a_state_that_is_not_finite_is_told_while_storage_stalls(tmp_path):
    checkpoints, at = Checkpoints(Folder(str(tmp_path)), NAME, KEYS[0], keep=1), state(0)
    stalled, publish = threading.Event(), checkpoints.out.publish
    checkpoints.out.publish = lambda *args: stalled.wait(30) and publish(*args)  # type: ignore
    step(at, 1)
    assert checkpoints.save(at)
    step(at, 2)
    assert checkpoints.save(at), "not written, and not wrong"
    moments(at, "exp_avg").view(-1)[0] = math.nan
    assert not checkpoints.save(at)
    stalled.set()
    checkpoints.finish()
    assert checkpoints.latest() == 1


def test_the_largest_numbers_and_integers_are_finite():
    huge = torch.tensor([torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max])
    assert all_finite([huge, torch.tensor(7), torch.empty(0), torch.tensor(1.0, dtype=torch.float64)])
    assert all_finite([])
    assert not all_finite([huge, torch.tensor(math.nan, dtype=torch.bfloat16)])


@pytest.mark.parametrize("file", [WEIGHTS, OPTIMIZER])
def test_states_of_earlier_versions_that_are_not_finite_are_passed_over(file, tmp_path, caplog):
    checkpoints, at = Checkpoints(Folder(str(tmp_path)), NAME, KEYS[0], keep=3), state(0)
    for number in (1, 2, 3):
        step(at, number)
        checkpoints.save(at, wait=True)
    for number in (2, 3):
        folder = tmp_path / NAME / f"{number:010d}"
        tensors = {name: value.clone() for name, value in load_file(folder / file).items()}
        next(value for value in tensors.values() if value.ndim)[0] = math.nan
        save_file(tensors, folder / file)
        marker = json.loads((folder / MARKER).read_text())
        marker["files"][file] = _digest(folder / file)
        (folder / MARKER).write_text(json.dumps(marker))
    assert checkpoints.latest() == 1
    assert f"in {file} is not finite): set aside" in caplog.text
    assert sorted(path.name for path in (tmp_path / NAME).iterdir()) == [
        "0000000001", "0000000002.damaged", "0000000003.damaged"]  # fmt: skip


def keys_of(changes: dict[int, str], last: str) -> Callable[[int], str]:
    """As a stage task gives them: up to each step the key of the stage before that change."""
    return lambda step: next((key for at, key in changes.items() if step <= at), last)


def names(tmp_path: Path, folder: str = NAME) -> list[int]:
    return sorted(int(path.name) for path in (tmp_path / folder).glob("*"))


def test_states_before_a_change_are_the_unchanged_stages_and_outlive_those_after_it(tmp_path):
    out = Folder(str(tmp_path))
    before, at = Checkpoints(out, NAME, KEYS[0], keep=2), state(0)
    for number in (2, 4, 6):
        follow_on(at, number)
        before.save(at, wait=True)
    assert names(tmp_path) == [4, 6]
    changed = Checkpoints(out, NAME, keys_of({4: KEYS[0]}, KEYS[1]), keep=2)
    changed.arrange(KEYS[:2])
    assert changed.latest() == 4
    assert names(tmp_path, f"{NAME}.{KEYS[0][:8]}") == [6], "what came after the change is another stage's"
    for number in (5, 6, 7):
        follow_on(at, number)
        changed.save(at, wait=True)
    assert names(tmp_path) == [4, 6, 7], "of each key the newest, and the state that the change began at"
    before.arrange(KEYS[:1])
    assert before.latest() == 6
    assert names(tmp_path) == [4, 6]
    assert names(tmp_path, f"{NAME}.{KEYS[1][:8]}") == [6, 7]
    twice = Checkpoints(out, NAME, keys_of({4: KEYS[0], 6: KEYS[1]}, KEYS[2]), keep=1)
    twice.arrange(KEYS)
    assert twice.latest() == 6
    assert twice.marker(6).key == KEYS[1]
    twice.clear()
    assert list((tmp_path / "checkpoints").iterdir()) == [], "the stage is finished"


def test_a_new_stage_in_an_old_run_folder_keeps_its_own_newest_states(tmp_path):
    old, at = Checkpoints(Folder(str(tmp_path)), NAME, KEYS[0], keep=2), state(0)
    for number in (11, 12):
        step(at, number)
        old.save(at, wait=True)
    new = Checkpoints(Folder(str(tmp_path)), NAME, KEYS[1], keep=2)
    new.arrange(KEYS[1:2])
    for number in (1, 2, 3):
        step(at, number)
        new.save(at, wait=True)
    assert names(tmp_path) == [2, 3]
    assert names(tmp_path, f"{NAME}.{KEYS[0][:8]}") == [11, 12]


def stages(tree: dict[str, Any], tmp_path: Path, changes: Any, **more: Any) -> tuple[StageTask, ...]:
    tree["chain"][0] |= {"changes": changes} | more
    return make_task(validate(tree), str(tmp_path / "out")).stages


def test_a_change_is_part_of_the_key_from_its_step_on(tree, tmp_path):
    tree["train"] |= {"schedule": "wsd", "cooldown": "25 %", "warmup": "2 steps"}
    plain, after = stages(tree, tmp_path, [])
    one, grown = stages(tree, tmp_path, [{"at": "8 steps", "lr": 5e-4}])
    two, _ = stages(tree, tmp_path, [{"at": f"{8 * 32} samples", "lr": "5e-4"}, {"at": "12 steps", "lr": 1e-4}])
    assert len({plain.key, one.key, two.key, plain.trunk, one.trunk, two.trunk}) == 6
    assert grown.key != after.key
    assert [one.key_at(step) for step in (1, 8, 9, 24)] == [plain.key] * 2 + [one.key] * 2
    assert [two.key_at(step) for step in (8, 9, 12, 13)] == [plain.key, one.key, one.key, two.key]
    assert [change.trunk for change in two.changes] == [plain.trunk, one.trunk]
    assert [two.peak(step) for step in (0, 7, 8, 11, 12, 23)] == [1e-3, 1e-3, 5e-4, 5e-4, 1e-4, 1e-4]


@pytest.mark.parametrize(
    "at", [["0 steps"], ["24 steps"], ["9 steps", "8 steps"], ["8 steps", "8 steps"], ["1e3 epochs"]]
)
def test_changes_outside_of_the_stage_or_out_of_order_are_refused(at, tree, tmp_path):
    with pytest.raises(InputError, match=r"chain\.0\.changes"):
        stages(tree, tmp_path, [{"at": one, "lr": 1e-4} for one in at])


def test_the_way_on_is_half_the_rate_that_failed(tree, tmp_path):
    two, _ = stages(tree, tmp_path, [{"at": "8 steps", "lr": 0.1}, {"at": "12 steps", "lr": 5e29}])
    assert slower(two, 14) == (
        "chain.0.changes=[{at: 8 steps, lr: 0.1}, {at: 12 steps, lr: 5e+29}, {at: 14 steps, lr: 2.5e+29}]",
    )
    assert slower(two, 12) == ("chain.0.changes=[{at: 8 steps, lr: 0.1}, {at: 12 steps, lr: 2.5e+29}]",)
    assert slower(two, 4) == ("chain.0.changes=[{at: 4 steps, lr: 0.0005}]",)
    assert slower(two, 0) == ("chain.0.lr=0.0005", "chain.0.changes=[]")


def test_a_change_after_a_trunk_goes_on_from_the_trunk_of_the_unchanged_stage(tree, tmp_path):
    tree["train"] |= {"schedule": "wsd", "cooldown": "25 %", "warmup": "2 steps", "average": "3 steps"}
    store, told = str(tmp_path / "shared"), []
    whole = {"plain": [], "late": [{"at": "20 steps", "lr": 5e-4}], "early": [{"at": "10 steps", "lr": 5e-4}]}

    def states(name: str, out: str) -> StageStates:
        tree["chain"][0]["changes"] = whole[name]
        task = make_task(validate(tree), str(tmp_path / out), store=store)
        return StageStates(task, task.stages[0], told.append)

    plain, at = states("plain", "first"), state(0)
    at.averaged_from = 18
    step(at, 18)
    plain.share(at)
    plain.finish()
    assert [type(event) for event in told] == [TrunkShared]
    late = states("late", "second")
    place = late.furthest()
    assert place[0] == late.resumed(*place).step == 18
    late.resumed(*place).states.load(18, state(1))
    late.share(at)
    late.finish()
    assert told[1].trunk == told[0].trunk, "until a change it is one trunk"
    assert late.furthest(17)[0] == 0
    assert states("early", "second").furthest()[0] == 0, "the unchanged trunk is past its change"
    at.student.model.logit_scale.data.fill_(math.nan)
    plain.share(at)
    assert plain.broken
    assert states("plain", "third").furthest()[0] == 18


def test_errors_of_divergence_survive_pickling():
    error = ray.cloudpickle.loads(ray.cloudpickle.dumps(Diverged("lost", 1, 12)))
    assert (str(error), error.stage, error.step) == ("lost", 1, 12)


def diverging(tree: dict[str, Any]) -> dict[str, Any]:
    """A stage whose weights are huge after step 10 and not numbers after step 11, neither of which is logged."""
    tree["chain"] = [{"model": "CoM-micro-S", "epochs": "24 steps", "changes": [{"at": "9 steps", "lr": 1e30}]}]
    tree["train"] |= {"clip_norm": None, "log_every": 100}
    tree["checkpoint"] = {"every": "4 steps", "keep": 1}
    tree["evaluate"] = {}
    return tree


def finite(out: Path) -> bool:
    files = list(out.glob("checkpoints/*/*/*.safetensors"))
    return bool(files) and all(bool(all_finite(load_file(file).values())) for file in files)


@pytest.mark.long
@pytest.mark.slow
def test_the_command_of_a_diverged_run_goes_on_from_its_last_good_state(ray_session, tree, tmp_path):
    file, out = tmp_path / "lost.yaml", tmp_path / "runs/tiny"
    file.write_text(yaml.safe_dump(diverging(tree)))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)

    failed = run([sys.executable, "-m", "raychain.run", str(file)])
    assert failed.returncode == 1, failed.stderr
    assert "are not finite at step" in failed.stderr
    found = re.search(r"The last good state is that of step ([48])\.", failed.stderr)  # 4: a slow disk skipped one
    assert found, failed.stderr
    last = int(found[1])
    assert "Traceback" not in failed.stderr
    assert finite(out)
    command = failed.stderr.strip().splitlines()[-1]
    assert command.endswith(f"--set 'chain.0.changes=[{{at: {last} steps, lr: 0.0005}}]'")
    continued = run(shlex.split(command))
    assert continued.returncode == 0, continued.stderr
    assert f"resumed at step {last}" in continued.stderr
    record = json.loads((out / "stages/0-CoM-micro-S/stage.json").read_text())
    assert (record["lr"], record["changes"]) == (1e-3, [{"step": last, "lr": 5e-4}])
    assert not (out / "checkpoints").exists() or not list((out / "checkpoints").iterdir())

    tree["chain"][0]["changes"] = [{"at": f"{last} steps", "lr": 5e-4}]
    whole = raychain.run(validate(tree | {"storage": str(tmp_path / "apart")}))
    assert whole["stages"][0]["key"] == record["key"]
    ours, theirs = (load_file(path / "stages/0-CoM-micro-S/open_clip_model.safetensors")
                    for path in (out, tmp_path / "apart/tiny"))  # fmt: skip
    for name in ours | theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


@pytest.fixture
def _workers_know_this_module():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def poisoned(step: int) -> Callable[[dict[str, Any]], bool]:
    """A worker in whose optimiser a second moment overflows in that step: no weight and no loss ever shows it."""

    def train(config: dict[str, Any]) -> bool:
        update = StageLoop._update

        def overflowing(self: StageLoop, student: Any, at: TrainState, *rest: Any) -> Any:
            losses = update(self, student, at, *rest)
            if at.counters.step == step - 1:
                moments(at, "exp_avg_sq").view(-1)[0] = math.inf
            return losses

        StageLoop._update = overflowing  # type: ignore[method-assign]
        return train_chain(config)

    return train


@pytest.mark.slow
@pytest.mark.usefixtures("_workers_know_this_module")
@pytest.mark.parametrize(
    ("at", "every", "last"), [(10, "4 steps", "[59]"), pytest.param(24, "100 steps", "", marks=pytest.mark.long)]
)
def test_moments_that_overflow_stop_every_rank_and_are_not_published(
    at, every, last, ray_session, tree, tmp_path, monkeypatch
):
    monkeypatch.setattr(group, "train_chain", poisoned(at))
    diverging(tree)["chain"][0]["changes"] = []
    tree["checkpoint"]["every"] = every
    tree["compute"]["workers"] = 2
    told = f"last good state is that of step {last}" if last else "No good state was saved"
    with pytest.raises(RunFailed, match=rf"CoM-micro-S: .*moments.* not finite at step \d+\. .*{told}") as failed:
        raychain.run(validate(tree))
    way = rf"chain\.0\.changes=\[{{at: {last} steps, lr: 0\.0005}}\]" if last else r"chain\.0\.lr=0\.0005"
    assert [bool(re.fullmatch(way, override)) for override in failed.value.overrides] == [True]
    assert not (tmp_path / "runs/tiny/stages").exists()
    assert not last or finite(tmp_path / "runs/tiny")
