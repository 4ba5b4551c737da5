"""What of the data cannot be used: added up over shards, ranks, stages and calls, in run.json and the final table."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from rich.console import Console

import raychain
from raychain.config.loading import validate
from raychain.data.health import Bad, tally
from raychain.data.shards import Shard
from raychain.errors import RunFailed
from raychain.events import BadSamples, Saved
from raychain.records import RunRecord
from raychain.reporting.health import LISTED, DataHealth
from raychain.reporting.table import result_table


def found(shard: Shard, *bad: Bad) -> BadSamples:
    return BadSamples(shard.address, shard.identity, tally(bad))


A = Shard("/x/a.tar", 1, "a", 90, tally([Bad("truncated shard", "9.jpg")]))
B = Shard("/x/b.tar", 1, "b", 109)
UNREADABLE = Bad("unreadable picture", "b7", "why")


def test_each_shard_counts_once_however_many_tell():
    health = DataHealth([A, B], 0.01)
    for _ in range(3):
        health.dispatch(found(B, UNREADABLE))
        health.dispatch(Saved(stage=0, step=1))
    health.dispatch(found(Shard("/y/c.tar", 1, "c", 5), UNREADABLE))
    record = health.record().content()
    assert (record["shards"], record["samples"]) == (2, 200)
    assert record["bad"] == {"truncated shard": 1, "unreadable picture": 1}
    assert [(e["shard"], e["key"]) for e in record["examples"]] == [("/x/a.tar", "9.jpg"), ("/x/b.tar", "b7")]
    assert not health.exceeded, "2 of 200 are 1 %"
    health.dispatch(found(Shard("/y/a.tar", 1, "a", 90), UNREADABLE))
    assert health.exceeded
    assert "3 of 200 samples (1.50%)" in health.describe()
    assert "/x/b.tar: b7 (unreadable picture: why)" in health.describe()


def test_an_earlier_calls_findings_are_kept_for_shards_that_are_the_same():
    first = DataHealth([A, B], 0.01)
    first.dispatch(found(B, UNREADABLE))
    earlier = RunRecord.of(json.loads(RunRecord(data_health=first.record()).document()))
    assert DataHealth([A, B], 0.01, earlier).record() == first.record()
    assert DataHealth([A], 0.01, earlier).bad == {"truncated shard": 1}
    for other in (None, RunRecord(), RunRecord(data_health=None)):
        assert DataHealth([B], 0.01, other).bad == {}


def test_long_lists_are_cut():
    shards = [Shard(f"/x/{i}.tar", 1, str(i), 9, tally([UNREADABLE])) for i in range(LISTED + 5)]
    assert DataHealth(shards, 0).describe().endswith("; and 5 more shards")


def test_the_final_table_has_a_line_if_anything_was_bad():
    health = DataHealth([A, B], 0.01)
    for bad, line in ((health.record().content(), "data: 1 of 200 samples not used: 1 truncated shard"), (None, "")):
        console = Console(file=io.StringIO(), width=100)
        result_table({"data_health": bad}, console)
        assert line in console.file.getvalue()
        assert ("data:" in console.file.getvalue()) == bool(line)


def spoil(source: Path, target: Path) -> None:
    """The demo's two shards: three pictures of the first unreadable, the second cut in the middle."""
    first, second = sorted(source.glob("*.tar"))
    with tarfile.open(first) as old, tarfile.open(target / first.name, "w") as new:
        for i, member in enumerate(old):
            content = old.extractfile(member).read()
            if member.name.endswith(".jpg") and i < 9:
                content = b"?" * len(content)
            new.addfile(member, io.BytesIO(content))
    (target / second.name).write_bytes(second.read_bytes()[: second.stat().st_size // 2])


@pytest.mark.long
def test_a_run_on_damaged_shards_reports_them_and_stops_above_the_limit(ray_session, tree, demo, tmp_path, capsys):
    spoil(demo / "train", tmp_path)
    tree["data"] |= {"train": str(tmp_path / "*.tar"), "max_bad_fraction": 0.001}
    tree |= {"chain": [{"model": "CoM-micro-S", "epochs": "8 steps"}], "evaluate": {}}
    expected = {"truncated shard": 1, "unreadable picture": 3}
    with pytest.raises(RunFailed, match=r"max_bad_fraction is 0\.001.*00000\.tar: 000000000 \(unreadable picture"):
        raychain.run(validate(tree))
    failed = json.loads((tmp_path / "runs/tiny/run.json").read_text())
    assert (failed["status"], failed["data_health"]["bad"]) == ("failed", expected)
    with pytest.raises(RunFailed, match="cannot be used"):
        raychain.run(validate(tree))
    del tree["data"]["max_bad_fraction"]
    tree["compute"]["workers"] = 2
    for out in ("runs", "cached"):  # the second is another run, served from the cache
        capsys.readouterr()
        run = raychain.run(validate(tree | {"storage": str(tmp_path / out)}))
        assert run["status"] == "succeeded"
        assert run["data_health"]["bad"] == expected
        assert {item["key"] for item in run["data_health"]["examples"]} >= {"000000000", "000000001", "000000002"}
        warned = [line for line in capsys.readouterr().err.splitlines() if "00000.tar: skipped" in line]
        assert len(warned) == 1, "named once by two ranks"
