"""Artifacts: files are there whole or not at all, damage is found, and nothing foreign is ever deleted."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from retro import artifact
from retro.artifact import begin, differing, find_damage, finish, read_manifest, write_atomically, write_json, writing
from retro.errors import ConfigError, FormatError, StorageError

RECIPE = {"config": {"chunk_len": 64, "seed": 0}, "corpora": ["a.jsonl"]}


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A small artifact with two files."""
    folder = tmp_path / "wiki.index"
    assert not begin(folder, "index", RECIPE, overwrite=False)
    write_atomically(folder / "vectors" / "00000.npy", lambda file: file.write(b"0123456789"))
    write_atomically(folder / "tokenizer.json", lambda file: file.write(b"{}"))
    finish(folder, "index", RECIPE, {"chunks": 3})
    return folder


@pytest.fixture(params=["made", "begun"])
def existing(request: pytest.FixtureRequest, finished: Path, tmp_path: Path) -> Path:
    """An artifact of RECIPE in both states; the name of its folder is the state."""
    folder = tmp_path / str(request.param)
    if request.param == "made":
        return finished.rename(folder)
    begin(folder, "index", RECIPE, overwrite=False)
    write_atomically(folder / "vectors" / "00000.npy", lambda file: file.write(b"0123456789"))
    return folder


# Atomic writing


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"new, but only ha")
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(StorageError, match="Input/output error"):
        write_atomically(path, write)
    assert files_of(tmp_path) == {"file": b"old"}


def test_an_error_of_another_kind_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise ValueError("a mistake of the writer")

    with pytest.raises(ValueError, match="a mistake of the writer"):
        write_atomically(path, write)
    assert files_of(tmp_path) == {"file": b"old"}


def test_a_file_is_flushed_to_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    at_sync: list[bytes] = []
    sync = os.fsync

    def watch(descriptor: int) -> None:
        at_sync.append(path.read_bytes())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    write_atomically(path, lambda file: file.write(b"new"))
    # The file while the old one is still there, then the folder, which holds its new name.
    assert at_sync == [b"old", b"new"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_an_error_that_says_what_is_kept_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    (tmp_path / "finished").write_bytes(b"kept")

    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError) as caught:
        write_atomically(tmp_path / "file", lambda file: file.write(b"x" * 10_000))
    message = str(caught.value)
    assert message.startswith("the disk is full (")
    assert "MiB free): cannot write" in message
    assert message.endswith("What is finished is kept: make room and run the same command again")
    assert str(tmp_path / "file") in message
    assert files_of(tmp_path) == {"finished": b"kept"}


def test_a_disk_that_fills_while_writing_is_the_same_error(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError, match="the disk is full"):
        write_atomically(tmp_path / "file", write)
    assert files_of(tmp_path) == {}


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "in_the_way").write_bytes(b"")
    with pytest.raises(StorageError, match=r"cannot write .*in_the_way/file"):
        write_atomically(tmp_path / "in_the_way" / "file", lambda file: file.write(b""))


def test_json_keeps_its_value_and_its_letters(tmp_path: Path) -> None:
    value = {"b": [1, None, 0.1], "a": "日本 é 🙂"}
    write_json(tmp_path / "x.json", value)
    assert artifact.read_json(tmp_path / "x.json") == value
    assert "日本 é 🙂" in (tmp_path / "x.json").read_text(encoding="utf-8")


def test_json_that_is_missing_or_none_is_a_format_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"x\.json is missing"):
        artifact.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b'{"a": ')
    with pytest.raises(FormatError, match=r"x\.json cannot be read"):
        artifact.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b'"\xff"')
    with pytest.raises(FormatError, match=r"x\.json cannot be read"):
        artifact.read_json(tmp_path / "x.json")


def test_a_fingerprint_depends_on_the_data_and_not_on_the_order_of_its_keys() -> None:
    # SHA-256 of {"a":1,"b":"é"} in UTF-8, by sha256sum.
    assert artifact.fingerprint({"b": "é", "a": 1}) == "09ad9fd2fb648cb2"
    assert artifact.fingerprint({"b": "é", "a": 2}) != artifact.fingerprint({"b": "é", "a": 1})


# The manifest


def test_a_manifest_lists_size_and_checksum_of_every_file(finished: Path) -> None:
    manifest = read_manifest(finished, "index")
    # By sha256sum.
    assert manifest == {
        "format_version": 1,
        "kind": "index",
        "recipe": RECIPE,
        "chunks": 3,
        "files": {
            "tokenizer.json": {
                "bytes": 2,
                "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
            },
            "vectors/00000.npy": {
                "bytes": 10,
                "sha256": "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882",
            },
        },
    }


def test_the_manifest_is_written_last_and_ends_the_unfinished_state(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    begin(folder, "index", RECIPE, overwrite=False)
    (folder / "data").write_bytes(b"1")
    assert set(files_of(folder)) == {"build.json", "data"}
    with pytest.raises(FormatError, match="interrupted"):
        read_manifest(folder, "index")
    finish(folder, "index", RECIPE, {})
    assert set(files_of(folder)) == {"manifest.json", "data"}
    assert (folder / "manifest.json").stat().st_mtime_ns >= (folder / "data").stat().st_mtime_ns


def test_a_manifest_that_cannot_be_written_leaves_an_unfinished_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "x"
    begin(folder, "index", RECIPE, overwrite=False)
    (folder / "data").write_bytes(b"1")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError):
            finish(folder, "index", RECIPE, {})
    assert set(files_of(folder)) == {"build.json", "data"}
    assert not begin(folder, "index", RECIPE, overwrite=False)
    finish(folder, "index", RECIPE, {})
    read_manifest(folder, "index")


def test_a_truncated_file_is_refused(finished: Path) -> None:
    (finished / "vectors" / "00000.npy").write_bytes(b"0123")
    with pytest.raises(FormatError) as caught:
        read_manifest(finished, "index")
    assert str(caught.value) == (
        f"{finished} is damaged: vectors/00000.npy has 4 bytes instead of 10 (truncated or altered). "
        "Make it again (--overwrite)"
    )


def test_an_altered_byte_is_refused_though_the_size_is_the_same(finished: Path) -> None:
    (finished / "vectors" / "00000.npy").write_bytes(b"0123456780")
    with pytest.raises(FormatError, match=r"vectors/00000\.npy was altered \(its SHA-256 differs from the manifest\)"):
        read_manifest(finished, "index")


def test_a_missing_file_is_refused(finished: Path) -> None:
    (finished / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"damaged: tokenizer\.json is missing\. Make it again"):
        read_manifest(finished, "index")


def test_another_kind_of_artifact_is_refused(finished: Path) -> None:
    with pytest.raises(FormatError) as caught:
        read_manifest(finished, "model")
    assert str(caught.value) == f"{finished} is an index, not a model"


def test_another_format_version_is_refused(finished: Path) -> None:
    manifest = json.loads((finished / "manifest.json").read_bytes())
    (finished / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(FormatError, match="has format version 99, this program reads 1: make it again"):
        read_manifest(finished, "index")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"wiki\.index is not there: an index of this name has not been made"):
        read_manifest(tmp_path / "wiki.index", "index")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"17", b"\xff\xfe"])
def test_a_damaged_manifest_is_refused(finished: Path, content: bytes) -> None:
    (finished / "manifest.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"manifest\.json (is damaged|cannot be read)"):
        read_manifest(finished, "index")


def test_the_smallest_files_are_hashed_first_and_the_largest_on_demand_only(finished: Path) -> None:
    (finished / "vectors" / "00000.npy").write_bytes(b"0123456780")
    manifest = json.loads((finished / "manifest.json").read_bytes())
    sizes = {name: record["bytes"] for name, record in manifest["files"].items()}
    assert max(sizes, key=lambda name: sizes[name]) == "vectors/00000.npy"
    assert list(find_damage(finished, manifest, hash_bytes=sum(sizes.values()) - 1)) == []
    altered = ["vectors/00000.npy was altered (its SHA-256 differs from the manifest)"]
    assert list(find_damage(finished, manifest, hash_bytes=sum(sizes.values()))) == altered
    assert list(find_damage(finished, manifest)) == altered


def test_a_file_that_vanishes_while_it_is_checked_is_missing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, path = json.loads((finished / "manifest.json").read_bytes()), finished / "tokenizer.json"
    content, read, is_file = path.read_bytes(), artifact.sha256, Path.is_file

    def gone_before_reading(asked: Path) -> str:
        path.unlink(missing_ok=True)
        return read(asked)

    def gone_after_a_look(asked: Path) -> bool:
        found = is_file(asked)
        path.unlink(missing_ok=True)
        return found

    for owner, name, instead in ((artifact, "sha256", gone_before_reading), (Path, "is_file", gone_after_a_look)):
        path.write_bytes(content)
        only = manifest | {"files": {"tokenizer.json": manifest["files"]["tokenizer.json"]}}
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, instead)
            assert list(find_damage(finished, only)) == ["tokenizer.json is missing"]


def test_every_damaged_file_is_found(finished: Path) -> None:
    manifest = json.loads((finished / "manifest.json").read_bytes())
    assert list(find_damage(finished, manifest)) == []
    (finished / "tokenizer.json").unlink()
    (finished / "vectors" / "00000.npy").write_bytes(b"")
    assert list(find_damage(finished, manifest)) == [
        "tokenizer.json is missing",
        "vectors/00000.npy has 0 bytes instead of 10 (truncated or altered)",
    ]


# Beginning


def test_an_unfinished_artifact_of_the_same_recipe_is_continued(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    assert not begin(folder, "index", RECIPE, overwrite=False)
    (folder / "shards").mkdir()
    (folder / "shards" / "00000.npy").write_bytes(b"finished")
    (folder / "shards" / "00001.npy.tmp").write_bytes(b"half")
    assert not begin(folder, "index", RECIPE, overwrite=False)
    assert set(files_of(folder)) == {"build.json", "shards/00000.npy"}


def test_a_finished_artifact_of_the_same_recipe_is_left_alone(finished: Path) -> None:
    before = files_of(finished)
    assert begin(finished, "index", RECIPE, overwrite=False)
    assert files_of(finished) == before


def test_a_finished_artifact_that_was_damaged_is_not_taken_for_finished(finished: Path) -> None:
    (finished / "tokenizer.json").write_bytes(b"[]")
    with pytest.raises(FormatError, match="altered"):
        begin(finished, "index", RECIPE, overwrite=False)


def test_a_recipe_is_the_same_as_its_json(finished: Path) -> None:
    assert begin(finished, "index", {**RECIPE, "corpora": ("a.jsonl",)}, overwrite=False)


def test_a_kill_between_the_manifest_and_the_end_leaves_no_trace(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    begin(folder, "index", RECIPE, overwrite=False)
    unfinished = (folder / "build.json").read_bytes()
    finish(folder, "index", RECIPE, {})
    (folder / "build.json").write_bytes(unfinished)
    assert begin(folder, "index", RECIPE, overwrite=False)
    assert set(files_of(folder)) == {"manifest.json"}


def test_another_recipe_is_refused_with_the_differences(existing: Path) -> None:
    before = files_of(existing)
    other = {"config": {"chunk_len": 32, "seed": 0}, "corpora": ["b.jsonl"], "new": True}
    with pytest.raises(ConfigError) as caught:
        begin(existing, "index", other, overwrite=False)
    assert str(caught.value) == (
        f'{existing} was {existing.name} differently (config.chunk_len: 64 -> 32; corpora: ["a.jsonl"] -> ["b.jsonl"]; '
        "new: null -> true). Use the same settings to go on, --overwrite to start again, or another --out"
    )
    assert files_of(existing) == before


def test_equal_data_has_no_differences_and_long_values_are_cut() -> None:
    assert list(differing(RECIPE, json.loads(json.dumps(RECIPE)))) == []
    [line] = differing({"a": "x" * 100}, {"a": 1})
    assert line == f'a: "{"x" * 56}... -> 1'


def test_overwriting_starts_from_nothing(existing: Path) -> None:
    other = {"config": {"chunk_len": 32}}
    assert not begin(existing, "index", other, overwrite=True)
    assert set(files_of(existing)) == {"build.json"}
    assert not begin(existing, "index", other, overwrite=False)
    with pytest.raises(ConfigError, match=r"begun differently \(config\.chunk_len: 32 -> 64"):
        begin(existing, "index", RECIPE, overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_is_used(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "x").mkdir()
    assert not begin(tmp_path / "x", "index", RECIPE, overwrite=overwrite)


FOREIGN: dict[str, dict[str, bytes]] = {
    "a thesis": {"thesis.tex": b"ten years", "figures/1.png": b"png"},
    # A browser extension, say: the name of the file alone does not make it one of ours.
    "a manifest of another program": {"manifest.json": b'{"name": "My extension", "version": "1.0"}', "app.js": b"1"},
    "a manifest that is a list": {"manifest.json": b"[1]", "app.js": b"1"},
    "a manifest that is no JSON": {"manifest.json": b"Name: x", "app.js": b"1"},
    "only a manifest of another program": {"manifest.json": b'{"name": "My extension"}'},
    "a build.json of another program": {"build.json": b'{"target": "es2022"}', "app.js": b"1"},
    "only files whose names end in .tmp": {"notes.tmp": b"mine"},
    "only a lock in a folder below": {"repository/.lock": b"mine"},
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_folder_is_refused_and_nothing_in_it_is_touched(
    tmp_path: Path, content: dict[str, bytes], overwrite: bool
) -> None:
    folder = tmp_path / "mine"
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    with pytest.raises(ConfigError, match=r"mine exists and was not made by this program: choose another --out"):
        begin(folder, "index", RECIPE, overwrite=overwrite)
    assert files_of(folder) == content


# One writer

_HOLD = """
import sys
from pathlib import Path
from retro.artifact import writing
with writing(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_writers_at_once_are_refused_and_the_lock_falls_with_the_process(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    command = [sys.executable, "-c", _HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=r"another process is writing .*x: wait for it, or choose another --out"),
            writing(folder),
        ):
            pass
        other.kill()
        other.wait()
    with writing(folder):
        pass


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(StorageError, match=r"cannot write .*file: File exists"), writing(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_lock_does_not_outlive_an_error(tmp_path: Path) -> None:
    def fail() -> Any:
        with writing(tmp_path / "x"):
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    with writing(tmp_path / "x"):
        pass


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_artifact_of_another_kind_is_refused_and_kept(existing: Path, overwrite: bool) -> None:
    before = files_of(existing)
    with pytest.raises(ConfigError, match="is an index, not a model: choose another --out"):
        begin(existing, "model", RECIPE, overwrite=overwrite)
    assert files_of(existing) == before
