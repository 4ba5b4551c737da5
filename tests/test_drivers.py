"""Several drivers at once on one storage: each stage is trained once, and all succeed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

pytestmark = [pytest.mark.long, pytest.mark.ray]


def test_drivers_started_at_once_train_each_stage_once(tree, tmp_path):
    tree["evaluate"] = {}
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree))
    longer = tmp_path / "longer.yaml"  # shares the first stage, in a run folder of its own
    longer.write_text(
        yaml.safe_dump(tree | {"name": "longer", "chain": [tree["chain"][0], tree["chain"][1] | {"epochs": "8 steps"}]})
    )
    command = [sys.executable, "-m", "raychain.run"]
    drivers = [
        subprocess.Popen([*command, str(path), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for path in (file, file, longer)
    ]
    answers = [driver.communicate(timeout=400) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0, 0], answers
    runs = [json.loads(out) for out, _ in answers]
    assert all(run["status"] == "succeeded" for run in runs)
    statuses = [[stage["status"] for stage in run["stages"]] for run in runs]
    first = [status[0] for status in statuses]
    assert sorted(first) == ["reused", "reused", "trained"], "the first stage is the same for all"
    assert sorted(status[1] for status in statuses[:2]) == ["reused", "trained"]
    assert statuses[2][1] == "trained"
    assert sum("by another driver" in err for _, err in answers) == 2
    stored = {json.loads(path.read_text())["key"] for path in (tmp_path / "runs" / "store").glob("*/stage.json")}
    assert stored == {stage["key"] for run in runs for stage in run["stages"]}
