"""A folder behaves the same on this machine and on object storage."""

import uuid
from pathlib import Path

import pytest

from raychain.core.storage import Folder
from raychain.errors import InputError


@pytest.fixture(params=["path", "file://", "memory://"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    memory = f"memory://bucket/{uuid.uuid4().hex}"
    return Folder({"path": f"{tmp_path}/a b", "file://": f"file://{tmp_path}/a", "memory://": memory}[request.param])


def test_files_are_written_read_and_listed(folder: Folder) -> None:
    assert folder.read("sub/x") is None
    assert folder.list() == []
    folder.write("sub/x", b"1")
    folder.write("sub/x", b"2")
    folder.write_json("y.json", {"a": 1})
    folder.write("torn.json", b'{"a"')
    assert folder.read("sub/x") == b"2"
    assert folder.read_json("y.json") == {"a": 1}
    assert folder.read_json("torn.json") is None
    assert folder.list() == ["sub", "torn.json", "y.json"]


def test_published_folders_are_fetched_moved_and_deleted(folder: Folder, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "weights").write_bytes(b"w" * 1000)
    (source / "a-marker").write_text("complete")
    folder.publish(source, "stages/0", "a-marker")
    assert folder.list("stages/0") == ["a-marker", "deep"]
    assert (folder.fetch("stages/0", tmp_path / "copy") / "deep" / "weights").read_bytes() == b"w" * 1000
    folder.move("stages/0", "stages/1")
    assert folder.list("stages") == ["1"]
    assert folder.read("stages/1/deep/weights") == b"w" * 1000
    folder.delete("stages/1")
    folder.delete("stages/1")
    assert folder.read("stages/1/a-marker") is None


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(InputError, match="nosuch://"):
        Folder("nosuch://bucket/x")
