"""What a build takes, before it is started: chunks, index, disk, memory, hours.

`measure_build` reads, chunks, encodes and indexes a sample of the real corpus in a temporary folder beside the index; `plan_corpus`
works from figures measured before, each of which it names. Both refuse what cannot work, with the number that is missing.
"""

import contextlib
import math
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from index_builder.build import make_recipe, open_encoder
from index_builder.config import BuildConfig
from index_builder.corpus import describe_corpora
from index_builder.encoder import Encoder
from index_builder.index import (
    MIN_TRAIN,
    OPQ_BYTES,
    RAM_COPY,
    TRAIN_PER_LIST,
    IndexPlan,
    estimate_gpu_memory,
    physical_memory,
    plan_index,
)
from index_builder.lexical import PART_POSTINGS
from index_builder.sample import CorpusSize, LexicalSample, Rate, Sample
from index_builder.shards import Progress
from retro.artifact import MANIFEST, UNFINISHED, differing, read_json, storage_error
from retro.errors import ConfigError, MismatchError
from retro.plan import format_bytes
from retro.tokenizer import Tokenizer

KMEANS_ROUNDS = 10
"""Iterations of FAISS's k-means for inverted lists."""
CODES_FLOP = 2e13
"""Training OPQ64_256,PQ64 on FAISS's sample of 65,536 vectors of 384 numbers takes as long as so much matrix product (215 s)."""
ROW_BYTES = 24
"""Memory of a process that searches, for each row: its document, and the share of the document's key and group."""
KEY_BYTES = {"none": 24, "exact": 24 + 48, "near": 24 + 1300}
"""Memory of a process that reads, for each document: the hash of its key, and what finds duplicates."""
CHUNK_BYTES = 24
"""Disk for the span of a chunk."""
GPU_RESERVE = 3 << 29
"""Bytes that FAISS takes on a GPU for itself."""
_HERE = "2 cores of an AMD EPYC with AVX512_BF16"
RATES = {
    "reading": Rate(
        per_s=725_000, unit="tokens", source="measured on Simple Wikipedia, one process on one core (EPYC)"
    ),
    "skipping": Rate(
        per_s=15e6,
        unit="tokens",
        source="measured on Simple Wikipedia: documents of other parts are parsed, not chunked",
    ),
    "encoding": Rate(per_s=390, unit="chunks", source=f"measured with MiniLM in bfloat16 on {_HERE}, 64 tokens"),
    "encoding_a100": Rate(
        per_s=6.22e6 / 3600, unit="chunks", source="published for BERT-large, 64 tokens, on an A100 (arXiv:2310.07713)"
    ),
    "matrices": Rate(per_s=94e9, unit="FLOP", source="float32 matrix product and maximum, measured on one EPYC core"),
    "graph": Rate(
        per_s=10_500,
        unit="vectors",
        source="nearest of 65,536 centroids of 384 numbers through HNSW32, measured on one EPYC core",
    ),
    "BM25": Rate(per_s=37_700, unit="chunks", source="measured on Simple Wikipedia, one EPYC core"),
    "disk": Rate(per_s=500e6, unit="bytes", source="assumed, not measured"),
}
"""Measured on a shared machine with nothing tuned for these figures; one core unless the source says otherwise."""
TEXT_BYTES, DOCUMENT_BYTES, LEXICAL_BYTES, BASE_RAM = 4.41, 163, 208, 1 << 30
"""Simple Wikipedia: bytes of a token in English, of a document beside its text, of BM25 for a chunk; a process with the encoder."""
TOKENS_PER_DOCUMENT = 1000
"""Assumed where the corpus is not there."""


class Gpu(NamedTuple):
    """Data sheet of NVIDIA."""

    bf16_flops: float
    """Dense, with tensor cores."""
    fp32_flops: float
    memory: int


GPUS = {
    "l4": Gpu(121e12, 30.3e12, 24 * 10**9),
    "l40s": Gpu(362e12, 91.6e12, 48 * 10**9),
    "a100": Gpu(312e12, 19.5e12, 80 * 10**9),
    "h100": Gpu(989e12, 67e12, 80 * 10**9),
    "h200": Gpu(989e12, 67e12, 141 * 10**9),
}
GPUS_OF_A_MACHINE = 8
"""k-means runs on one machine."""
ENCODERS = {"minilm": (6, 384), "bert-base": (12, 768), "bert-large": (24, 1024)}
"""Layers and width."""


# --- the plan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
    """What a build takes."""

    size: CorpusSize
    encoder: str
    dim: int
    """X."""
    index: IndexPlan
    disk: dict[str, int]
    """Bytes of the finished index by part."""
    disk_building: int
    """Bytes at the worst moment of the build."""
    disk_free: int | None
    """Bytes there are; None where nobody said."""
    ram_building: int
    ram_searching: int
    """Bytes of a process, memory-mapped lists and vectors of an exact index included."""
    gpu_memory: int | None
    """Bytes on each GPU; None without one."""
    seconds: dict[str, float]
    """Of each stage."""
    rates: dict[str, Rate]
    truncated_share: float | None = None
    """Of the sample: chunks that the encoder cuts short."""
    notes: tuple[str, ...] = ()

    def report(self) -> dict[str, Any]:
        """Plain data, for people and programs."""
        size = self.size
        disk = self.disk | {"in_all": sum(self.disk.values()), "building": self.disk_building}
        memory = {"ram_building_bytes": self.ram_building, "ram_searching_bytes": self.ram_searching}
        if self.gpu_memory is not None:
            memory["gpu_memory_bytes"] = self.gpu_memory
        if self.disk_free is not None:
            disk["free"] = self.disk_free
        hours = {f"hours_{stage}": _hours(seconds) for stage, seconds in self.seconds.items()}
        return {
            "documents": size.documents,
            "chunks": size.chunks,
            **({} if size.tokens is None else {"tokens": size.tokens}),
            "counts": f"{'exact' if size.exact else 'estimated'}: {size.basis}",
            **({} if self.truncated_share is None else {"truncated_share": round(self.truncated_share, 4)}),
            "encoder": self.encoder,
            "dim": self.dim,
            "index_type": self.index.factory,
            "reason": self.index.reason,
            "disk": {f"disk_{part}_bytes": value for part, value in disk.items()},
            "memory": memory,
            "hours": {**hours, "hours_in_all": _hours(sum(self.seconds.values()))},
            "rates": {f"rate_{name}": str(rate) for name, rate in self.rates.items()},
            **({"notes": " ".join(self.notes)} if self.notes else {}),
        }


def _hours(seconds: float) -> float:
    """Three digits are all that such a figure has."""
    hours = seconds / 3600
    return round(hours) if hours >= 100 else float(f"{hours:.3g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexWork:
    """What training, adding, merging and tuning an index of n vectors takes, however fast it is done."""

    tune_flop: float
    lists: int = 0
    """0 for an exact index, as are the others."""
    sample: int = 0
    """Vectors that train it."""
    train_flop: float = 0.0
    """Of k-means."""
    codes_flop: float = 0.0
    """Of training product codes, for one core."""
    assign_flop: float = 0.0
    """To compare every vector with every centroid; 0 where a graph finds the nearest."""
    graph_searches: float = 0.0
    """In searches of a graph of 65,536 centroids, which take log2(lists) / 16 each."""
    parts: int = 0
    """Files that are merged."""
    fixed_bytes: int = 0
    """Centroids and graph: in memory once, on disk in every part."""
    sample_bytes: int = 0
    """The sample: in the memory of a GPU, without one in a file."""
    train_bytes: int = 0
    """Memory while it is trained on."""
    add_bytes: int = 0
    """Memory while a part is added."""
    merge_bytes: int = 0
    """Memory while parts are merged."""

    @classmethod
    def of(cls, index: IndexPlan, n: int, dim: int) -> "IndexWork":
        """From the factory string: IVF, HNSW, OPQ and PQ are what costs time."""
        queries = min(n, 1000, max(100, int(1e12 / max(n * dim, 1))))
        tune_flop = 2.0 * n * dim * queries
        found = re.search(r"IVF(\d+)", index.factory)
        if found is None:
            return cls(tune_flop=tune_flop)
        lists = int(found[1])
        rotated = re.search(r"OPQ\d+_(\d+)", index.factory)
        width = int(rotated[1]) if rotated else dim
        sample = min(n, max(lists * TRAIN_PER_LIST, MIN_TRAIN))
        graph, codes = "HNSW" in index.factory, "PQ" in index.factory
        parts = math.ceil(n / index.part_rows)
        fixed = max(index.memory_bytes - int(index.bytes_per_vector * n), 0)
        return cls(
            lists=lists,
            sample=sample,
            train_flop=2.0 * sample * lists * width * KMEANS_ROUNDS,
            codes_flop=codes * CODES_FLOP * dim / 384,
            assign_flop=0.0 if graph else 2.0 * n * lists * width,
            graph_searches=n * math.log2(lists) / 16 if graph else 0.0,
            tune_flop=tune_flop,
            parts=parts,
            fixed_bytes=fixed,
            sample_bytes=4 * sample * (dim + (width if rotated else 0)),
            # Of a sample vector its list, distance and place; FAISS copies what OPQ learns from.
            train_bytes=2 * fixed + 20 * sample + (5 * OPQ_BYTES if rotated else 0),
            add_bytes=fixed + int(min(n, index.part_rows) * index.bytes_per_vector) + 4 * 65_536 * (dim + width),
            # The empty index, its bytes, and a copy of them.
            merge_bytes=3 * fixed + 8 * lists if parts > 1 else 0,
        )


def _make_plan(
    size: CorpusSize,
    *,
    encoder: str,
    dim: int,
    index: IndexPlan,
    rates: dict[str, Rate],
    seconds: dict[str, float],
    base_ram: int,
    document_ram: int = KEY_BYTES["none"],
    **known: Any,
) -> BuildPlan:
    """Everything that follows from the size, the index and the rates; `seconds` are those of reading and encoding."""
    n = size.chunks
    work = IndexWork.of(index, n, dim)
    exact = work.lists == 0
    stored = 0 if exact else index.memory_bytes
    disk = {"documents": size.document_bytes, "chunks": CHUNK_BYTES * n, "vectors": 2 * dim * n, "index": stored}
    disk["BM25"] = size.lexical_bytes
    building = sum(disk.values()) + min(8 * PART_POSTINGS, size.lexical_bytes)
    if work.parts > 1:
        building += work.parts * work.fixed_bytes + int(n * index.bytes_per_vector)
    disk_rate, matrices = rates["disk"].per_s, rates["matrices"].per_s
    device = rates.get("k-means", rates["matrices"]).per_s
    seconds = seconds | {
        "training": work.train_flop / device + work.codes_flop / RATES["matrices"].per_s,
        "adding": work.assign_flop / device + work.graph_searches / rates["graph"].per_s,
        "merging": 2 * stored / disk_rate if work.parts > 1 else 0.0,
        "measuring": work.tune_flop / matrices + 2 * dim * n / disk_rate,
        "BM25": n / rates["BM25"].per_s if "BM25" in rates else 0.0,
    }
    copied = min(4 * dim * n, RAM_COPY) if exact else 0
    stages = (document_ram * size.documents, work.train_bytes, work.add_bytes, work.merge_bytes, copied)
    used = {"graph": work.graph_searches > 0, "BM25": size.lexical_bytes > 0}
    return BuildPlan(
        size=size,
        encoder=encoder,
        dim=dim,
        index=index,
        disk=disk,
        disk_building=building,
        ram_building=base_ram + max(stages),
        ram_searching=base_ram + ROW_BYTES * n + (copied if exact else index.memory_bytes),
        seconds={stage: value for stage, value in seconds.items() if value},
        rates={name: rate for name, rate in rates.items() if used.get(name, True)},
        **known,
    )


def _refuse_beyond(needed: float, there: float | None, what: str, advice: str) -> None:
    if there is not None and needed > there:
        raise ConfigError(
            f"{what} takes {format_bytes(needed)}, {format_bytes(there)} are there: {format_bytes(needed - there)} are "
            f"missing. {advice}"
        )


# --- a corpus that is not there -------------------------------------------------------------------------------------


def plan_corpus(
    tokens: float,
    *,
    chunk_len: int = 64,
    dim: int | None = None,
    gpu: str | None = None,
    gpus: int = 1,
    cores: int = 2,
    encoder: str = "minilm",
    chunks_per_s: float | None = None,
    max_memory: int | None = None,
    disk: int | None = None,
    recall: float = 0.95,
    lexical: bool = True,
) -> BuildPlan:
    """Plans an index of a hypothetical corpus from RATES.

    Args:
        tokens: Of the corpus.
        chunk_len: Tokens of a chunk.
        dim: X; None takes the encoder's.
        gpu: A key of GPUS; None for CPUs like the one that was measured.
        gpus: How many devices encode: GPUs, or without one machines of `cores` cores; each also reads a part (`--shard`).
        cores: Of the machine that trains, adds, merges and, without a GPU, encodes.
        encoder: A key of ENCODERS.
        chunks_per_s: Of one device, measured by the user.
        max_memory: Bytes that the vector index may take; None lets any index be.
        disk: Bytes there are; None does not ask.
        recall: As in BuildConfig.
        lexical: Whether there is a BM25 index.

    Raises:
        ConfigError: A name or number that cannot be, or something that does not fit, with what is missing.
    """
    if encoder not in ENCODERS:
        raise ConfigError(f"no size is known of the encoder {encoder!r}: use one of {', '.join(ENCODERS)}")
    if gpu is not None and gpu not in GPUS:
        raise ConfigError(f"no data is known of the GPU {gpu!r}: use one of {', '.join(GPUS)}")
    numbers = {"tokens": tokens, "gpus": gpus, "cores": cores, "chunk_len": chunk_len, "dim": dim, "disk": disk}
    for name, value in (numbers | {"chunks_per_s": chunks_per_s}).items():
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} = {value}: give a number above 0")
    chunks, documents = math.ceil(tokens / chunk_len), math.ceil(tokens / TOKENS_PER_DOCUMENT)
    size = CorpusSize(
        documents=documents,
        chunks=chunks,
        tokens=int(tokens),
        exact=False,
        basis=f"full chunks of {chunk_len} tokens, documents of {TOKENS_PER_DOCUMENT:,} tokens, whose last chunks, half full on "
        f"average, add {50 * chunk_len / TOKENS_PER_DOCUMENT:.0f}%",
        document_bytes=int(tokens * TEXT_BYTES + documents * DOCUMENT_BYTES),
        lexical_bytes=int(chunks * LEXICAL_BYTES * chunk_len / 64) if lexical else 0,
    )
    width = dim or ENCODERS[encoder][1]
    index = (
        _free_index(chunks, width)
        if max_memory is None
        else plan_index(chunks, width, max_memory=max_memory, recall=recall)
    )
    work = IndexWork.of(index, chunks, width)
    rates, notes, gpu_memory = _planned_rates(encoder, chunk_len, gpu, gpus, cores, chunks_per_s), [], None
    if gpu is not None:
        together = min(gpus, GPUS_OF_A_MACHINE)
        gpu_memory = work.sample_bytes // together + GPU_RESERVE
        if gpu_memory > GPUS[gpu].memory:
            notes.append(
                f"k-means needs {format_bytes(gpu_memory)} on each of {together} GPUs, which have "
                f"{format_bytes(GPUS[gpu].memory)}: it runs on the CPU."
            )
            gpu_memory = GPU_RESERVE
            del rates["k-means"]
    if gpus > 1:
        notes.append(
            f"Reading and encoding are divided by {gpus} (--shard i/{gpus}, or Ray); "
            f"one machine does the rest (Ray shares out adding too)."
        )
    reading = tokens / rates["reading"].per_s / gpus + tokens * (gpus - 1) / gpus / rates["skipping"].per_s
    if gpus == 1:
        del rates["skipping"]
    plan = _make_plan(
        size,
        encoder=encoder,
        dim=width,
        index=index,
        rates=rates if lexical else {name: rate for name, rate in rates.items() if name != "BM25"},
        seconds={"reading": reading, "encoding": chunks / rates["encoding"].per_s / gpus},
        base_ram=BASE_RAM,
        disk_free=disk,
        gpu_memory=gpu_memory,
        notes=tuple(notes),
    )
    _refuse_beyond(plan.disk_building, disk, "the build", "Give more --disk, or take an encoder with fewer dimensions")
    return plan


def _free_index(num_vectors: int, dim: int) -> IndexPlan:
    """The index where memory is no question: the rule's own, and beyond what it allows unasked the kind that InstructRetro used."""
    try:
        return plan_index(num_vectors, dim)
    except ConfigError:
        codes = max((size for size in (64, 48, 32, 16) if dim % size == 0), default=1)
        lists = 1 << 22 if num_vectors >= 10**9 else 1 << 17
        plan = plan_index(num_vectors, dim, f"OPQ{codes}_{2 * codes},IVF{lists}_HNSW32,PQ{codes}")
        reason = (
            f"{lists:,} inverted lists of product codes of {codes} bytes, the kind that InstructRetro used for 19 billion chunks "
            f"(arXiv:2310.07713): it takes {format_bytes(plan.memory_bytes)}; --max-memory asks for less"
        )
        return replace(plan, reason=reason)


def _planned_rates(
    encoder: str, chunk_len: int, gpu: str | None, gpus: int, cores: int, chunks_per_s: float | None
) -> dict[str, Rate]:
    """RATES, adapted to encoder and machine."""
    device, reference, extra = "encoding", "minilm", {}
    factor, why = cores / 2, "" if cores == 2 else f"times {cores}/2 cores"
    if gpu is not None:
        device, reference = "encoding_a100", "bert-large"
        factor = GPUS[gpu].bf16_flops / GPUS["a100"].bf16_flops
        why = "" if gpu == "a100" else f"scaled by peak bf16 FLOP/s to {gpu}, not measured"
        together = min(gpus, GPUS_OF_A_MACHINE)
        extra["k-means"] = Rate(
            per_s=GPUS[gpu].fp32_flops * together / 2,
            unit="FLOP",
            source=f"half of the float32 peak of {together} x {gpu}, assumed, not measured",
        )
    flops = encode_flop(reference, 64) / encode_flop(encoder, chunk_len)
    if flops != 1:
        factor *= flops
        why += f"{'; ' if why else ''}scaled by FLOPs to {encoder}, {chunk_len} tokens, not measured: small encoders reach less"
    encoding = RATES[device].times(factor, why) if why else RATES[device]
    if chunks_per_s is not None:
        encoding = Rate(per_s=chunks_per_s, unit="chunks", source="given, of one device")
    return {
        "reading": RATES["reading"],
        "skipping": RATES["skipping"],
        "encoding": encoding,
        "matrices": RATES["matrices"].times(cores, f"times {cores} cores"),
        **extra,
        "graph": RATES["graph"].times(cores, f"times {cores} cores"),
        "BM25": RATES["BM25"],
        "disk": RATES["disk"],
    }


def encode_flop(encoder: str, chunk_len: int) -> float:
    """Of a forward pass over a chunk and two special tokens: 24 d^2 in the matrices of a layer, 4 n d in attention, a token."""
    layers, width = ENCODERS[encoder]
    n = chunk_len + 2
    return float(n * layers * (24 * width**2 + 4 * n * width))


# --- a corpus that is there -----------------------------------------------------------------------------------------


def measure_build(
    corpora: Sequence[str],
    out: str | Path,
    config: BuildConfig | None = None,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
    seconds: float = 60.0,
    max_documents: int | None = None,
) -> BuildPlan:
    """Checks everything that a build needs and measures a sample of the corpus; nothing is left behind.

    Args:
        corpora, out, config, device, overwrite, progress: As for `build_index`.
        seconds: What measuring may take, once the encoder is loaded.
        max_documents: Documents of the sample at most; None leaves it to the time.

    Raises:
        CorpusError: A corpus that cannot be read.
        ConfigError: A setting that cannot work; an index of another recipe in `out`; too little disk or memory, with what is
            missing; a data set of the hub whose number of rows nobody knows.
        StorageError: The folder of the index is not writable.
    """
    config, folder = config or BuildConfig(), Path(out)
    encoder = open_encoder(config, device)
    tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer else encoder.tokenizer()
    there = _bytes_there(
        folder, lambda: make_recipe(config, describe_corpora(corpora), encoder, tokenizer), overwrite=overwrite
    )
    place = next(path for path in folder.absolute().parents if path.is_dir())
    started = time.monotonic()
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".dry-run-", dir=place)
    except OSError as error:
        raise storage_error(folder, error) from error
    with temporary as name:
        sample = Sample(config, tokenizer, Path(name), progress)
        sample.read(corpora, math.inf if max_documents else started + 0.4 * seconds, max_documents)
        if config.read.vectors_field is not None and sample.vector_dim != encoder.dim:
            raise MismatchError(
                f"the vectors of the corpus have {sample.vector_dim} numbers, those of the encoder {encoder.name} {encoder.dim}: "
                "name the encoder that made them with --encoder"
            )
        rates = {"reading": sample.rate(), "disk": RATES["disk"]}
        lexical = None
        if config.lexical != "off":
            lexical = LexicalSample.measure(sample.texts, Path(name) / "lexical", config.lexical)
            rates["BM25"] = lexical.rate
        if config.read.vectors_field is None:
            rates["encoding"] = _encoding_rate(encoder, sample.texts, started + 0.9 * seconds, progress)
        cut = encoder.count_truncated(sample.texts, encoder.tokenizer()) / max(len(sample.texts), 1)
    rates["matrices"] = _matrix_rate("cpu", encoder.dim, min(2.0, 0.03 * seconds))
    if device.startswith("cuda"):
        rates["k-means"] = _matrix_rate(device, encoder.dim, min(2.0, 0.03 * seconds))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    rates["graph"] = RATES["graph"].times(cores, f"times {cores} cores")
    size = sample.size(lambda chunks: lexical.bytes_of(chunks) if lexical else 0)
    index = plan_index(size.chunks, encoder.dim, config.index_type, max_memory=config.max_memory, recall=config.recall)
    work = IndexWork.of(index, size.chunks, encoder.dim)
    if work.lists > size.chunks:
        raise ConfigError(
            f"{index.factory} has {work.lists:,} inverted lists, the corpus {size.chunks:,} chunks: "
            f"{work.lists - size.chunks:,} are missing. Take a smaller --index-type, or auto"
        )
    reading = {"reading": size.documents / rates["reading"].per_s}
    if "encoding" in rates:
        reading["encoding"] = size.chunks / rates["encoding"].per_s
    plan = _make_plan(
        size,
        encoder=encoder.name,
        dim=encoder.dim,
        index=index,
        rates=rates,
        seconds=reading,
        base_ram=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        document_ram=KEY_BYTES[config.read.deduplicate],
        disk_free=shutil.disk_usage(folder if folder.exists() else place).free + there,
        gpu_memory=_gpu_memory(device, work),
        truncated_share=cut,
    )
    _refuse_beyond(plan.disk_building, plan.disk_free, f"building {folder}", "Make room, or choose another --out")
    _refuse_beyond(
        plan.ram_building, physical_memory(), "building", "Take a machine with more memory, or a smaller --index-type"
    )
    return plan


def _bytes_there(folder: Path, recipe: Callable[[], dict[str, Any]], *, overwrite: bool) -> int:
    """Bytes of an index that was made or begun by the same recipe; 0 where there is nothing.

    Raises:
        ConfigError: Something else is there.
    """
    if not folder.exists():
        return 0
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file: choose another --out")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    if not files:
        return 0
    begun = next((read_json(folder / name) for name in (MANIFEST, UNFINISHED) if (folder / name).is_file()), None)
    if not isinstance(begun, dict) or begun.get("kind") not in ("index", "index part"):
        raise ConfigError(f"{folder} holds something else than an index: choose another --out")
    previous = {name: value for name, value in begun["recipe"].items() if name != "part"}
    if not overwrite and (differences := list(differing(previous, recipe()))):
        raise ConfigError(
            f"{folder} was made or begun differently ({'; '.join(differences)}). Use the same settings to go on, "
            "--overwrite to start again, or another --out"
        )
    return sum(path.stat().st_size for path in files)


class _OutOfTimeError(Exception):
    """Ends the encoding of a sample."""


def _encoding_rate(encoder: Encoder, texts: Sequence[str], until: float, progress: Progress | None) -> Rate:
    """Chunks a second in the time left, at least one batch. In one call, as a build does: it sorts texts by length."""
    encoder.encode(sorted(texts, key=len)[-64:], "document")
    started = ended = time.monotonic()
    done = 0

    def report(count: int) -> None:
        nonlocal done, ended
        done, ended = count, time.monotonic()
        if progress is not None:
            progress("encode a sample", done, len(texts))
        if ended > until:
            raise _OutOfTimeError

    with contextlib.suppress(_OutOfTimeError):
        encoder.encode(texts, "document", progress=report)
    rate = done / max(ended - started, 1e-6)
    return Rate(per_s=rate, unit="chunks", source=f"measured on {done:,} chunks of this corpus, {encoder.dtype}")


def _matrix_rate(device: str, dim: int, seconds: float) -> Rate:
    """Products with centroids, and the best of them: what k-means does."""
    import torch

    place = device.split(",", maxsplit=1)[0]
    x_NX, c_LX = torch.ones(2048, dim, device=place), torch.ones(2048, dim, device=place)
    int((x_NX @ c_LX.T).argmax(1)[0])
    started, rounds = time.monotonic(), 0
    while rounds == 0 or time.monotonic() - started < seconds:
        int((x_NX @ c_LX.T).argmax(1)[0])
        rounds += 1
    flop = 2.0 * 2048 * 2048 * dim * rounds
    return Rate(
        per_s=flop / (time.monotonic() - started),
        unit="FLOP",
        source=f"float32 matrix product and maximum, measured on {place}",
    )


def _gpu_memory(device: str, work: IndexWork) -> int | None:
    """What the build takes on each GPU: the encoder's peak in the sample, or k-means.

    Raises:
        ConfigError: k-means does not fit.
    """
    gpus = [name for name in device.split(",") if name.startswith("cuda")]
    if not gpus:
        return None
    import torch

    encoding = max(torch.cuda.max_memory_reserved(name) for name in gpus)
    torch.cuda.empty_cache()
    if not work.lists:
        return encoding
    estimate_gpu_memory(work.sample_bytes, device, what="training the index")
    return max(encoding, work.sample_bytes // len(gpus) + GPU_RESERVE)
