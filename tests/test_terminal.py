"""What data, files and errors say reaches the terminal as text; no terminal and no stream can fail a command."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import pty
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_broken_shards import pair, shard_of

from raychain.data.health import Bad, Tally
from raychain.errors import InputError, one_line, printable
from raychain.events import BadSamples, Restarted, StageEnded, Warned
from raychain.records import StageEntry
from raychain.reporting.progress import Progress
from raychain.terminal.console import make_console

HOSTILE = "\x1b]0;title\x07\x1b[31mred\x9b2J\u202egpj\nraychain: all is well [bold]x[/] [/nothing] :smile:"


def obeyed(text: str) -> set[str]:
    """The characters in `text` that a terminal would obey."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - set("\n\t\u200c\u200d")


def check(folder: Path) -> list[str]:
    """A command that prints a table of one shard with a bad sample, with status 0."""
    shard_of(folder / "0.tar", pair("x", b"no picture", txt=b"1"))
    return [sys.executable, "-m", "raychain.data", "check", str(folder), "--workers", "1", "--max-bad-fraction", "1"]


@given(st.text(st.characters()))
def test_printable_text_holds_nothing_that_a_terminal_obeys_and_ordinary_text_is_left_alone(text: str) -> None:
    shown = printable(text)
    assert not obeyed(shown)
    assert printable(shown) == shown
    assert "\n" not in one_line(text)
    assert shown == text or obeyed(text)


def test_ordinary_writing_of_all_kinds_is_left_alone() -> None:
    for text in ("Zürich", "東京　タワー", "می‌خواهم", "👩‍👧 ❤️", "a\tb\nc", "R\N{NO-BREAK SPACE}2"):
        assert printable(text) == text


@given(st.text(st.characters()), st.text(st.characters()))
def test_an_input_error_has_as_many_lines_as_it_has_fields_whatever_they_hold(given_: str, fix: str) -> None:
    error = InputError("x", given_, "y", fix, InputError("z", given_, "y", fix))
    assert len(str(error).split("\n")) == 8
    assert not obeyed(str(error))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_console_draws_markup_and_escapes_as_text() -> None:
    console = make_console()
    console.file = io.StringIO()
    from rich.table import Table

    table = Table("heading")
    table.add_row("[red]a[/] [/] :smile: \x1b[2J")
    console.print(table)
    console.print("[/] \x1b[2J")
    said = console.file.getvalue()
    assert "[red]a[/] [/] :smile: \\x1b[2J" in said
    assert "\x1b" not in said


def test_a_narrow_terminal_gets_a_table_too(tmp_path: Path) -> None:
    done = subprocess.run(check(tmp_path), capture_output=True, env=os.environ | {"COLUMNS": "0"}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"picture" in done.stdout


def test_progress_says_hostile_messages_in_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(["CoM-micro-S"])
    progress.dispatch(Warned(HOSTILE))
    progress.dispatch(Restarted("failure", 1, HOSTILE))
    progress.dispatch(BadSamples(HOSTILE, "1", Tally({HOSTILE: 1}, (Bad("kind", HOSTILE, HOSTILE),))))
    progress.dispatch(StageEnded(0, StageEntry(key="k", model=HOSTILE, status=HOSTILE)))
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 4
    assert not obeyed(said)


def test_log_lines_are_escaped_where_nothing_else_handles_them() -> None:
    script = "import logging, raychain; logging.getLogger('raychain.x').warning('a %s', '\\x1b[2J')"
    quiet = "import logging; logging.basicConfig(format='mine %(message)s');" + script
    for code, expected in ((script, "a \\x1b[2J\n"), (quiet, "mine a \x1b[2J\n")):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.stderr == expected
    assert logging.getLogger("raychain").propagate


def hostile_shard(folder: Path) -> Path:
    """A shard whose own name and members are made to be obeyed."""
    name = "\x1b[31m[red]0.tar"
    shard_of(folder / name, pair(HOSTILE.replace("\n", "\r"), b"", txt=b"1"), pair("\x1b[2Jy", b"no", txt=b"1"))
    return folder / name


def on_a_terminal(*command: str) -> str:
    """What a command writes to a terminal that is its stdout and stderr."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 2**16):
            said += part
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(ours)
    process.wait(60)
    return said.decode()


@pytest.mark.parametrize("terminal", [False, True])
def test_names_in_shards_are_not_obeyed(tmp_path: Path, terminal: bool) -> None:
    command = [sys.executable, "-m", "raychain.data", "check", str(hostile_shard(tmp_path)), "--workers", "1"]
    if terminal:
        said = on_a_terminal(*command)
        assert "\x1b[1m" in said, "headings are styled"
    else:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        said = done.stdout + done.stderr
    assert "\\x1b[2J" in said
    for part in ("\x1b[2J", "\x1b]0;", "\x1b[31m", "\x07", "\x9b", "\u202e"):
        assert part not in said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "ascii:strict"])
def test_output_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    done = subprocess.run(
        check(tmp_path), capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert b"no picture" in done.stdout
    assert b"Traceback" not in done.stderr
    assert b"\\u2" not in done.stdout, "what raychain itself writes has a look-alike"


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("{} | head -c 1", 0),
        ("{} >&-", 0),
        ("{} >/dev/full", 1),
        ("{} --json >/dev/full", 1),
        ("{} 2>&1 >&- | head -c 1", 0),
    ],
)
def test_a_stdout_that_takes_nothing_is_no_traceback(tmp_path: Path, command: str, status: int) -> None:
    line = "set -o pipefail; " + command.format(" ".join(f"'{part}'" for part in check(tmp_path)))
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert ("stdout cannot be written: No space left on device" in done.stderr) == bool(status)


@pytest.mark.parametrize(
    "command",
    [
        "{} >/dev/full",
        *(pytest.param(c, marks=pytest.mark.long) for c in ("{} --json >/dev/full", "{} >&- 2>&-", "{} 2>/dev/full")),
    ],
)
def test_a_run_that_has_trained_well_succeeds_wherever_it_prints(finished, tmp_path: Path, command: str) -> None:
    _, out, tree = finished
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree))
    before = json.loads((out / "run.json").read_text())
    line = command.format(f"'{sys.executable}' -m raychain.run '{file}'")
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(json.loads((out / "run.json").read_text())["stages"]) == len(before["stages"])


def test_a_descriptor_that_does_not_block_loses_nothing() -> None:
    script = "import os, sys; os.set_blocking(1, False)\n"
    script += "from raychain.terminal import guard_streams; guard_streams(); print('x' * 10**6)"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert len(process.communicate(timeout=60)[0]) == 10**6 + 1
    assert process.returncode == 0


def test_a_console_of_ones_own_may_be_given() -> None:
    from raychain.reporting.checked import check_table

    console = Console(file=io.StringIO(), width=100)
    spread = {"min": 1, "median": 1, "max": 1}
    counts = {
        "shards": 1,
        "samples": 2,
        "usable": 1,
        "bad": {"kind": 1},
        "bad_fraction": 0.5,
        "max_bad_fraction": 0.1,
        "noted": {},
    }
    sizes = {"missing_captions": 0, "width": spread, "height": spread, "captions": spread}
    bad = [{"kind": "kind", "shard": "s", "key": HOSTILE, "detail": ""}]
    check_table(counts | sizes | {"bad_samples": bad}, console)
    said = console.file.getvalue()
    assert "\nraychain" not in said
    assert "[bold]" in said
