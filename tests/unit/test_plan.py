"""Plans of builds: arithmetic against numbers worked out by hand, counts against real builds, refusals with what is missing."""

import csv
import gzip
import json
import lzma
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from index_builder.config import BuildConfig
from index_builder.corpus import ReadOptions
from index_builder.index import IndexPlan, plan_index
from index_builder.plan import (
    GPUS,
    KMEANS_ROUNDS,
    LEXICAL_BYTES,
    RATES,
    BuildPlan,
    IndexWork,
    encode_flop,
    measure_build,
    plan_corpus,
)
from retro.errors import ConfigError, CorpusError, MismatchError
from retro.plan import format_bytes

ALL = 10**9
"""More documents than any corpus here has: the time is no limit then."""
Measure = Callable[..., BuildPlan]


# --- arithmetic -----------------------------------------------------------------------------------------------------


def test_flop_of_an_encoder_are_those_counted_by_hand() -> None:
    # 66 tokens, 6 layers, 24 * 384^2 + 4 * 66 * 384 = 3,640,320 a token and layer
    assert encode_flop("minilm", 64) == 66 * 6 * 3_640_320 == 1_441_566_720
    # 66 tokens, 24 layers, 24 * 1024^2 + 4 * 66 * 1024 = 25,436,160
    assert encode_flop("bert-large", 64) == 40_290_877_440


def test_a_small_corpus_is_planned_as_worked_out_by_hand() -> None:
    plan = plan_corpus(640_000, lexical=True)
    assert (plan.size.documents, plan.size.chunks, plan.index.factory) == (640, 10_000, "Flat")
    assert plan.disk == {
        "documents": 2_926_720,  # 640,000 tokens of 4.41 bytes, 640 times 163 bytes
        "chunks": 240_000,
        "vectors": 7_680_000,
        "index": 0,
        "BM25": 10_000 * LEXICAL_BYTES,
    }
    assert plan.ram_searching - plan.ram_building == 24 * 10_000  # the float32 copy of the vectors is in both
    assert plan.seconds["encoding"] == pytest.approx(10_000 / RATES["encoding"].per_s)
    assert plan.seconds["reading"] == pytest.approx(640_000 / RATES["reading"].per_s)
    # 1,000 queries against 10,000 vectors of 384 numbers with two cores, and 7.68 MB from the disk
    assert plan.seconds["measuring"] == pytest.approx(7.68e9 / (2 * RATES["matrices"].per_s) + 7.68e6 / 500e6)
    assert "training" not in plan.seconds
    assert plan.gpu_memory is None


def test_work_on_inverted_lists_is_that_worked_out_by_hand() -> None:
    index = IndexPlan(
        factory="IVF4096,Flat",
        reason="",
        bytes_per_vector=1544.0,
        memory_bytes=1544 * 10**6 + 4096 * 1536,
        part_rows=262_144,
    )
    work = IndexWork.of(index, 10**6, 384)
    assert (work.lists, work.sample, work.parts, work.fixed_bytes) == (4096, 262_144, 4, 6_291_456)
    assert work.train_flop == 8_246_337_208_320  # 2 * 262,144 * 4,096 * 384 * 10
    assert work.assign_flop == 3_145_728_000_000  # 2 * 10^6 * 4,096 * 384
    assert work.graph_searches == 0
    assert work.sample_bytes == 402_653_184  # 262,144 * 384 * 4
    assert work.train_bytes == 2 * 6_291_456 + 20 * 262_144
    assert work.merge_bytes == 3 * 6_291_456 + 8 * 4096


def test_a_rotation_shortens_what_k_means_sees_and_a_graph_replaces_comparisons() -> None:
    index = IndexPlan(
        factory="OPQ64_128,IVF65536_HNSW32,PQ64",
        reason="",
        bytes_per_vector=72.0,
        memory_bytes=72 * 10**7 + 10**6,
        part_rows=10**7,
    )
    work = IndexWork.of(index, 10**7, 1024)
    assert work.sample == 64 * 65_536
    k_means = 2 * work.sample * 65_536 * 128 * 10
    assert work.train_flop == k_means
    assert work.codes_flop == pytest.approx(2e13 * 1024 / 384)
    assert work.sample_bytes == 4 * work.sample * (1024 + 128)
    assert (work.assign_flop, work.graph_searches, work.parts, work.merge_bytes) == (0, 10**7, 1, 0)


@pytest.mark.parametrize("factory", ["IVF64,Flat", "OPQ8_32,IVF16384_HNSW32,PQ8"])
def test_k_means_takes_the_rounds_of_faiss(factory: str) -> None:
    assert faiss.extract_index_ivf(faiss.index_factory(64, factory)).cp.niter == KMEANS_ROUNDS


def test_bert_large_on_an_a100_has_the_published_rate() -> None:
    plan = plan_corpus(64 * 6.22e6, gpu="a100", encoder="bert-large")
    assert plan.seconds["encoding"] == pytest.approx(3600)
    assert "scaled" not in plan.rates["encoding"].source
    assert "arXiv:2310.07713" in plan.rates["encoding"].source
    assert plan.dim == 1024


def test_a_gpu_that_was_not_measured_has_a_scaled_rate_and_says_so() -> None:
    a100, h200 = (plan_corpus(1e9, gpu=gpu, encoder="bert-large") for gpu in ("a100", "h200"))
    assert a100.seconds["encoding"] / h200.seconds["encoding"] == pytest.approx(989 / 312)
    assert "not measured" in h200.rates["encoding"].source
    small = plan_corpus(1e9, gpu="a100")
    ratio = 40_290_877_440 / 1_441_566_720
    assert a100.seconds["encoding"] / small.seconds["encoding"] == pytest.approx(ratio)
    assert "scaled by FLOPs to minilm" in small.rates["encoding"].source


def test_many_devices_divide_reading_and_encoding_but_each_reads_all() -> None:
    one, many = plan_corpus(64e9), plan_corpus(64e9, gpus=64)
    assert many.seconds["encoding"] == pytest.approx(one.seconds["encoding"] / 64)
    skipped = 63e9 / RATES["skipping"].per_s
    assert many.seconds["reading"] == pytest.approx(one.seconds["reading"] / 64 + skipped)
    assert "skipping" in many.rates
    assert "skipping" not in one.rates
    assert many.seconds["adding"] == one.seconds["adding"]


def test_a_rate_that_the_user_measured_replaces_ours() -> None:
    plan = plan_corpus(64e6, gpu="h200", gpus=4, chunks_per_s=2500)
    assert plan.seconds["encoding"] == pytest.approx(100)
    assert "given" in plan.rates["encoding"].source


def test_the_paper_s_corpus_gets_the_kind_of_index_that_was_used_for_one() -> None:
    plan = plan_corpus(1.75e12, gpu="h200", gpus=64, cores=128)
    assert plan.index.factory == "OPQ64_128,IVF4194304_HNSW32,PQ64"
    assert plan.size.chunks == 27_343_750_000
    assert plan.disk["vectors"] == 2 * 384 * 27_343_750_000
    assert "19 billion" in plan.index.reason


def _missing(message: str) -> tuple[float, float, float]:
    """Needed, there, missing."""
    sizes = [
        float(number.replace(",", "")) * 1024 ** "KMGT".index(unit)
        for number, unit in re.findall(r"([\d.,]+) ([KMGT])iB", message)
    ]
    return sizes[0], sizes[1], sizes[2]


def test_memory_that_no_index_fits_into_is_refused_with_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="smallest index") as error:
        plan_corpus(1.7e12, gpu="h200", gpus=64, max_memory=64 << 30)
    needed, there, missing = _missing(str(error.value))
    assert needed - there == pytest.approx(missing, rel=0.01)
    assert there == 64 * 2**20


def test_disk_that_does_not_suffice_is_refused_with_what_is_missing() -> None:
    plan = plan_corpus(1e9)
    with pytest.raises(ConfigError, match="are missing") as error:
        plan_corpus(1e9, disk=plan.disk_building - 2**30)
    assert "1.00 GiB are missing" in str(error.value)
    assert format_bytes(plan.disk_building) in str(error.value)
    assert plan_corpus(1e9, disk=plan.disk_building).disk_free == plan.disk_building


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "h300"}, ", ".join(GPUS)),
        ({"encoder": "gpt"}, "bert-large"),
        ({"gpus": 0}, "gpus = 0"),
        ({"chunks_per_s": -1.0}, "chunks_per_s"),
        ({"chunk_len": 0}, "chunk_len"),
        ({"tokens": float("nan")}, "tokens"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_corpus(**{"tokens": 1e6, **options})


def test_parts_lie_beside_the_index_until_they_are_merged() -> None:
    plan = plan_corpus(64e6, max_memory=600 << 20)  # a million vectors, of 8 bits a number
    assert plan.index.factory.endswith("SQ8")
    parts = -(-1_000_000 // plan.index.part_rows)
    assert parts > 1
    fixed = plan.index.memory_bytes - 392 * 10**6  # 384 bytes and a row number each
    merged, counted = parts * fixed + 392 * 10**6, 64 * 10**6
    assert plan.disk_building == sum(plan.disk.values()) + merged + counted
    assert plan.seconds["merging"] == pytest.approx(2 * plan.index.memory_bytes / 500e6)


def test_product_codes_are_trained_beside_k_means_on_one_core() -> None:
    plan = plan_corpus(64e6, cores=8, max_memory=120 << 20)
    assert plan.index.factory == "OPQ96_384,IVF4096,PQ96"
    k_means = 2 * 64 * 4096 * 4096 * 384 * 10
    rate = RATES["matrices"].per_s
    assert plan.seconds["training"] == pytest.approx(k_means / (8 * rate) + 2e13 / rate)


def test_k_means_that_does_not_fit_on_the_gpus_runs_on_the_cpu() -> None:
    big, small = plan_corpus(1.7e12, gpu="l4", gpus=8, cores=4), plan_corpus(1e9, gpu="l4", gpus=8, cores=4)
    assert "runs on the CPU" in " ".join(big.notes)
    assert "runs on the CPU" not in " ".join(small.notes)
    assert big.seconds["training"] > 100 * small.seconds["training"]
    assert "k-means" not in big.rates
    assert small.rates["k-means"].per_s == 8 * 30.3e12 / 2
    assert small.gpu_memory is not None
    assert small.gpu_memory < GPUS["l4"].memory


def test_a_report_is_plain_data_whose_parts_add_up() -> None:
    plan = plan_corpus(1e9, disk=10**12)
    report = json.loads(json.dumps(plan.report()))
    parts = [report["disk"][f"disk_{name}_bytes"] for name in ("documents", "chunks", "vectors", "index", "BM25")]
    assert report["disk"]["disk_in_all_bytes"] == sum(parts) == sum(plan.disk.values())
    assert report["disk"]["disk_free_bytes"] == 10**12
    assert report["hours"]["hours_in_all"] == pytest.approx(sum(plan.seconds.values()) / 3600, rel=0.01)
    assert report["chunks"] == 15_625_000
    assert set(report["rates"]) == {
        "rate_reading", "rate_encoding", "rate_matrices", "rate_BM25", "rate_disk",
        *(["rate_graph"] if "HNSW" in plan.index.factory else []),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (1023, "1,023 bytes"), (1536, "1.50 KiB"), (5 << 40, "5.00 TiB")]
)
def test_bytes_are_written_in_the_largest_unit(size: int, text: str) -> None:
    assert format_bytes(size) == text


# --- measured on a corpus -------------------------------------------------------------------------------------------


class _Corpus(NamedTuple):
    records: list[dict[str, str]]
    folder: Path


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> _Corpus:
    """600 documents of very different lengths, in no order."""
    rng = np.random.default_rng(0)
    words = np.array([f"word{n}" for n in range(300)])
    lengths = rng.lognormal(4, 0.7, 600).astype(int) + 3
    records = [{"id": str(n), "text": " ".join(rng.choice(words, length))} for n, length in enumerate(lengths)]
    return _Corpus(records, tmp_path_factory.mktemp("made_up"))


def _write(records: list[dict[str, str]], path: Path) -> Path:
    """One file in the format and compression of its suffix; a folder of texts where it has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    match path.suffix:
        case ".jsonl":
            path.write_bytes(lines)
        case ".gz":
            path.write_bytes(gzip.compress(lines))
        case ".xz":
            path.write_bytes(lzma.compress(lines))
        case ".zst":
            half = len(lines) // 2  # two frames
            path.write_bytes(b"".join(map(zstandard.ZstdCompressor().compress, (lines[:half], lines[half:]))))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(records), path)
        case ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, ["id", "text"])
                writer.writeheader()
                writer.writerows(records)
        case _:
            path.mkdir(exist_ok=True)
            for record in records:
                (path / f"{int(record['id']):03}.txt").write_text(record["text"], encoding="utf-8")
    return path


@pytest.fixture
def measure(tiny_encoder: Path, tmp_path: Path) -> Measure:
    """`measure_build` with the tiny encoder and chunks of 32 tokens."""

    def run(*corpora: Path | str, out: Path | None = None, max_documents: int = ALL, **options: Any) -> BuildPlan:
        overwrite = options.pop("overwrite", False)
        config = BuildConfig(**{"encoder": str(tiny_encoder), "chunk_len": 32, "shard_chars": 100_000, **options})
        return measure_build(
            [str(corpus) for corpus in corpora],
            out or tmp_path / "out.index",
            config,
            overwrite=overwrite,
            seconds=0.05,
            max_documents=max_documents,
        )

    return run


def test_a_corpus_that_is_read_to_its_end_has_the_counts_and_bytes_of_its_index(
    measure: Measure, corpus: Path, tiny_index: Path
) -> None:
    plan = measure(corpus, shard_chars=6_000)
    manifest = json.loads((tiny_index / "manifest.json").read_text())
    assert plan.size.exact
    assert (plan.size.documents, plan.size.chunks) == (manifest["documents"], manifest["chunks"])
    assert plan.index.factory == manifest["index"]["factory"]
    stored = {
        name: sum(path.stat().st_size for path in (tiny_index / name).iterdir()) for name in ("vectors", "lexical")
    }
    shards = list((tiny_index / "documents").glob("*.arrow"))
    assert plan.disk["documents"] == sum(path.stat().st_size for path in shards)
    assert plan.disk["vectors"] == stored["vectors"] - 128 * len(shards)  # without headers
    assert plan.disk["BM25"] == pytest.approx(stored["lexical"], rel=0.03)
    assert plan.truncated_share == 0
    assert {"reading", "encoding", "BM25", "measuring"} == set(plan.seconds)
    assert all("of this corpus" in plan.rates[name].source for name in ("reading", "encoding", "BM25"))


@pytest.fixture(scope="module")
def whole_plan(made_up: _Corpus, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildPlan:
    """Of all 600 documents."""
    path = _write(made_up.records, made_up.folder / "all.jsonl")
    config = BuildConfig(encoder=str(tiny_encoder), chunk_len=32)
    out = tmp_path_factory.mktemp("whole") / "out.index"
    return measure_build([str(path)], out, config, seconds=0.05, max_documents=ALL)


def test_tokens_are_counted_not_guessed(made_up: _Corpus, whole_plan: BuildPlan, tiny_encoder: Path) -> None:
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(tiny_encoder / "tokenizer.json"))
    encoded = backend.encode_batch([record["text"] for record in made_up.records], add_special_tokens=False)
    plan = whole_plan
    assert plan.size.exact
    assert plan.size.documents == 600
    assert plan.size.tokens == sum(len(text.ids) for text in encoded)
    assert plan.size.chunks == sum(-(-len(text.ids) // 32) for text in encoded)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet", "a.csv", "texts"])
def test_a_corpus_cut_short_is_estimated_within_a_fifth(
    measure: Measure, made_up: _Corpus, whole_plan: BuildPlan, name: str
) -> None:
    part = measure(_write(made_up.records, made_up.folder / name), max_documents=200)
    whole = whole_plan
    assert not part.size.exact
    for count in ("documents", "chunks", "tokens", "document_bytes", "lexical_bytes"):
        assert getattr(part.size, count) == pytest.approx(getattr(whole.size, count), rel=0.2), count
    if name == "a.parquet":
        assert part.size.documents == 600


def test_kinds_of_files_that_were_not_reached_are_looked_at_too(
    measure: Measure, made_up: _Corpus, whole_plan: BuildPlan
) -> None:
    folder = made_up.folder / "mixed"
    _write(made_up.records[:200], folder / "1.jsonl")
    _write(made_up.records[200:400], folder / "2.parquet")
    _write(made_up.records[400:], folder / "3.jsonl.gz")
    (folder / "0.txt").write_text("")
    plan = measure(folder, max_documents=100, read=ReadOptions(on_error="skip"))
    assert plan.size.documents == pytest.approx(600, rel=0.2)
    assert plan.size.chunks == pytest.approx(whole_plan.size.chunks, rel=0.2)
    assert all(kind in plan.size.basis for kind in (".jsonl", ".parquet", ".jsonl.gz"))


def test_files_read_before_count_in_full(measure: Measure, made_up: _Corpus) -> None:
    folder = made_up.folder / "many"
    for number in range(6):
        _write(made_up.records[number * 100 : number * 100 + 100], folder / f"{number}.jsonl.gz")
    plan = measure(folder, max_documents=350)
    assert plan.size.documents == pytest.approx(600, rel=0.1)


def test_an_estimate_ends_at_the_limit(measure: Measure, made_up: _Corpus) -> None:
    path = _write(made_up.records, made_up.folder / "limited.jsonl")
    plan = measure(path, max_documents=100, read=ReadOptions(limit=300))
    assert plan.size.documents == 300
    assert measure(path, read=ReadOptions(limit=300)).size.exact


def test_rows_of_a_data_set_come_from_its_card_or_nowhere(
    measure: Measure, made_up: _Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set"
    _write(made_up.records, folder / "train.jsonl")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"nobody knows how many rows.*--limit"):
        measure(f"hf:{folder}:train", max_documents=100)
    assert measure(f"hf:{folder}:train", max_documents=100, read=ReadOptions(limit=400)).size.documents == 400
    card = "---\ndataset_info:\n  splits:\n  - name: train\n    num_bytes: 1\n    num_examples: 600\n---\n"
    (folder / "README.md").write_text(card)
    assert measure(f"hf:{folder}:train", max_documents=100).size.documents == 600


def test_chunks_of_the_sample_that_are_too_long_for_the_encoder_are_counted(measure: Measure, made_up: _Corpus) -> None:
    path = _write(made_up.records[:50], made_up.folder / "long.jsonl")
    assert measure(path, chunk_len=32).truncated_share == 0
    # With 20 tokens read, of which two are special, every full chunk of 32 is cut.
    share = measure(path, chunk_len=32, max_length=20).truncated_share
    assert share is not None
    assert 0.5 < share < 1


def test_nothing_is_left_behind(measure: Measure, corpus: Path, tmp_path: Path) -> None:
    measure(corpus, out=tmp_path / "deep" / "out.index")
    assert list(tmp_path.iterdir()) == []


def test_an_index_of_the_same_recipe_is_no_obstacle_and_of_another_one_is(
    measure: Measure, corpus: Path, tiny_index: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_index.rglob("*")}
    assert measure(corpus, out=tiny_index, shard_chars=6_000).size.exact
    assert {path: path.stat().st_mtime_ns for path in tiny_index.rglob("*")} == before
    with pytest.raises(ConfigError, match=r"config\.chunk_len: 32 -> 16"):
        measure(corpus, out=tiny_index, shard_chars=6_000, chunk_len=16)
    assert measure(corpus, out=tiny_index, shard_chars=6_000, chunk_len=16, overwrite=True).size.exact


def test_a_folder_or_file_of_something_else_is_refused(measure: Measure, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="something else"):
        measure(corpus, out=tmp_path / "mine")
    with pytest.raises(ConfigError, match="is a file"):
        measure(corpus, out=tmp_path / "mine" / "thesis.txt")


def test_a_full_disk_is_refused_with_what_is_missing(
    measure: Measure, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = measure(corpus).disk_building
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1024))
    with pytest.raises(ConfigError, match=r"1\.00 KiB are missing"):
        measure(corpus)


def test_too_little_memory_is_refused_with_what_is_missing(
    measure: Measure, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    with pytest.raises(ConfigError, match=r"building takes .*, 3\.91 MiB are there"):
        measure(corpus)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"index_type": "IVF100000,Flat"}, ConfigError, "are missing|too few"),
        ({"index_type": "IVF"}, ConfigError, "index type"),
        ({"lexical": "klingon"}, ConfigError, "klingon"),
        ({"encoder": "/nowhere"}, ConfigError, "/nowhere"),
        ({"tokenizer": "/nowhere/tokenizer.json"}, ConfigError, "/nowhere"),
        ({"max_memory": 1000}, ConfigError, "missing"),
        ({"read": ReadOptions(text_field="body")}, CorpusError, "'body'"),
    ],
)
def test_every_setting_is_checked(
    measure: Measure, corpus: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        measure(corpus, **options)


def test_a_corpus_that_is_missing_is_refused(measure: Measure, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="does not exist"):
        measure(corpus, tmp_path / "none.jsonl")


def test_vectors_that_come_with_the_corpus_are_not_encoded_but_must_fit(measure: Measure, tmp_path: Path) -> None:
    records = [{"id": str(n), "text": f"text {n}", "vector": [float(n)] * 32} for n in range(20)]
    path = tmp_path / "vectors.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    plan = measure(path, read=ReadOptions(vectors_field="vector"))
    assert (plan.size.documents, plan.size.chunks, plan.size.tokens) == (20, 20, None)
    assert "encoding" not in plan.seconds
    assert "tokens" not in plan.report()
    path.write_text(json.dumps(records[0] | {"vector": [1.0] * 31}))
    with pytest.raises(MismatchError, match="31 numbers"):
        measure(path, read=ReadOptions(vectors_field="vector"))


def test_without_bm25_there_is_neither_space_nor_time_for_it(measure: Measure, corpus: Path) -> None:
    plan = measure(corpus, lexical="off")
    assert plan.disk["BM25"] == 0
    assert "BM25" not in plan.seconds
    assert "BM25" not in plan.rates


def test_progress_names_what_is_sampled(corpus: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    config = BuildConfig(encoder=str(tiny_encoder))
    plan = measure_build(
        [str(corpus)],
        tmp_path / "out.index",
        config,
        seconds=1,
        max_documents=ALL,
        progress=lambda *arguments: told.append(arguments),
    )
    assert "encode a sample" in {stage for stage, _, _ in told}
    assert max(done for stage, done, _ in told if stage == "encode a sample") <= plan.size.chunks


def test_the_plan_of_the_index_is_that_of_the_build() -> None:
    assert plan_corpus(64e6).index == plan_index(1_000_000, 384)
