"""Shards and run folders on object storage: an S3 server on this machine, and storage that fails now and then."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import webdataset
import yaml
from PIL import Image
from pyarrow import fs

from raychain.cli.run import run_command
from raychain.core.storage import Folder, below, resolve
from raychain.data import addresses, content, fetch
from raychain.data.addresses import expand
from raychain.data.cache import ShardCache
from raychain.data.members import Wanted
from raychain.data.pictures import PictureReader
from raychain.data.shards import Shard, survey
from raychain.data.spec import Spec
from raychain.errors import InputError

SAMPLES, WANTED = 20, Wanted(("txt",))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Shard]:
    """Three local shards of 20 grey pictures each."""
    root = tmp_path_factory.mktemp("shards")
    paths = [f"{root}/{shard:02}.tar" for shard in range(3)]
    for shard, path in enumerate(paths):
        with webdataset.TarWriter(path) as tar:
            for grey in greys(shard):
                picture = io.BytesIO()
                Image.new("RGB", (40, 40), (grey, grey, grey)).save(picture, "png")
                tar.write({"__key__": f"{grey:03}", "png": picture.getvalue(), "txt": str(grey)})
    return survey(paths, WANTED, root, "data.train")


def greys(shard: int) -> list[int]:
    return list(range(shard * SAMPLES, (shard + 1) * SAMPLES))


def decoded(shard: Shard, cache: Path) -> list[int]:
    """The greys of a shard's pictures, which pass through a cache."""
    reader = PictureReader(Spec(WANTED, 32, "ones"), lambda texts: np.ones((len(texts), 1)))
    table = ShardCache(cache, 2**20).table(shard, reader)
    return [int(table.image(row)[3, 3, 0]) for row in range(table.size)]


class Flaky(fs.FileSystemHandler):
    """Object storage that fails each of the next `failures` requests."""

    def __init__(self) -> None:
        self.local, self.failures, self.asked = fs.LocalFileSystem(), 0, 0

    def _fail(self) -> None:
        self.asked += 1
        if self.failures:
            self.failures -= 1
            raise OSError("slow down")

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        self._fail()
        return self.local.get_file_info(paths)

    def open_input_file(self, path: str) -> Any:
        self._fail()
        return pa.PythonFile(_FlakyFile(path, self), mode="r")

    def _unused(self, *_: Any) -> Any:
        raise NotImplementedError

    def get_type_name(self) -> str:
        return "flaky"

    def normalize_path(self, path: str) -> str:
        return path

    get_file_info_selector = create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = _unused
    delete_file = move = copy_file = open_input_stream = open_output_stream = open_append_stream = _unused


class _FlakyFile(io.FileIO):
    def __init__(self, path: str, flaky: Flaky) -> None:
        super().__init__(path)
        self.flaky = flaky

    def read(self, size: int = -1) -> bytes:
        self.flaky._fail()
        return super().read(size)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Flaky:
    """Behind flaky://, without pauses between tries."""
    handler = Flaky()
    monkeypatch.setattr(fetch, "PAUSE_S", 0)
    for module in (fetch, addresses, content):
        monkeypatch.setattr(
            module, "resolve", lambda address: (fs.PyFileSystem(handler), address.removeprefix("flaky://"))
        )
    return handler


def test_object_storage_that_fails_for_a_moment_is_asked_again(
    tmp_path: Path, found: list[Shard], flaky: Flaky
) -> None:
    address = f"flaky://{found[2].address}"
    flaky.failures = fetch.TRIES - 1
    assert expand([address], "data.train") == [address]
    flaky.failures = fetch.TRIES - 1
    [shard] = survey([address], WANTED, tmp_path, "data.train")
    assert shard.samples == SAMPLES
    for failures in range(fetch.TRIES):
        flaky.failures = failures
        assert decoded(shard, tmp_path / str(failures)) == greys(2)
        assert flaky.failures == 0


def test_object_storage_that_stays_away_is_an_error_that_names_the_address(
    tmp_path: Path, found: list[Shard], flaky: Flaky
) -> None:
    address = f"flaky://{found[2].address}"
    shard = replace(found[2], address=address)
    flaky.failures = 1000
    with pytest.raises(OSError, match=rf"^flaky://.*02\.tar: gave up after {fetch.TRIES} tries: slow down"):
        decoded(shard, tmp_path)
    assert flaky.asked == fetch.TRIES
    with pytest.raises(InputError, match="gave up"):
        survey([address], WANTED, tmp_path, "data.train")


def test_what_asking_again_does_not_mend_is_final(tmp_path: Path, flaky: Flaky) -> None:
    with pytest.raises(FileNotFoundError):
        fetch.open_input(f"flaky://{tmp_path}/none.tar")
    assert flaky.asked == 1
    asked = []

    def away() -> None:
        asked.append(1)
        raise OSError("disk error")

    with pytest.raises(OSError, match="disk error"):
        fetch.patiently("/a/local/path", away)
    assert len(asked) == 1


def test_shards_of_an_s3_bucket_are_found_counted_and_decoded(
    tmp_path: Path, found: list[Shard], bucket: Callable[[str], str]
) -> None:
    for shard in found[:3]:
        filesystem, path = resolve(bucket(f"data/{Path(shard.address).name}"))
        with filesystem.open_output_stream(path) as stream:
            stream.write(Path(shard.address).read_bytes())
    names = [bucket(f"data/{i:02}.tar") for i in range(3)]
    assert expand([bucket("data/{00..02}.tar")], "data.train") == names
    assert expand([bucket("data/*.tar")], "data.train") == names
    assert expand([bucket("data/{00,02}.tar"), bucket("data/*1.tar")], "data.train") == [names[0], names[2], names[1]]
    with pytest.raises(InputError, match="no such file"):
        expand([bucket("data/{02..03}.tar")], "data.train")
    shards = survey(names, WANTED, tmp_path, "data.train")
    assert [shard.samples for shard in shards] == [shard.samples for shard in found[:3]]
    assert [decoded(shard, tmp_path) for shard in shards] == [greys(i) for i in range(3)]


def test_folders_are_published_to_an_s3_bucket(tmp_path: Path, bucket: Callable[[str], str]) -> None:
    (tmp_path / "stage" / "deep").mkdir(parents=True)
    (tmp_path / "stage" / "deep" / "weights").write_bytes(bytes(3_000_000))
    (tmp_path / "stage" / "a-marker").write_text("complete")
    folder = Folder(bucket("runs/one"))
    folder.publish(tmp_path / "stage", "stages/0", "a-marker")
    folder.write_json("run.json", {"a": 1})
    assert folder.read_json("run.json") == {"a": 1}
    assert folder.list("stages/0") == ["a-marker", "deep"]
    assert (folder.fetch("stages/0", tmp_path / "copy") / "deep" / "weights").stat().st_size == 3_000_000
    folder.move("stages/0", "stages/1")
    assert folder.list("stages") == ["1"]
    folder.delete("stages/1")
    assert folder.read("stages/1/a-marker") is None


def test_a_run_folder_in_a_storage_with_options_keeps_them(
    tree: dict[str, Any], bucket: Callable[[str], str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert below(bucket("runs/"), "tiny") == bucket("runs/tiny")
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree | {"storage": bucket("dry")}))
    run_command(str(file), dry_run=True)
    assert capsys.readouterr().out.count("CoM-micro-") == 2
    assert Folder(bucket("dry")).list() == ["tiny"]
