"""Files to a lent GPU machine and back: in pieces that a command may carry, put together outside the working tree.

    echo "/.gpu*/" >> "$(git rev-parse --git-path info/exclude)"
    python benchmarks/gpu_transfer.py pack .gpu simple.jsonl.xz=PATH core.jsonl.xz=PATH small.tok=FOLDER ...   (here)

        pieces .gpu/0, .gpu/1, ... of at most 56 MiB, and a plan: one command for each piece, which names it in `carry`

    python benchmarks/gpu_transfer.py receive .gpu /tmp/retro         (there, at the beginning of each such command)

        takes whatever pieces were carried; when the last one is there, everything is unpacked into /tmp/retro

    python benchmarks/gpu_transfer.py send /tmp/retro/small.model --out $OUT [--weights int8] [--group 1]     (there)

        at most four pieces of 15 MiB; where that is not all, `--group 1` sends the next four

    python benchmarks/gpu_transfer.py receive FILES_AT FOLDER         (here, after each; FILES_AT is where the files came to lie)

Folders are packed with all that is in them; whatever is not compressed already is compressed by xz.
"""

import argparse
import hashlib
import io
import json
import lzma
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from retro.artifact import read_json, write_json
from retro.errors import ConfigError, FormatError

MIB = 1 << 20
CARRIED = 56
"""MiB of a piece that goes there: 64 are allowed, the repository among them."""
SENT, GROUP = 15, 4
"""MiB of a piece that comes back, where a file may have 16, and pieces of a command."""
PLAN = "plan.json"
PACKED = ".packed.xz"
"""Suffix, inside the pieces, of what was compressed for the way."""
_COMPRESSED = (".xz", ".gz", ".zst", ".safetensors")
"""Smaller already, or hardly to be made so: weights are nearly random."""


class _Pieces(io.RawIOBase):
    """A stream that is written to, as files of a limited size."""

    def __init__(self, out: Path, piece_bytes: int) -> None:
        super().__init__()
        self._out, self._limit = out, piece_bytes
        self.sizes: list[int] = []
        self.digests: list[str] = []
        self._file: Any = None
        self._digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        length = len(rest)
        while len(rest):
            if self._file is None:
                self._file = (self._out / f"piece-{len(self.sizes):03d}").open("wb")
                self.sizes.append(0)
                self._digest = hashlib.sha256()
            few = rest[: self._limit - self.sizes[-1]]
            self._file.write(few)
            self._digest.update(few)
            self.sizes[-1] += len(few)
            rest = rest[len(few) :]
            if self.sizes[-1] == self._limit:
                self._finish()
        return length

    def close(self) -> None:
        if self._file is not None:
            self._finish()
        super().close()

    def _finish(self) -> None:
        self._file.close()
        self._file = None
        self.digests.append(self._digest.hexdigest())


def write_pieces(things: dict[str, Path], out: Path, piece_bytes: int) -> dict[str, Any]:
    """Files and folders, by the names they will have, as pieces in a folder; returns the plan, which lies beside them.

    Raises:
        ConfigError: One is not there.
    """
    for path in things.values():
        if not path.exists():
            raise ConfigError(f"{path} is not there: make it first")
    out.mkdir(parents=True, exist_ok=True)
    stream = _Pieces(out, piece_bytes)
    files: dict[str, int] = {}
    with stream, tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for name, path in things.items():
            for inner, file in _files(name, path):
                files[inner] = file.stat().st_size
                _add(tar, inner, file)
    digest = hashlib.sha256("".join(stream.digests).encode()).hexdigest()[:16]
    plan = {"id": digest, "commit": _commit(), "sizes": stream.sizes, "sha256": stream.digests, "files": files}
    write_json(out / PLAN, plan)
    return plan


def _files(name: str, path: Path) -> Iterator[tuple[str, Path]]:
    if path.is_file():
        yield name, path
        return
    if (path / "training").is_dir():
        raise ConfigError(
            f"{path} holds checkpoints, which are large: `retro export` it first, or send it with --weights"
        )
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.name != ".lock":
            yield f"{name}/{file.relative_to(path).as_posix()}", file


def _add(tar: tarfile.TarFile, name: str, file: Path) -> None:
    if file.suffix in _COMPRESSED or file.stat().st_size < 1 << 16:
        tar.add(file, name)
        return
    with tempfile.TemporaryFile() as small:
        with lzma.open(small, "wb", preset=4) as packer, file.open("rb") as source:
            shutil.copyfileobj(source, packer, MIB)
        info = tarfile.TarInfo(name + PACKED)
        info.size = small.tell()
        small.seek(0)
        tar.addfile(info, small)


def _commit() -> str:
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        )
    except OSError:
        return ""
    return asked.stdout.strip()


def pack(out: Path, things: dict[str, Path], piece_mib: int = CARRIED) -> dict[str, Any]:
    """Pieces in folders of their own, each with the plan, to be carried one by one.

    Args:
        out: Folder that git ignores.
        things: Files and folders by the names they will have.
        piece_mib: Largest piece.
    """
    if out.exists():
        if not (out / PLAN).is_file():
            raise ConfigError(f"{out} is there and was not made by this script: name another folder")
        shutil.rmtree(out)
    plan = write_pieces(things, out, piece_mib * MIB)
    for number in range(len(plan["sizes"])):
        folder = out / str(number)
        folder.mkdir()
        (out / f"piece-{number:03d}").rename(folder / f"piece-{number:03d}")
        shutil.copyfile(out / PLAN, folder / PLAN)
    return plan


def send(folder: Path, out: Path, group: int, weights: str | None, work: Path) -> dict[str, Any]:
    """The next pieces of a folder, or of an export of a model with smaller weights; returns what is there and what is left."""
    name = folder.name
    if weights is not None:
        from retro.export import export_model
        from retro.quantized import FORMS

        form = next((form for form in FORMS if form == weights), None)
        if form is None:
            raise ConfigError(f"--weights {weights}: must be one of {', '.join(FORMS)}")
        exported = work / "exported" / f"{folder.stem}-{form}.model"
        export_model(folder, exported, weights=form, max_shard_bytes=SENT * MIB)
        metrics = folder / "metrics.jsonl"
        folder, name = exported, exported.name
        if metrics.is_file():
            shutil.copyfile(metrics, folder.with_suffix(".metrics.jsonl"))
    pieces = work / "pieces" / name
    things = {name: folder}
    if (beside := folder.with_suffix(".metrics.jsonl")).is_file():
        things[beside.name] = beside
    if group == 0 or not (pieces / PLAN).is_file():
        shutil.rmtree(pieces, ignore_errors=True)
        write_pieces(things, pieces, SENT * MIB)
    plan: dict[str, Any] = read_json(pieces / PLAN)
    few = range(group * GROUP, min((group + 1) * GROUP, len(plan["sizes"])))
    out.mkdir(parents=True, exist_ok=True)
    for number in few:
        shutil.copyfile(pieces / f"piece-{number:03d}", out / f"piece-{number:03d}")
    shutil.copyfile(pieces / PLAN, out / PLAN)
    groups = math.ceil(len(plan["sizes"]) / GROUP)
    return {"sent": name, "group": group, "groups": groups, "bytes": sum(plan["sizes"][n] for n in few)}


def receive(carried: Path, store: Path) -> dict[str, Any]:
    """Takes the pieces below a folder; unpacks when all of them have come. Pieces of several packings may mingle.

    Raises:
        FormatError: A piece is damaged.
    """
    done: dict[str, Any] = {"complete": [], "missing": {}}
    for path in sorted(carried.rglob(PLAN)):
        plan = read_json(path)
        waiting = store / ".pieces" / plan["id"]
        waiting.mkdir(parents=True, exist_ok=True)
        for piece in path.parent.glob("piece-*"):
            number = int(piece.name.removeprefix("piece-"))
            with piece.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != plan["sha256"][number]:
                    raise FormatError(f"{piece} was damaged on its way: carry it again")
            shutil.copyfile(piece, waiting / piece.name)
        if (waiting / "unpacked").is_file():
            continue
        missing = [n for n in range(len(plan["sizes"])) if not (waiting / f"piece-{n:03d}").is_file()]
        if missing:
            done["missing"][plan["id"]] = missing
            continue
        _unpack([waiting / f"piece-{n:03d}" for n in range(len(plan["sizes"]))], store)
        for piece in waiting.glob("piece-*"):
            piece.unlink()
        (waiting / "unpacked").touch()
        done["complete"] += sorted({name.split("/")[0] for name in plan["files"]})
    done["missing"] = {key: missing for key, missing in done["missing"].items() if missing}
    return done


class _Joined(io.RawIOBase):
    """Files read as one stream."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__()
        self._paths = list(paths)
        self._file: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._file is None:
                if not self._paths:
                    return 0
                self._file = self._paths.pop(0).open("rb")
            count = int(self._file.readinto(buffer))
            if count:
                return count
            self.close_file()

    def close_file(self) -> None:
        """Closes the one that is being read."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        self.close_file()
        super().close()


def _unpack(pieces: Sequence[Path], store: Path) -> None:
    with io.BufferedReader(_Joined(pieces), MIB) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            source = tar.extractfile(member)
            name = member.name.removesuffix(PACKED)
            target = (store / name).resolve()
            if source is None or not target.is_relative_to(store.resolve()):
                raise FormatError(f"{member.name} is nothing that this script packs")
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                if member.name.endswith(PACKED):
                    with lzma.open(source) as unpacked:
                        shutil.copyfileobj(unpacked, file, MIB)
                else:
                    shutil.copyfileobj(source, file, MIB)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("pack", help="here: pieces that commands carry")
    one.add_argument("out", type=Path)
    one.add_argument("things", nargs="+", metavar="NAME=PATH")
    one.add_argument("--piece-mib", type=int, default=CARRIED)
    one = parts.add_parser("receive", help="there and here: take pieces, unpack")
    one.add_argument("carried", type=Path)
    one.add_argument("store", type=Path)
    one = parts.add_parser("send", help="there: pieces that come back")
    one.add_argument("folder", type=Path)
    one.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
    one.add_argument("--group", type=int, default=0)
    one.add_argument("--weights", help="of a model: float32, bfloat16 or int8")
    one.add_argument("--work", type=Path, default=Path("/tmp/retro"))
    asked = parser.parse_args(arguments)
    if asked.part == "pack":
        things = {name: Path(path) for name, _, path in (thing.partition("=") for thing in asked.things)}
        plan = pack(asked.out, things, asked.piece_mib)
        total = sum(plan["sizes"])
        print(f"{total / MIB:.1f} MiB in {len(plan['sizes'])} pieces; one command for each, together with its work:")
        for number, size in enumerate(plan["sizes"]):
            print(f'  carry ["{asked.out}/{number}"]   {size / MIB:.1f} MiB')
    elif asked.part == "receive":
        print(json.dumps(receive(asked.carried, asked.store)))
    else:
        print(json.dumps(send(asked.folder, asked.out, asked.group, asked.weights, asked.work)))


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, FormatError) as error:
        sys.exit(f"error: {error}")
