"""Faults that hit a whole cluster; `python tests/faults.py --faults 30` is the long version."""

from __future__ import annotations

import json
import random

import pytest
from faults import Site, compare, disturbed, drain_node, experiment, kill_driver, kill_node, places, undisturbed

pytestmark = [pytest.mark.long, pytest.mark.ray]


@pytest.mark.parametrize("lanes", [1, 4])
def test_a_chain_survives_a_lost_node_a_drained_one_and_a_killed_driver_unchanged(demo, tmp_path, lanes):
    steps, rng = (300, 150, 40), random.Random(0)
    tree = experiment(demo, tmp_path / "runs", tmp_path / "cache", steps, lanes)
    faults = [kill_node, drain_node, kill_driver]
    with Site(tree, tmp_path) as site:
        hits = disturbed(site, rng, faults, places(rng, steps, len(faults)))
        assert [hit["fault"] for hit in hits] == [fault.__name__ for fault in faults]
        assert [hit["at"][0] for hit in hits] == [0, 1, 2]
        run = json.loads((site.out / "run.json").read_text())
        assert {restart["reason"] for restart in run["restarts"]} >= {"failure", "drain"}
        loss, weights = compare(site.out, undisturbed(tree, tmp_path))
    assert loss < 1e-4
    assert weights < 1e-4
