"""Folders on disk that are complete or refused: atomic writes, a manifest with checksums, one writer at a time.

Every artifact (index, training data, model, tokenizer) is a folder with a `manifest.json` that is written last. It holds the
format version, the kind, the resolved configuration, fingerprints, counts, and size and SHA-256 of every other file.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from retro.errors import ConfigError, FormatError, RetroError, StorageError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
UNFINISHED = "build.json"
"""The resolved configuration of an artifact that is being made; gone once the manifest is there."""
CHANGE = "change.json"
"""The resolved arguments of a change of a finished artifact that is under way; gone with the next state's manifest."""
TEMPORARY = ".tmp"
"""Suffix of files that are being written; whatever bears it after a crash is rubbish."""
HASHED_ON_OPEN = 256 << 20
"""Bytes that are hashed whenever an artifact is opened, smallest files first; the others' sizes are compared, and their contents by
`retro index verify` only."""


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file beside its place, flushes it to the disk and renames it: it is there whole or not at all.

    Args:
        path: The file; its folder is made where it is missing.
        write: Called with the open binary file.

    Raises:
        StorageError: No space, no permission; nothing is left behind.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise storage_error(path, error) from error
        raise


def storage_error(path: Path, error: OSError) -> RetroError:
    """What a failed write means for the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = ""
        with contextlib.suppress(OSError):
            free = f" ({shutil.disk_usage(path.parent).free / 2**20:,.0f} MiB free)"
        return StorageError(
            f"the disk is full{free}: cannot write {path}. What is finished is kept: "
            "make room and run the same command again"
        )
    return StorageError(f"cannot write {path}: {error.strerror or error}")


def write_json(path: Path, value: Any) -> None:
    """A JSON file, readable by people, in one atomic step."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> Any:
    """Raises FormatError where the file is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from error


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Hex digest (16 characters) of plain data, the same on every machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def remove_temporaries(folder: Path) -> None:
    """Deletes what a killed writer left unfinished."""
    for path in folder.rglob(f"*{TEMPORARY}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_manifest(folder: Path, kind: str, fields: dict[str, Any]) -> None:
    """Completes an artifact: hashes every file below `folder` and writes the manifest, last."""
    files = {path.relative_to(folder).as_posix(): file_record(path) for path in _content(folder)}
    write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, "kind": kind, **fields, "files": files})


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """Opens an artifact: its manifest, after checking that all files are there and unaltered.

    Sizes of all files are compared, and the SHA-256 of the smallest ones, up to `HASHED_ON_OPEN` bytes together.

    Raises:
        FormatError: There is no such folder, it is unfinished, of another kind or version, truncated or altered.
    """
    manifest = open_manifest(folder, kind)
    problems = list(find_damage(folder, manifest, hash_bytes=HASHED_ON_OPEN))
    if problems:
        raise FormatError(f"{folder} is damaged: {'; '.join(problems[:3])}. Make it again (--overwrite)")
    return manifest


def open_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of an artifact, whose files are not looked at.

    Raises:
        FormatError: There is no such folder, it is unfinished, of another kind or version.
    """
    if not folder.is_dir():
        raise FormatError(f"{folder} is not there: {_article(kind)} of this name has not been made")
    if not (folder / MANIFEST).is_file():
        raise FormatError(
            f"{folder} has no {MANIFEST}: it is not {_article(kind)}, or making it was interrupted; "
            f"run the command that makes it again, it goes on where it stopped"
        )
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or "files" not in manifest:
        raise FormatError(f"{folder / MANIFEST} is damaged: make {folder} again")
    if manifest.get("kind") != kind:
        raise FormatError(f"{folder} is {_article(str(manifest.get('kind')))}, not {_article(kind)}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{folder} has format version {manifest.get('format_version')}, this program reads {FORMAT_VERSION}: "
            "make it again with this version"
        )
    return manifest


def find_damage(folder: Path, manifest: dict[str, Any], *, hash_bytes: int | None = None) -> Iterator[str]:
    """Describes each file that differs from the manifest.

    Args:
        folder: The artifact.
        manifest: Its manifest.
        hash_bytes: How many bytes to hash at most, smallest files first; None hashes all.
    """
    hashed = 0
    for name, record in sorted(manifest["files"].items(), key=lambda item: (item[1]["bytes"], item[0])):
        path = folder / name
        hashed += record["bytes"]
        try:  # it may vanish at any time: whoever changes an index removes what its new state does not need
            size = path.stat().st_size if path.is_file() else None
            is_hashed = size == record["bytes"] and (hash_bytes is None or hashed <= hash_bytes)
            digest = sha256(path) if is_hashed else record["sha256"]
        except FileNotFoundError:
            size = None
        if size is None:
            yield f"{name} is missing"
        elif size != record["bytes"]:
            yield f"{name} has {size:,} bytes instead of {record['bytes']:,} (truncated or altered)"
        elif digest != record["sha256"]:
            yield f"{name} was altered (its SHA-256 differs from the manifest)"


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Holds the folder for one writer; the lock falls with the process, however it ends.

    Raises:
        ConfigError: Another process is writing there.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise storage_error(folder, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"another process is writing {folder}: wait for it, or choose another --out") from error
        yield


def begin(folder: Path, kind: str, recipe: dict[str, Any], *, overwrite: bool) -> bool:
    """Starts or continues making an artifact from `recipe` (plain data: configuration, inputs).

    Returns:
        True where it is finished already, by this very recipe.

    Raises:
        ConfigError: It was made, or begun, by another recipe; the message shows the differences.
    """
    recipe = json.loads(json.dumps(recipe))
    if _is_foreign(folder):
        raise ConfigError(f"{folder} exists and was not made by this program: choose another --out")
    if (other := _kind(folder)) not in (None, kind):
        raise ConfigError(f"{folder} is {_article(str(other))}, not {_article(kind)}: choose another --out")
    if overwrite:
        _clear(folder)
    finished = (folder / MANIFEST).is_file()
    previous = None
    if finished:
        previous = read_json(folder / MANIFEST).get("recipe")
    elif (folder / UNFINISHED).is_file():
        previous = read_json(folder / UNFINISHED)["recipe"]
    if previous is not None and previous != recipe:
        differences = "; ".join(differing(previous, recipe))
        raise ConfigError(
            f"{folder} was {'made' if finished else 'begun'} differently ({differences}). "
            "Use the same settings to go on, --overwrite to start again, or another --out"
        )
    if finished:
        (folder / UNFINISHED).unlink(missing_ok=True)  # killed between the last two steps of `finish`
        read_manifest(folder, kind)
        return True
    remove_temporaries(folder)
    _mark_unfinished(folder, kind, recipe)
    return False


def replace_manifest(folder: Path, manifest: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Puts a finished artifact into its next state in one atomic step, then deletes the files that no longer belong to it.

    Whoever has the old state open goes on with it: nothing that it consists of is altered, and open files outlive their names.

    Args:
        folder: The artifact; all files of the new state are there.
        manifest: Of the new state; `files` holds those of the old one, whose checksums are taken over.
        names: All files of the new state, relative to the folder.

    Returns:
        The manifest as written.
    """
    known = manifest["files"]
    files = {name: known.get(name) or file_record(folder / name) for name in sorted(names)}
    manifest = manifest | {"files": files}
    write_json(folder / MANIFEST, manifest)
    (folder / CHANGE).unlink(missing_ok=True)
    remove_unlisted(folder, files)
    return manifest


def remove_unlisted(folder: Path, files: Collection[str]) -> None:
    """Deletes every file of an artifact that its manifest does not list: remains of old states and of killed changes."""
    for path in list(_content(folder)):
        if path.relative_to(folder).as_posix() not in files:
            path.unlink(missing_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            with contextlib.suppress(OSError):
                path.rmdir()
    remove_temporaries(folder)


def file_record(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def link_file(source: Path, target: Path) -> None:
    """The same file under another name: a hard link where the file system allows, else a copy; nothing where it is there already.

    Raises:
        StorageError: No space, no permission.
    """
    temporary = target.with_name(target.name + TEMPORARY)
    try:
        if target.is_file():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        temporary.replace(target)
    except OSError as error:
        raise storage_error(target, error) from error


def reopen(folder: Path, kind: str, recipe: dict[str, Any]) -> None:
    """Makes a finished artifact an unfinished one again, in an order that a kill cannot break."""
    _mark_unfinished(folder, kind, recipe)
    (folder / MANIFEST).unlink()


def _mark_unfinished(folder: Path, kind: str, recipe: dict[str, Any]) -> None:
    write_json(folder / UNFINISHED, {"format_version": FORMAT_VERSION, "kind": kind, "recipe": recipe})


def _kind(folder: Path) -> str | None:
    """What an artifact is or will be; None where there is none yet."""
    for name in (MANIFEST, UNFINISHED):
        if (folder / name).is_file():
            with contextlib.suppress(FormatError):
                return str(read_json(folder / name)["kind"])
    return None


def _is_foreign(folder: Path) -> bool:
    """Whether a folder holds something that this program did not put there; a file's name alone is no proof."""
    ours = {".lock", UNFINISHED + TEMPORARY}
    if not folder.is_dir() or all(path.name in ours for path in folder.iterdir()):
        return False
    for name, keys in (
        (MANIFEST, {"format_version", "kind", "files"}),
        (UNFINISHED, {"format_version", "kind", "recipe"}),
    ):
        with contextlib.suppress(FormatError):
            content = read_json(folder / name)
            if isinstance(content, dict) and keys <= set(content):
                return False
    return True


def _clear(folder: Path) -> None:
    """Empties the folder of an artifact, finished or not."""
    if not folder.is_dir():
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in sorted(folder.iterdir()):
        if path.name not in (".lock", UNFINISHED):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / UNFINISHED).unlink(missing_ok=True)


def finish(folder: Path, kind: str, recipe: dict[str, Any], fields: dict[str, Any]) -> None:
    """Writes the manifest and takes the mark of an unfinished artifact away."""
    write_manifest(folder, kind, {"recipe": recipe, **fields})
    (folder / UNFINISHED).unlink(missing_ok=True)


def differing(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Each difference of two pieces of plain data, as `key: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            yield from differing(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield f"{path}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _content(folder: Path) -> Iterable[Path]:
    """Every file that belongs to the artifact, in a fixed order."""
    skipped = {MANIFEST, UNFINISHED, CHANGE, ".lock"}
    return (
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in skipped and not path.name.endswith(TEMPORARY)
    )


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _article(kind: str) -> str:
    return {
        "index part": "a part of an index",
        "index": "an index",
        "model": "a model",
        "tokenizer": "a tokenizer",
    }.get(kind, kind)
