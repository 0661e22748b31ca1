"""Indexes whose chunks OpenVINO encoded: the same bytes however they were built, changed by OpenVINO, searched without it."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index_builder.build import build_index, merge_index
from index_builder.config import BuildConfig
from index_builder.corpus import ReadOptions
from index_builder.live import add_documents, remove_documents
from index_builder.search import IndexRetriever, Snapshot
from retro.artifact import read_manifest
from retro.chunks import load_array
from retro.errors import ConfigError, DependencyError, MismatchError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="needs openvino: install retro-lm[openvino]"
)
FolderBytes = Callable[[Path], dict[str, bytes]]


@pytest.fixture(scope="module")
def config(tiny_encoder: Path) -> BuildConfig:
    return BuildConfig(
        encoder=str(tiny_encoder), backend="openvino", chunk_len=16, shard_chars=1_500, read=ReadOptions(limit=20)
    )


@pytest.fixture(scope="module")
def whole(corpus: Path, config: BuildConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be altered."""
    folder = tmp_path_factory.mktemp("whole") / "x.index"
    assert len(build_index([str(corpus)], folder, config)["shards"]) > 5
    return folder


@pytest.fixture(scope="module")
def by_torch(config: BuildConfig) -> BuildConfig:
    return BuildConfig(
        encoder=config.encoder, chunk_len=config.chunk_len, shard_chars=config.shard_chars, read=config.read
    )


def test_an_interrupted_build_and_merged_parts_are_the_bytes_of_one_build(
    corpus: Path, config: BuildConfig, whole: Path, tmp_path: Path, folder_bytes: FolderBytes
) -> None:
    def interrupt(stage: str, done: int, _: int | None) -> None:
        if stage == "encode" and done > 120:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index([str(corpus)], tmp_path / "x.index", config, progress=interrupt)
    assert 0 < len(list((tmp_path / "x.index" / "vectors").glob("*.npy"))) < len(list((whole / "vectors").iterdir()))
    build_index([str(corpus)], tmp_path / "x.index", config)
    assert folder_bytes(tmp_path / "x.index") == folder_bytes(whole)
    for i in range(2):
        build_index([str(corpus)], tmp_path / f"{i}.index", config, part=(i, 2))
    merge_index([tmp_path / "0.index", tmp_path / "1.index"], tmp_path / "merged.index")
    assert folder_bytes(tmp_path / "merged.index") == folder_bytes(whole)


def test_added_documents_are_encoded_as_by_a_fresh_build(
    corpus: Path, config: BuildConfig, tmp_path: Path, whole: Path
) -> None:
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)[:20]
    later = tmp_path / "later" / corpus.name
    first = tmp_path / "first" / corpus.name
    for path, content in ((first, lines[:12]), (later, lines[12:])):
        path.parent.mkdir()
        path.write_text("".join(content), encoding="utf-8")
    folder = tmp_path / "x.index"
    build_index([str(first)], folder, config)
    assert add_documents(folder, [str(later)]).added == 8
    made, fresh = (
        np.concatenate([load_array(path) for path in sorted((index / "vectors").glob("*.npy"))])
        for index in (folder, whole)
    )
    np.testing.assert_array_equal(made, fresh)
    queries = ["When did the oil crisis begin?", "rain forest"]
    found = [
        [sorted((p.score, p.key, p.text) for p in row) for row in IndexRetriever.open(index).retrieve(queries, 9)]
        for index in (folder, whole)
    ]
    assert found[0] == found[1]


def test_another_backend_does_not_go_on_with_a_build_nor_merge_with_it(
    corpus: Path, config: BuildConfig, by_torch: BuildConfig, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r'config\.backend: "openvino" -> "torch"'):
        build_index([str(corpus)], whole, by_torch)
    for i, each in enumerate((config, by_torch)):
        build_index([str(corpus)], tmp_path / f"{i}.index", each, part=(i, 2))
    with pytest.raises(MismatchError, match="are parts of different builds"):
        merge_index([tmp_path / "0.index", tmp_path / "1.index"], tmp_path / "merged.index")


def test_searching_takes_no_openvino_and_adding_says_that_it_does(
    config: BuildConfig, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder_bytes: FolderBytes
) -> None:
    folder = tmp_path / "x.index"
    build_index([str(corpus)], folder, config)
    monkeypatch.setitem(sys.modules, "openvino", None)
    store = Snapshot.open(folder).store
    texts = [store.passage(row).text for row in range(store.num_chunks)]
    retriever = IndexRetriever.open(folder, dtype="float32")
    # Torch in float32 for the questions, OpenVINO's auto for the chunks: each chunk finds itself.
    passages = retriever.retrieve(texts, 1)
    assert [row[0].text for row in passages] == texts
    before = folder_bytes(folder)
    new = tmp_path / "new.jsonl"
    new.write_text(json.dumps({"id": "a", "text": "Oil."}) + "\n", encoding="utf-8")
    with pytest.raises(DependencyError, match=r"install retro-lm\[openvino\]"):
        add_documents(folder, [str(new)])
    assert read_manifest(folder, "index")["documents"] == 20
    assert {name: folder_bytes(folder)[name] for name in before} == before
    # Taking documents out encodes nothing.
    assert remove_documents(folder, [passages[0][0].key]).removed == 1


CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster
from index_builder.build import config_of
from index_builder.cluster import build_on_cluster

request = json.load(sys.stdin)
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
build_on_cluster([request["corpus"]], request["out"], config_of(request["recipe"]), address=cluster.address)
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_cluster_makes_the_bytes_of_one_machine(
    corpus: Path, whole: Path, tmp_path: Path, folder_bytes: FolderBytes
) -> None:
    request: dict[str, Any] = {
        "corpus": str(corpus),
        "out": str(tmp_path / "x.index"),
        "recipe": read_manifest(whole, "index")["recipe"],
    }
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
    assert folder_bytes(tmp_path / "x.index") == folder_bytes(whole)
