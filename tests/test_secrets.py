"""No message, record, report or log shows what is secret in an address."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from raychain.cli.commands import commands
from raychain.cli.program import guarded
from raychain.core.json import plain
from raychain.core.storage import Folder
from raychain.errors import InputError, one_line, without_secrets
from raychain.pages.markup import plain_text
from raychain.records import ConfigRecord, RunRecord
from raychain.reporting.runlog import RunLog

SECRET = "hunter2"
SHOWN = {
    "s3://key:hunter2@bucket/a": "s3://…@bucket/a",
    "s3://key:hunter2/with+slash/x==@bucket/a": "s3://…@bucket/a",
    "s3://key:hunter2@or?so@bucket/a": "s3://…@bucket/a",
    "s3://hunter2@bucket": "s3://…@bucket",
    "postgresql://me:hunter2@host:5432/db": "postgresql://…@host:5432/db",
    "simplecache::s3://key:hunter2@bucket/a": "simplecache::s3://…@bucket/a",
    "s3://b/a?access_key=hunter2&region=eu": "s3://b/a?access_key=…&region=eu",
    "s3://b/a?region=eu&SECRET_KEY=hunter2": "s3://b/a?region=eu&SECRET_KEY=…",
    "https://h/a?X-Amz-Credential=hunter2%2F1&X-Amz-Security-Token=hunter2&x=1":
        "https://h/a?X-Amz-Credential=…&X-Amz-Security-Token=…&x=1",
    "https://h/a.jpg?sv=1&sig=hunter2": "https://h/a.jpg?sv=1&sig=…",
}  # fmt: skip
LEFT = [
    "https://medium.com/@me/a.jpg", "http://host:8080/@me", "http://host:8080?x=a@b", "s3://bucket/a@2x.tar", "a@b.c",
    "key: value", "text_cfg.tokenizer_kwargs.additional_special_tokens: no text", "x?region=eu&endpoint_override=h:1",
]  # fmt: skip


@pytest.mark.parametrize("address", SHOWN)
def test_secrets_of_addresses_are_left_out(address: str) -> None:
    shown = SHOWN[address]
    for before, after in (("", ""), ("cannot open '", "': no"), ('{"a": "', '"}'), ("https://x/@y ", ", s3://b")):
        assert without_secrets(f"{before}{address}{after}") == f"{before}{shown}{after}"
    assert without_secrets(shown) == shown


@pytest.mark.parametrize("text", LEFT)
def test_other_text_is_left_alone(text: str) -> None:
    assert without_secrets(text) == text


@given(st.lists(st.sampled_from(["://", "@", ":", "/", "?", "&", "key=", "a", " ", "'", "1", SECRET]), max_size=30))
def test_what_was_cleaned_is_clean(parts: list[str]) -> None:
    once = without_secrets("".join(parts))
    assert without_secrets(once) == once


LONG = ["://a:" * 20_000, "://" + "a" * 10**6, "&key" * 50_000, "&" + "key" * 10**5, "@" * 10**6, "&key=" + "," * 10**5]


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_cleaning_takes_time_in_proportion(text: str) -> None:
    started = time.process_time()
    without_secrets(text)
    assert time.process_time() - started < 3


ADDRESS = f"s3://key:{SECRET}@bucket/x?secret_key={SECRET}"


def test_messages_records_logs_and_reports_hold_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    class Text(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    said, theirs = list[str](), Text()
    logging.getLogger().addHandler(theirs)
    try:
        logging.getLogger("raychain.x").warning("%s: lost", ADDRESS)
    finally:
        logging.getLogger().removeHandler(theirs)
    said += [one_line(ADDRESS), plain_text(ADDRESS), str(InputError(ADDRESS, ADDRESS, ADDRESS, ADDRESS))]
    long = f"s3://key:{'x' * 200}{SECRET}{'x' * 60}@bucket"
    said += [str(InputError("x", "y" * (990 - n) + " " + long, "", "")) for n in range(0, 300, 20)]
    folder = Folder(str(tmp_path))
    folder.write_json("a.json", {"storage": [ADDRESS]})
    RunLog(folder, RunRecord(name="x", config=ConfigRecord.of({"storage": ADDRESS}), environment={}), [])
    said += [path.read_text() for path in tmp_path.glob("*.json")]
    assert len(said) > 20
    assert [text for text in said if SECRET in text] == []
    assert plain({"a": [ADDRESS]}) == {"a": ["s3://…@bucket/x?secret_key=…"]}


COMMANDS = [
    ["data", "check", ADDRESS],
    ["data", "build", ADDRESS, "--out", "x"],
    ["data", "index", ADDRESS],
    ["data", "index", "x", "--out", ADDRESS],
    ["data", "build", "table.csv", "--out", ADDRESS],
    ["grow", ADDRESS, "--to", "CoM-micro-M", "--out", "x"],
    ["evaluate", ADDRESS.replace("bucket", "bucket:1"), "--data", "x"],
    ["report", f"s3://key:{SECRET}@/x"],
    ["run", "demo", "--set", f"data.trian=s3://key:{SECRET}@bucket", "--dry-run"],
    ["run", "demo", "--out", f"nothing://key:{SECRET}@bucket/x", "--dry-run"],
    ["run", "demo", "--address", f"http://me:{SECRET}@host", "--dry-run"],
    ["run", "demo", "--set", f"chain=[{{x: s3://key:{SECRET}@b}}]", "--dry-run"],
    ["run", "demo", "--set", f"track.mlflow=nothing://me:{SECRET}@host", "--dry-run"],
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=range(len(COMMANDS)))
def test_commands_show_none(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["raychain", *arguments])
    (tmp_path / "table.csv").write_text("url,caption\nx,y\n")
    with pytest.raises(SystemExit) as stop:
        guarded(commands)
    said = capfd.readouterr()
    assert stop.value.code == (0 if "nothing://me" in arguments[-2] else 2), said.err
    assert SECRET not in said.out + said.err


def test_a_build_keeps_none(tmp_path: Path) -> None:
    """The picture's address stands in the sample's own JSON, and that of a picture that fails in failed.jsonl."""
    Image.new("RGB", (9, 9)).save(tmp_path / f"a?sig={SECRET}", "png")
    rows = [f"a?sig={SECRET}", ADDRESS]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"url": row, "caption": "c"}) + "\n" for row in rows))
    said = CliRunner().invoke(commands, ["data", "build", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "out")])
    assert "1 pictures of 2 rows" in said.output, said.output
    failed = (tmp_path / "out" / "failed.jsonl").read_text()
    assert "s3://…@bucket" in json.loads(failed)["image"]
    assert [p.name for p in (tmp_path / "out").iterdir() if SECRET.encode() in p.read_bytes()] == []
