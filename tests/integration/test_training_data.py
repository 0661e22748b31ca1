"""Training data against a naive construction from the texts, the stored vectors and brute force."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tokenizers

from index_builder.build import build_index
from index_builder.config import BuildConfig, DataConfig
from index_builder.corpus import ReadOptions, Reject, read_documents
from index_builder.neighbors import build_training_data
from index_builder.search import IndexRetriever
from retro.artifact import read_manifest
from retro.chunks import SPLITS, TrainingArrays, TrainingData, load_array
from retro.errors import ConfigError, FormatError
from retro.tokenizer import Tokenizer

FolderBytes = Callable[[Path], dict[str, bytes]]
M, K, R = 16, 3, 80  # a chunk of the index is some 60 tokens here, so that R cuts inside the continuation
CONFIG = DataConfig(
    num_neighbors=K, neighbor_len=R, chunk_len=M, shard_chars=4_000, valid_share=0.2, test_share=0.2, seed=3
)


class Made(NamedTuple):
    data: TrainingData
    manifest: dict[str, Any]
    retriever: IndexRetriever
    tokenizer: Tokenizer
    texts: list[str]
    groups: list[str]
    """Of the documents, here and below."""
    group_of_row: list[str]
    """Of the rows of the index."""


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(str(tokenizer_folder))


@pytest.fixture(scope="module")
def retriever(tiny_index: Path) -> IndexRetriever:
    return IndexRetriever.open(tiny_index)


@pytest.fixture(scope="module", params=["tiny", "prompts, L2, titles in keys"])
def made(
    request: pytest.FixtureRequest,
    corpus: Path,
    tokenizer: Tokenizer,
    retriever: IndexRetriever,
    prompted_encoder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    """Training data of the paragraphs with their own index, without shared groups among neighbors."""
    folder = tmp_path_factory.mktemp("made")
    if request.param != "tiny":
        config = BuildConfig(encoder=str(prompted_encoder), chunk_len=32, title_in_key=True)
        build_index([str(corpus)], folder / "x.index", config)
        retriever = IndexRetriever.open(folder / "x.index")
    manifest = build_training_data(
        [str(corpus)], folder / "x.data", tokenizer=tokenizer, retriever=retriever, config=CONFIG
    )
    documents = [d for d in read_documents([str(corpus)], ReadOptions()) if not isinstance(d, Reject)]
    group_of_key = {document.key: document.group for document in documents}
    rows = range(retriever.store.num_chunks)
    return Made(
        data=TrainingData(folder / "x.data"),
        manifest=manifest,
        retriever=retriever,
        tokenizer=tokenizer,
        texts=[document.text for document in documents],
        groups=[document.group for document in documents],
        group_of_row=[group_of_key[retriever.store.passage(row).key] for row in rows],
    )


def chunks_of(made: Made) -> Iterator[tuple[int, int, str | None]]:
    """Chunk, document and query (None where the chunk is not finished) of every chunk, slot by slot."""
    chunk = 0
    for document, text in enumerate(made.texts):
        spans = made.tokenizer.encode(text).spans.tolist()
        slots: list[tuple[int, int] | None] = [None] * (int(made.data.arrays.leads[document]) + 1)
        slots += [(first, end) for first, end in spans]
        for start in range(0, len(slots), M):
            here = [span for span in slots[start : start + M] if span is not None]
            finished = start + M <= len(slots)
            query = (text[here[0][0] : here[-1][1]] if here else "") if finished else None
            yield chunk, document, query
            chunk += 1


def test_tokens_are_those_of_every_document_after_bos(made: Made) -> None:
    arrays = made.data.arrays
    assert len(arrays.starts) == len(made.texts) + 1 == 41
    for document, text in enumerate(made.texts):
        ids = arrays.ids[arrays.starts[document] : arrays.starts[document + 1]]
        assert ids.tolist() == [made.tokenizer.bos_id, *made.tokenizer.encode(text).ids.tolist()]
    assert arrays.num_bytes.tolist() == [len(text.encode()) for text in made.texts]
    assert arrays.ids.dtype == np.uint16
    assert arrays.starts.dtype == arrays.neighbors.dtype == arrays.index_rows.dtype == np.int64


def test_neighbors_are_the_best_rows_of_other_groups(made: Made) -> None:
    arrays = made.data.arrays
    stored = np.concatenate([load_array(p) for p in sorted((made.retriever.folder / "vectors").glob("*.npy"))])
    stored_NX = stored.astype(np.float64)
    chunks = list(chunks_of(made))
    assert arrays.neighbors.shape == arrays.scores.shape == (len(chunks), K)
    assert made.data.chunk_starts.tolist() == [
        sum(document < d for _, document, _ in chunks) for d in range(len(made.texts) + 1)
    ]
    # Chunks are encoded as documents and without a title, whatever the stored keys have.
    asked = [(chunk, document, query) for chunk, document, query in chunks if query]
    vectors_QX = made.retriever.encoder.encode([query for _, _, query in asked], "document").astype(np.float64)
    if made.retriever.snapshot().index.metric == "L2":
        scores_QN = -((vectors_QX[:, None] - stored_NX[None]) ** 2).sum(axis=2)
    else:
        scores_QN = vectors_QX @ stored_NX.T
    for (chunk, document, _), scores_N in zip(asked, scores_QN, strict=True):
        other = np.array([group != made.groups[document] for group in made.group_of_row])
        rows = arrays.index_rows[arrays.neighbors[chunk]]
        assert other[rows].all(), chunk
        assert len(set(rows.tolist())) == K, chunk
        best = np.sort(scores_N[other])[::-1][:K]
        np.testing.assert_allclose(scores_N[rows], best, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(arrays.scores[chunk], best, rtol=1e-3, atol=1e-3)
    # Without the exclusion, some chunks would have found their own article.
    own = [made.group_of_row[int(s.argmax())] == made.groups[d] for (_, d, _), s in zip(asked, scores_QN, strict=True)]
    assert any(own)


def test_chunks_that_are_not_finished_have_no_neighbors(made: Made) -> None:
    arrays = made.data.arrays
    without = [chunk for chunk, _, query in chunks_of(made) if not query]
    assert len(without) > 20
    assert (arrays.neighbors[without] == -1).all()
    assert np.isnan(arrays.scores[without]).all()
    assert not np.isnan(np.delete(arrays.scores, without, axis=0)).any()


def test_neighbors_are_tokenized_as_one_string_and_cut_after_r(made: Made) -> None:
    arrays = made.data.arrays
    assert arrays.index_rows.tolist() == sorted(set(arrays.index_rows.tolist()))
    assert set(np.unique(arrays.neighbors)) - {-1} == set(range(len(arrays.index_rows)))
    assert arrays.neighbor_ids.shape == (len(arrays.index_rows), R)
    lengths = []
    for row, ids, length in zip(arrays.index_rows, arrays.neighbor_ids, arrays.neighbor_lengths, strict=True):
        passage = made.retriever.store.passage(int(row))
        expected = made.tokenizer.encode(passage.text + passage.continuation).ids[:R].tolist()
        assert ids.tolist() == expected + [0] * (R - len(expected))
        assert length == len(expected)
        lengths.append(len(expected))
    # The cases include whole neighbors and short ones.
    assert min(lengths) < R == max(lengths)


def test_the_manifest_counts_what_is_there(made: Made) -> None:
    arrays = made.data.arrays
    expected = {
        "documents": 40,
        "chunks": len(arrays.neighbors),
        "rejects": 0,
        "tokens": len(arrays.ids),
        "chunks_with_neighbors": sum(bool(query) for _, _, query in chunks_of(made)),
        "different_neighbors": len(arrays.index_rows),
        "chunk_len": M,
        "vocab_size": 800,
        "tokenizer_fingerprint": made.tokenizer.fingerprint,
        "encoder_fingerprint": made.retriever.encoder.fingerprint,
    }
    assert {key: made.manifest[key] for key in expected} == expected
    assert (made.data.num_neighbors, made.data.neighbor_len, made.data.chunk_len) == (K, R, M)
    assert made.data.tokenizer.fingerprint == made.tokenizer.fingerprint


def test_no_group_is_in_two_splits_and_the_seed_decides(made: Made, corpus: Path, tmp_path: Path) -> None:
    splits = made.data.arrays.splits.tolist()
    of_group = {group: {s for s, g in zip(splits, made.groups, strict=True) if g == group} for group in made.groups}
    assert [len(found) for found in of_group.values()] == [1] * 8
    for split in SPLITS:
        expected = [number for number, s in enumerate(splits) if s == SPLITS.index(split)]
        assert made.data.documents(split).tolist() == expected


# Splits and leads of many small documents


def write_corpus(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def many(
    tokenizer: Tokenizer, retriever: IndexRetriever, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], TrainingData, Path]:
    """Groups and data of 3000 documents of a few tokens, in 1000 groups."""
    folder = tmp_path_factory.mktemp("many")
    records: list[dict[str, Any]] = [{"id": n, "text": f"oil {n}", "group": f"g{n % 1000}"} for n in range(3000)]
    corpus = write_corpus(folder / "c.jsonl", records)
    config = DataConfig(num_neighbors=1, neighbor_len=8, chunk_len=M, valid_share=0.1, test_share=0.2)
    build_training_data([str(corpus)], folder / "x.data", tokenizer=tokenizer, retriever=retriever, config=config)
    return [record["group"] for record in records], TrainingData(folder / "x.data"), corpus


def test_groups_are_split_by_the_shares(many: tuple[list[str], TrainingData, Path]) -> None:
    groups, data, _ = many
    split_of_group = dict(zip(groups, data.arrays.splits.tolist(), strict=True))
    assert [split_of_group[group] for group in groups] == data.arrays.splits.tolist()
    counts = Counter(split_of_group.values())
    for split, share in (("train", 0.7), ("valid", 0.1), ("test", 0.2)):
        # Within four standard deviations of the binomial.
        assert abs(counts[SPLITS.index(split)] - 1000 * share) < 4 * np.sqrt(1000 * share * (1 - share))


def test_a_quarter_of_the_training_documents_has_a_lead_and_no_other(
    many: tuple[list[str], TrainingData, Path],
) -> None:
    _, data, _ = many
    leads, splits = data.arrays.leads, data.arrays.splits
    assert (leads[splits != SPLITS.index("train")] == 0).all()
    training = leads[splits == SPLITS.index("train")]
    n = len(training)
    assert abs((training > 0).sum() - n / 4) < 4 * np.sqrt(n * 3 / 16)
    # All leads there are, alike: of about 525 documents, 35 each.
    counts = Counter(training[training > 0].tolist())
    assert sorted(counts) == list(range(1, M))
    assert max(counts.values()) < 35 + 5 * np.sqrt(35)


def test_a_chunk_that_holds_only_bos_has_no_neighbors(many: tuple[list[str], TrainingData, Path]) -> None:
    _, data, _ = many
    [full] = [np.flatnonzero(data.arrays.leads == M - 1)]
    assert len(full) > 0
    assert (data.arrays.neighbors[data.chunk_starts[full]] == -1).all()


def test_another_seed_gives_other_splits_and_leads(
    many: tuple[list[str], TrainingData, Path], tokenizer: Tokenizer, retriever: IndexRetriever, tmp_path: Path
) -> None:
    _, data, corpus = many
    config = DataConfig(num_neighbors=1, neighbor_len=8, chunk_len=M, valid_share=0.1, test_share=0.2, seed=1)
    build_training_data([str(corpus)], tmp_path / "x.data", tokenizer=tokenizer, retriever=retriever, config=config)
    other = TrainingData(tmp_path / "x.data")
    assert (other.arrays.splits != data.arrays.splits).any()
    assert (other.arrays.leads != data.arrays.leads).any()
    np.testing.assert_array_equal(other.arrays.ids, data.arrays.ids)


def build_small(
    folder: Path, records: list[dict[str, Any]], tokenizer: Tokenizer, retriever: IndexRetriever, **options: Any
) -> TrainingData:
    corpus = write_corpus(folder / "c.jsonl", records)
    config = DataConfig(**{"num_neighbors": 2, "neighbor_len": 16, "chunk_len": 4, "lead_share": 0.0, **options})
    build_training_data([str(corpus)], folder / "x.data", tokenizer=tokenizer, retriever=retriever, config=config)
    return TrainingData(folder / "x.data")


def test_a_document_that_names_its_split_is_in_it(
    tokenizer: Tokenizer, retriever: IndexRetriever, tmp_path: Path
) -> None:
    names = ["train", "valid", "test", "validation", "dev"]
    records = [{"id": n, "text": "oil", "split": name} for n, name in enumerate(names)]
    # By their groups, all would be held out for validation.
    data = build_small(tmp_path, records, tokenizer, retriever, valid_share=0.99, test_share=0.0)
    assert [SPLITS[split] for split in data.arrays.splits] == ["train", "valid", "test", "valid", "valid"]


def test_a_corpus_of_documents_shorter_than_a_chunk_has_no_neighbors(
    tokenizer: Tokenizer, retriever: IndexRetriever, tmp_path: Path
) -> None:
    records = [{"id": n, "text": "a"} for n in range(3)]
    data = build_small(tmp_path, records, tokenizer, retriever)
    assert data.arrays.neighbors.tolist() == [[-1, -1]] * 3
    assert data.arrays.neighbor_ids.shape == (0, 16)


# Exclusion


@pytest.fixture(scope="module")
def one_group(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """A corpus whose documents are all of one group, and its index."""
    folder = tmp_path_factory.mktemp("one_group")
    texts = ["The price of oil rose. " * 3, "The price of oil rose. " * 3, "Rain fell on the forest. " * 3]
    records = [{"id": n, "text": text, "group": "all"} for n, text in enumerate(texts)]
    config = BuildConfig(encoder=str(tiny_encoder), chunk_len=4)
    build_index([str(write_corpus(folder / "c.jsonl", records))], folder / "x.index", config)
    return records, folder / "x.index"


def test_where_one_group_holds_everything_no_chunk_has_a_neighbor(
    one_group: tuple[list[dict[str, Any]], Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    records, index = one_group
    data = build_small(tmp_path, records, tokenizer, IndexRetriever.open(index))
    assert (data.arrays.neighbors == -1).all()
    assert np.isnan(data.arrays.scores).all()
    assert read_manifest(tmp_path / "x.data", TrainingData.KIND)["chunks_with_neighbors"] == 0


def test_a_duplicate_in_another_group_remains_a_neighbor(
    one_group: tuple[list[dict[str, Any]], Path], tokenizer: Tokenizer, tiny_encoder: Path, tmp_path: Path
) -> None:
    records, _ = one_group
    records = [{**record, "group": str(number)} for number, record in enumerate(records)]
    config = BuildConfig(encoder=str(tiny_encoder), chunk_len=4)
    build_index([str(write_corpus(tmp_path / "c.jsonl", records))], tmp_path / "x.index", config)
    retriever = IndexRetriever.open(tmp_path / "x.index")
    data = build_small(tmp_path, records, tokenizer, retriever)
    keys = [retriever.store.passage(int(row)).key for row in data.arrays.index_rows]
    found = []
    for document in range(3):
        of_document = data.arrays.neighbors[data.chunk_starts[document] : data.chunk_starts[document + 1]]
        found.append({keys[number] for number in of_document[of_document >= 0]})
    # Documents 0 and 1 have the same text; each is a neighbor of the other, and none of itself.
    assert found == [{"c:1", "c:2"}, {"c:0", "c:2"}, {"c:0", "c:1"}]


def test_without_exclusion_the_own_group_is_found(
    one_group: tuple[list[dict[str, Any]], Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    records, index = one_group
    data = build_small(tmp_path, records, tokenizer, IndexRetriever.open(index), exclude="none")
    finished = [u < count // 4 for count in np.diff(data.arrays.starts).tolist() for u in range(-(-count // 4))]
    assert (data.arrays.neighbors >= 0).all(axis=1).tolist() == finished


# Other tokenizers


def test_ids_beyond_16_bits_are_kept(retriever: IndexRetriever, tmp_path: Path) -> None:
    vocabulary = {f"w{number}": number for number in range(70_000)} | {"[UNK]": 70_000, "<s>": 70_001, "</s>": 70_002}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    data = build_small(tmp_path, [{"id": 1, "text": "w69999 w1 w65536 w0"}], Tokenizer.wrap(backend), retriever)
    assert data.arrays.ids.tolist() == [70_001, 69_999, 1, 65_536, 0]
    assert set(data.arrays.neighbor_ids[:, 0].tolist()) <= {70_000}
    assert (data.arrays.neighbors[0] >= 0).all()


# On disk


def test_training_data_is_whole_without_its_index(
    tiny_index: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    index = shutil.copytree(tiny_index, tmp_path / "x.index")
    build_training_data(
        [str(corpus)], tmp_path / "x.data", tokenizer=tokenizer, retriever=IndexRetriever.open(index), config=CONFIG
    )
    before = TrainingData(tmp_path / "x.data")
    expected = {field.name: np.array(getattr(before.arrays, field.name)) for field in fields(TrainingArrays)}
    shutil.rmtree(index)
    (tmp_path / "x.data").rename(tmp_path / "moved.data")
    after = TrainingData(tmp_path / "moved.data")
    for name, array in expected.items():
        np.testing.assert_array_equal(getattr(after.arrays, name), array)
    first = json.loads(corpus.read_text(encoding="utf-8").splitlines()[0])
    assert after.tokenizer.decode(after.arrays.ids[: after.arrays.starts[1]].tolist()) == first["text"]


def test_only_the_arrays_the_tokenizer_and_the_manifest_remain(made: Made) -> None:
    names = {path.relative_to(made.data.folder).as_posix() for path in made.data.folder.rglob("*") if path.is_file()}
    arrays = {f"{folder}/{name}.npy" for name, folder in made.data.arrays.folders().items()}
    assert names == arrays | {"manifest.json", "tokenizer.json", ".lock"}
    assert {path.name for path in made.data.folder.iterdir() if path.is_dir()} == {"tokens", "neighbors"}


def test_a_second_call_changes_nothing(made: Made, corpus: Path, folder_bytes: FolderBytes) -> None:
    before = folder_bytes(made.data.folder)
    again = build_training_data(
        [str(corpus)], made.data.folder, tokenizer=made.tokenizer, retriever=made.retriever, config=CONFIG
    )
    assert again == made.manifest
    assert folder_bytes(made.data.folder) == before


def test_other_settings_are_refused_and_overwrite_starts_again(
    corpus: Path, tokenizer: Tokenizer, retriever: IndexRetriever, tmp_path: Path, folder_bytes: FolderBytes
) -> None:
    def build(k: int, out: str = "x.data", *, overwrite: bool = False) -> None:
        config = DataConfig(num_neighbors=k, neighbor_len=R, chunk_len=M, read=ReadOptions(limit=3))
        build_training_data(
            [str(corpus)], tmp_path / out, tokenizer=tokenizer, retriever=retriever, config=config, overwrite=overwrite
        )

    build(2)
    before = folder_bytes(tmp_path / "x.data")
    with pytest.raises(ConfigError, match=r"made differently \(config\.num_neighbors: 2 -> 1\)"):
        build(1)
    assert folder_bytes(tmp_path / "x.data") == before
    build(1, overwrite=True)
    build(1, "fresh.data")
    assert folder_bytes(tmp_path / "x.data") == folder_bytes(tmp_path / "fresh.data")


def test_another_index_or_tokenizer_is_refused(
    made: Made, corpus: Path, retriever: IndexRetriever, tmp_path: Path
) -> None:
    other = Tokenizer.train(made.texts, 300)
    with pytest.raises(ConfigError, match=r"made differently .*tokenizer_fingerprint: "):
        build_training_data([str(corpus)], made.data.folder, tokenizer=other, retriever=made.retriever, config=CONFIG)
    if made.retriever is not retriever:
        with pytest.raises(ConfigError, match=r"made differently .*index_fingerprint: "):
            build_training_data(
                [str(corpus)], made.data.folder, tokenizer=made.tokenizer, retriever=retriever, config=CONFIG
            )


def test_damaged_training_data_is_refused(made: Made, tmp_path: Path) -> None:
    for number, name in enumerate(("tokens/ids.npy", "neighbors/neighbors.npy", "tokenizer.json")):
        folder = shutil.copytree(made.data.folder, tmp_path / str(number))
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(FormatError, match=rf"{name} was altered"):
            TrainingData(folder)
        (folder / name).write_bytes(content[:-1])
        with pytest.raises(FormatError, match=rf"{name} has .* bytes instead of"):
            TrainingData(folder)
    with pytest.raises(FormatError, match="not training data"):
        TrainingData(made.retriever.folder)


def test_rejected_records_are_counted_and_listed(
    tokenizer: Tokenizer, retriever: IndexRetriever, tmp_path: Path
) -> None:
    records: list[dict[str, Any]] = [{"text": ""}, {"text": "oil price " * 4}, {"text": "oil"}, {"text": ""}]
    data = build_small(tmp_path, records, tokenizer, retriever, shard_chars=1, read=ReadOptions(on_error="skip"))
    listed = [json.loads(line) for line in (tmp_path / "x.data" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["line"] for reject in listed] == [1, 4]
    assert (data.manifest["documents"], data.manifest["rejects"]) == (2, 2)


# Killed


def test_data_killed_in_every_stage_goes_on_to_the_same_bytes(
    tmp_path: Path,
    paragraphs: list[dict[str, Any]],
    tiny_index: Path,
    tokenizer_folder: Path,
    in_processes: Callable[..., list[dict[str, Any]]],
    folder_bytes: FolderBytes,
) -> None:
    records = [{**record, "text": record["text"][:120]} for record in paragraphs[::9]]
    corpus = write_corpus(tmp_path / "c.jsonl", [records[0], {"text": ""}, *records[1:], {"text": ""}])
    job = {
        "make": "data",
        "corpus": str(corpus),
        "index": str(tiny_index),
        "tokenizer": str(tokenizer_folder),
        "config": {
            "num_neighbors": 2,
            "neighbor_len": 16,
            "chunk_len": 16,
            "shard_chars": 300,
            "read": {"on_error": "skip"},
        },
        "out": str(tmp_path / "steps"),
        "stride": 2,  # every second step, for the time it takes: of the two shards, other files
    }
    [result] = in_processes([job])
    assert result["whole"]["end"] == ["done", ""]
    whole = folder_bytes(tmp_path / "steps" / "whole")
    steps = [" ".join(step) for step in result["whole"]["steps"]]
    folders = TrainingData(tmp_path / "steps" / "whole").arrays.folders()
    for step in (
        *(f"rename {folder}/{name}.npy" for name, folder in folders.items()),
        "rename shards/00001.counts.json",
        "remove shards/00001.rows.npy",
        "rename manifest.json",
    ):
        assert step in steps
    numbers = [attempt["number"] for attempt in result["killed"]]
    assert numbers == list(range(1, len(steps) + 1, 2))
    assert [attempt["first"]["killed"] for attempt in result["killed"]] == [True] * len(numbers)
    assert [attempt["second"]["end"] for attempt in result["killed"]] == [["done", ""]] * len(numbers)
    differing = {
        f"{attempt['number']}, before {steps[attempt['number'] - 1]}": sorted(
            name for name in {*whole, *again} if whole.get(name) != again.get(name)
        )
        for attempt in result["killed"]
        if (again := folder_bytes(tmp_path / "steps" / f"killed{attempt['number']}")) != whole
    }
    assert differing == {}
    # Before the manifest is there.
    for number in (number for number in numbers if number <= steps.index("rename manifest.json") + 1):
        with pytest.raises(FormatError, match="making it was interrupted"):
            TrainingData(tmp_path / "steps" / f"remains{number}")
