"""Whatever stands in a path or lies beside shards: it is used, or refused by one message."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_broken_shards import shard_of
from typer.testing import CliRunner

from raychain.cli.data import data
from raychain.config.loading import validate
from raychain.core.storage import ARROWS, Folder, resolve
from raychain.data import addresses
from raychain.data.addresses import expand, is_pattern
from raychain.errors import InputError
from raychain.evaluators.finding import find_tasks
from raychain.runs.resolve import dry_plan

FOLDERS = ["[a-z]", "photos [2024] (1)", "set {a,b}", "open {", "sp ace", "50%", "a%20b", "#1", "wh?t", "star*", "ü日",
           "back\\slash", "~nobody", "a'b\"c", "--help", "two\nlines"]  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_exists_is_no_pattern(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name / "in[1]").mkdir(parents=True)
    for file in ("0.tar", "1.tar", "in[1]/2.tar", "._0.tar", ".hidden.tar", ".DS_Store"):
        (tmp_path / name / file).touch()
    (tmp_path / name / "folder.tar").mkdir()
    monkeypatch.chdir(tmp_path)
    zero, one, two = (str(tmp_path / name / file) for file in ("0.tar", "1.tar", "in[1]/2.tar"))
    for folder in (f"./{name}", str(tmp_path / name)):
        for pattern in (folder, f"{folder}/", f"{folder}/*.tar", f"{folder}/{{0,1}}.tar", f"{folder}/[01].tar"):
            assert expand([pattern], "x") == [zero, one], pattern
        assert expand([f"{folder}/1.tar"], "x") == [one]
        assert expand([f"{folder}/in[1]"], "x") == expand([f"{folder}/in[1]/{{2..2}}.tar"], "x") == [two]
    assert not is_pattern(f"./{name}")
    assert expand(expand([name if name[0] != "~" else f"./{name}"], "x"), "x") == [zero, one], "what it gives, it takes"


@given(st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=20))
def test_any_name_of_a_shard_is_found(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.mktemp("names")
    (folder / f"x{name}.tar").touch()
    path = str(folder / f"x{name}.tar")
    assert expand([path], "x") == expand([str(folder)], "x") == expand([f"{folder}/*.tar"], "x") == [path]


def test_an_address_with_escapes_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a%20b [1]").mkdir()
    path = shard_of(tmp_path / "a%20b [1]" / "0.tar")
    address = path.as_uri()
    [found] = expand([path.parent.as_uri() + "/*.tar"], "x")
    assert found == expand([address], "x")[0] == address
    assert Folder(found.rpartition("/")[0]).path == str(path.parent)


def test_remote_addresses_keep_their_escapes() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("a b/0.tar", "a b/._0.tar", "a b/.x/0.tar", "a b/y/1.tar"):
        memory.pipe(f"/addresses/{name}", b"")
    assert expand(["memory://addresses/a b/*.tar"], "x") == ["memory://addresses/a b/0.tar"]
    assert expand(["memory://addresses/a b"], "x") == ["memory://addresses/a b/0.tar"]
    assert expand(["memory://addresses/*/*/*.tar"], "x") == ["memory://addresses/a b/y/1.tar"]
    assert expand(["memory://addresses/a b/.?/0.tar"], "x") == ["memory://addresses/a b/.x/0.tar"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a destructor of fsspec's
@pytest.mark.parametrize("rest", ["://", "://a", "://a/b", "://a:b@c:1/d?e=f"])
def test_a_scheme_that_fsspec_knows_is_opened_or_refused(rest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers that are not installed, or want more than an address says, raise errors of all kinds."""
    from fsspec.registry import available_protocols

    def refuse(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    refused = []
    for scheme in sorted(set(available_protocols()) - set(ARROWS)):
        try:
            resolve(f"{scheme}{rest}")
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all("\n  fix " in said for said in refused)


@pytest.mark.parametrize("path", ["x\0", "\0", "~/x\0y", "x\ud800"])
def test_what_no_file_can_be_called_is_one_message(path: str, tree: dict[str, Any]) -> None:
    tree["preload"] = {"cache": path}
    with pytest.raises(InputError, match=r"^preload\.cache\n"):
        dry_plan(validate(tree))
    with pytest.raises(InputError, match=r"^address\n"):
        resolve(path)


def odd(folder: Path, name: str) -> str:
    """Something in `folder` that is no shard; the address that names it."""
    path = folder / "0.tar"
    if name == "fifo":
        os.mkfifo(path)
    elif name == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    elif name == "broken link":
        path.symlink_to("nothing")
    elif name == "link loop":
        path.symlink_to("0.tar")
    elif name == "link to a device":
        path.symlink_to("/dev/zero")
    elif name == "name that is not UTF-8":
        os.close(os.open(os.fsencode(folder) + b"/\xfc.tar", os.O_CREAT))
        return f"{folder}/\udcfc.tar"
    return str(path)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    "name", ["fifo", "socket", "broken link", "link loop", "link to a device", "name that is not UTF-8"]
)
def test_what_is_no_file_is_refused(tmp_path: Path, name: str, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    address = odd(Path(), name)
    for pattern in (str(tmp_path), f"{tmp_path}/*.tar") if inside else (address,):
        with pytest.raises(InputError, match=r"^data\.train\n") as refused:
            expand([pattern], "data.train")
        assert str(refused.value).count("\n") == 3


REFUSED = [
    "", "~no-such-user/0.tar", "a\0b", "x" * 5000, "/dev/zero", "folder", "loop", "loop/*.tar", "no[1]", "[", "**",
    "{0..99999999}.tar", "{a,b}" * 40, "{" * 5000 + "}" * 5000, "{x{0..999999}{0..999999},y}.tar", "{a,b",
    "{0..%s}" % ("9" * 5000), "\\{{0..99999999}.tar", "file:///no/such.tar", "file://{tmp}/{0..3}",
]  # fmt: skip


@pytest.mark.parametrize("pattern", REFUSED, ids=range(len(REFUSED)))
def test_what_names_nothing_is_refused_at_once(tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match=r"^data\.train\n") as refused:
        expand([pattern], "data.train")
    assert len(str(refused.value)) < 1500


def test_as_many_shards_as_there_may_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(addresses, "MOST", 6)
    for n in range(6):
        (tmp_path / f"{n}.tar").touch()
    assert len(expand([f"{tmp_path}/{{0..2}}.tar", f"{tmp_path}/{{{{0,1}},{{2..5}}}}.tar"], "x")) == 9
    with pytest.raises(InputError):
        expand([f"{tmp_path}/{{0..6}}.tar"], "x")


def test_files_beside_shards_whatever_they_are_called(tmp_path: Path) -> None:
    """In every command that looks into a folder."""
    for folder in (tmp_path, tmp_path / "test"):
        folder.mkdir(exist_ok=True)
        shard_of(folder / "0.tar")
        for name in (b"\xfc.txt", b"._0.tar", b"\xff"):
            os.close(os.open(os.fsencode(folder) + b"/" + name, os.O_CREAT))
        (folder / "self").symlink_to(".")
        os.mkfifo(folder / "pipe")
    assert CliRunner().invoke(data, ["check", str(tmp_path), "--workers", "1"]).exit_code == 0
    (tmp_path / "cache" / "counts").mkdir(parents=True)
    [task] = find_tasks(str(tmp_path), ["txt"], tmp_path / "cache", "--data")
    assert [Path(shard.address).name for shard in task.shards] == ["0.tar"]
    assert expand([f"{tmp_path}/*/*.tar"], "x") == [f"{tmp_path}/self/0.tar", f"{tmp_path}/test/0.tar"]


def test_pipes_in_place_of_a_folders_notes_do_not_hang(tmp_path: Path) -> None:
    shard_of(tmp_path / "0.tar")
    os.mkfifo(tmp_path / "classnames.txt")
    with pytest.raises(InputError, match=r"^--data\n"):
        find_tasks(str(tmp_path), ["txt"], tmp_path / "cache", "--data")


def test_a_folder_to_evaluate_on_may_have_brackets(tmp_path: Path) -> None:
    for name in ("zero [shot]", "{shards}"):
        (tmp_path / name / "test").mkdir(parents=True)
        shard_of(tmp_path / name / "test" / "0.tar")
    (tmp_path / "cache" / "counts").mkdir(parents=True)
    for name in ("zero [shot]", "{shards}", "zero [shot]/test", "{shards}/test/*.tar"):
        [task] = find_tasks(str(tmp_path / name), ["txt"], tmp_path / "cache", "--data")
        assert len(task.shards) == 1
