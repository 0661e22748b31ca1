"""Builds on several machines: parts that are merged, and Ray tasks, one node of which is killed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from index_builder.build import build_index, merge_index, verify_index
from index_builder.config import BuildConfig
from index_builder.corpus import ReadOptions
from index_builder.export import export_parquet
from index_builder.live import remove_documents
from index_builder.search import Snapshot
from retro.chunks import load_array
from retro.errors import ConfigError, FormatError, MismatchError

FolderBytes = Callable[[Path], dict[str, bytes]]


@pytest.fixture(scope="module")
def settings(tiny_encoder: Path) -> dict[str, Any]:
    return {
        "encoder": str(tiny_encoder),
        "chunk_len": 16,
        "shard_chars": 1_500,
        "index_type": "IVF4,SQ8",
        "recall": 1.0,
    }


@pytest.fixture(scope="module")
def mixed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus with some bad records and some texts that come twice."""
    lines = corpus.read_text(encoding="utf-8").splitlines()
    again = [json.dumps(json.loads(line) | {"id": f"again-{n}"}) for n, line in enumerate(lines[:4])]
    path = tmp_path_factory.mktemp("mixed") / "squad.jsonl"
    path.write_text("\n".join([*lines[:7], "not JSON", *lines[7:], *again, "{}"]) + "\n", encoding="utf-8")
    return path


READ = ReadOptions(on_error="skip", deduplicate="exact")


@pytest.fixture(scope="module")
def whole(mixed: Path, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "x.index"
    manifest = build_index([str(mixed)], folder, BuildConfig(**settings, read=READ))
    assert (manifest["documents"], manifest["rejects"], manifest["duplicates"]) == (40, 2, 4)
    assert len(manifest["shards"]) > 10
    return folder


@pytest.fixture(scope="module")
def parts(mixed: Path, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three parts, not to be altered."""
    folder = tmp_path_factory.mktemp("parts")
    config = BuildConfig(**settings, read=READ)
    for i in range(3):
        build_index([str(mixed)], folder / f"{i}.index", config, part=(i, 3))
    return [folder / f"{i}.index" for i in range(3)]


# Parts


def test_merged_parts_are_the_index_that_one_build_makes(
    parts: list[Path], whole: Path, tmp_path: Path, folder_bytes: FolderBytes
) -> None:
    merge_index([parts[2], parts[0], parts[1]], tmp_path / "x.index")
    assert folder_bytes(tmp_path / "x.index") == folder_bytes(whole)
    assert verify_index(tmp_path / "x.index") == []
    for part in parts:  # each made its share
        assert 0 < len(list((part / "vectors").iterdir())) < len(list((whole / "vectors").iterdir()))


def test_a_part_is_no_index(parts: list[Path]) -> None:
    with pytest.raises(FormatError, match=r"0\.index is a part of an index, not an index"):
        Snapshot.open(parts[0])


def test_parts_that_are_missing_or_given_twice_are_refused(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"the parts given are 0/3, 2/3; all of 0/3 to 2/3 are needed"):
        merge_index([parts[0], parts[2]], tmp_path / "x.index")
    with pytest.raises(MismatchError, match=r"the parts given are 0/3, 1/3, 1/3, 2/3"):
        merge_index([*parts, parts[1]], tmp_path / "x.index")
    with pytest.raises(ConfigError, match="no parts given"):
        merge_index([], tmp_path / "x.index")
    assert not (tmp_path / "x.index").exists()


def test_parts_of_different_builds_are_refused(
    parts: list[Path], mixed: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    other = BuildConfig(**settings | {"chunk_len": 17}, read=READ)
    build_index([str(mixed)], tmp_path / "1.index", other, part=(1, 3))
    with pytest.raises(MismatchError, match="are parts of different builds"):
        merge_index([parts[0], tmp_path / "1.index", parts[2]], tmp_path / "x.index")


@pytest.mark.parametrize("below", ["vectors", "chunks", "documents"])
@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_a_damaged_part_is_refused(parts: list[Path], tmp_path: Path, below: str, damage: str) -> None:
    copied = Path(shutil.copytree(parts[1], tmp_path / "1.index"))
    path = sorted((copied / below).iterdir())[0]
    content = path.read_bytes()
    path.unlink()
    if damage == "altered":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FormatError, match=rf"1\.index is damaged: {below}/{path.name} (is missing|was altered)"):
        merge_index([parts[0], copied, parts[2]], tmp_path / "x.index")


# Export


def test_an_export_holds_every_chunk_that_was_not_removed(whole: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(whole, tmp_path / "x.index"))
    key = Snapshot.open(whole).store.passage(5).key
    remove_documents(copied, [key])
    now = Snapshot.open(copied)
    written = export_parquet(copied, tmp_path / "x.parquet")
    rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert written == len(rows) == now.store.num_live_chunks
    assert key not in {row["key"] for row in rows}
    stored = np.concatenate([load_array(path) for path in sorted((copied / "vectors").glob("*.npy"))])
    for row in rows:
        passage = now.store.passage(row["row"])
        assert (row["key"], row["title"], row["text"]) == (passage.key, passage.title, passage.text)
        assert row["vector"] == stored[row["row"]].tolist()
    with pytest.raises(ConfigError, match="is there already"):
        export_parquet(copied, tmp_path / "x.parquet")


# Ray

CLUSTER = """
import json, sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
from index_builder.cluster import build_on_cluster
from index_builder.config import BuildConfig
from index_builder.corpus import ReadOptions

request = json.load(sys.stdin)
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
cluster.wait_for_nodes()
out = Path(request["out"])
killed = []

def kill():
    while len(list((out / "vectors").glob("*.npy"))) < 2:
        time.sleep(0.01)
    killed.append(len(list((out / "vectors").glob("*.npy"))))
    cluster.remove_node(nodes[0], allow_graceful=False)

thread = threading.Thread(target=kill, daemon=True)
if request["kill"]:
    thread.start()
config = BuildConfig(**request["settings"], read=ReadOptions(on_error="skip", deduplicate="exact"))
build_on_cluster([request["corpus"]], out, config, address=cluster.address)
alive = cluster.list_all_nodes()
print(json.dumps({"killed": killed, "nodes": len(alive)}))
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_cluster_whose_node_dies_makes_the_bytes_of_one_machine(
    mixed: Path, whole: Path, settings: dict[str, Any], tmp_path: Path, folder_bytes: FolderBytes
) -> None:
    request = {"corpus": str(mixed), "settings": settings, "out": str(tmp_path / "x.index"), "kill": True}
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": "/tmp"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    shards = len(list((whole / "vectors").iterdir()))
    assert report["nodes"] == 2
    assert 2 <= report["killed"][0] < shards, "the node was to die in the middle"
    assert folder_bytes(tmp_path / "x.index") == folder_bytes(whole)


def test_a_cluster_that_does_not_answer_is_refused(
    mixed: Path, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from index_builder.cluster import build_on_cluster

    config = BuildConfig(**settings, read=READ)
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at '127\.0\.0\.1:1'"):
        build_on_cluster([str(mixed)], tmp_path / "x.index", config, address="127.0.0.1:1")
