"""`retro eval lm`: the record of a model's bits per byte, with retrieval on, off, shuffled and more."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from eval.language_modeling import (
    EvalDocument,
    Foreign,
    Mode,
    Part,
    Scored,
    Window,
    bits_per_byte,
    chunk_sums,
    last_word_hits,
    last_words,
    perplexities,
    read_eval_documents,
    score,
    sees,
)
from eval.leakage import chunk_overlaps, overlap_curve, overlap_differences, overlap_intervals
from eval.metrics import bootstrap_mean, bootstrap_ratio, paired_bootstrap
from eval.records import Curve, Figure, Record
from index_builder.shards import Progress
from retro.artifact import MANIFEST, fingerprint, read_manifest
from retro.chunks import Document
from retro.errors import ConfigError, MismatchError
from retro.generate import Retriever
from retro.tokenizer import Tokenizer

THRESHOLDS = (0.0, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Of the overlap curve; 0.125 is the paper's: fewer than 8 of 64 tokens in common."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LmConfig:
    """What is measured."""

    modes: tuple[Mode, ...] = ("on", "off", "shuffled")
    """Ways to give neighbors."""
    num_neighbors: int = 2
    """K of all modes."""
    sweep: tuple[int, ...] = ()
    """Other numbers of neighbors to measure with retrieval on."""
    part: Part = "both"
    """What is read of a neighbor."""
    neighbor_len: int = 128
    """R."""
    window: int = 512
    """Slots that the model sees at once."""
    stride: int = 256
    """Slots from one window to the next."""
    overlap: bool = False
    """Bits per byte over the allowed overlap of a chunk and its 10 neighbors."""
    batch_size: int = 8
    """Windows at once."""
    seed: int = 0
    """Of the shuffling and of the intervals."""

    def __post_init__(self) -> None:
        if min(self.num_neighbors, *self.sweep, 10**9) < 1 or self.neighbor_len < 1 or self.batch_size < 1:
            raise ConfigError(
                "num_neighbors, sweep, neighbor_len and batch_size must be above 0; k = 0 is the mode off"
            )

    @property
    def looked_up(self) -> int:
        """Neighbors that are needed of each chunk."""
        if set(self.modes) <= {"off", "oracle"} and not self.sweep and not self.overlap:
            return 0
        return max(self.num_neighbors, *self.sweep, 10 if self.overlap else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A model to measure."""

    name: str
    model: Any
    tokenizer: Tokenizer
    fingerprint: str
    retrieves: bool
    """Whether it was made with retrieval."""


def open_for_eval(path: str, device: str = "cpu") -> Opened:
    """Opens a model of ours, or any causal language model of Hugging Face, which is measured without retrieval.

    Raises:
        FormatError, MismatchError: It is damaged.
        ConfigError: There is no such model.
    """
    folder = Path(path)
    if (folder / MANIFEST).is_file() or (folder / "training").is_dir():
        from retro.checkpoint import KIND, load_model

        model, tokenizer, _ = load_model(folder, device)
        return Opened(
            name=folder.name,
            model=model,
            tokenizer=tokenizer,
            fingerprint=fingerprint(read_manifest(folder, KIND)["files"]),
            retrieves=bool(model.config.cca_layers),
        )
    from transformers import AutoModelForCausalLM

    from retro.pretrained import digests

    try:
        base: Any = AutoModelForCausalLM.from_pretrained(path)
        base = base.to(device).eval()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is neither a model of ours nor one of Hugging Face: {error}") from error
    return Opened(
        name=folder.name,
        model=Foreign(base),
        tokenizer=Tokenizer.load(path),
        fingerprint=fingerprint(digests(base)),
        retrieves=False,
    )


def measure_language_model(
    opened: Opened,
    documents: Sequence[Document],
    config: LmConfig,
    *,
    retriever: Retriever | None,
    exclude_own: bool = True,
    baseline: Opened | None = None,
    last_word_texts: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[Record, dict[str, list[Any]]]:
    """Measures a model on documents.

    Args:
        opened: The model.
        documents: Each is scored for itself.
        config: See LmConfig.
        retriever: Of the neighbors; not needed for the modes off and oracle.
        exclude_own: Leave passages of a document's own group out.
        baseline: Another model, without retrieval, whose curve stands beside in all figures.
        last_word_texts: Passages whose last words are to be found; empty: none.
        progress: Told what is being done.

    Returns:
        A record and its units, a row for each document.

    Raises:
        ConfigError: There is nothing to measure, or a mode needs what is not there.
        MismatchError: The overlap curve of a baseline of another tokenizer is asked for.
    """
    began = time.monotonic()
    _check(opened, config, retriever)
    M = opened.model.chunk_len
    window = Window(length=config.window, stride=config.stride)
    window.check(M)
    read = read_eval_documents(
        documents,
        opened.tokenizer,
        M,
        retriever=retriever,
        num_neighbors=config.looked_up,
        exclude_own=exclude_own,
        progress=progress,
    )

    def scored_by(mode: Mode, K: int) -> list[Scored]:
        return score(
            opened.model,
            read,
            mode=mode,
            window=window,
            num_neighbors=K,
            neighbor_len=config.neighbor_len,
            part=config.part,
            batch_size=config.batch_size,
            seed=config.seed,
            progress=progress,
        )

    by_mode = {mode: scored_by(mode, config.num_neighbors) for mode in config.modes}
    units: dict[str, list[Any]] = {
        "id": [document.key for document in read],
        "bytes": [document.num_bytes for document in read],
        "tokens": [len(document.ids) - 1 for document in read],
    }
    figures: dict[str, Figure] = {}
    # The tokens that would see neighbors with retrieval on, and the bytes of each document that they stand for.
    seeing = [sees(document, document.neighbors, M) for document in read]
    if any(which.any() for which in seeing):
        units["bytes_seeing"] = [_bytes_of(document, which, M) for document, which in zip(read, seeing, strict=True)]
    for mode, scored in by_mode.items():
        _add_mode(mode, scored, read, seeing, figures, units, config.seed)
    base_read, base_scored = _score_baseline(baseline, documents, window, config, progress)
    if baseline is not None:
        losses = [float(s.loss_n.sum()) for s in base_scored]
        figures["bits per byte, baseline"] = bits_figure(losses, [d.num_bytes for d in base_read], config.seed)
        units["loss_baseline_nats"] = losses
        if "bytes_seeing" in units and baseline.tokenizer.fingerprint == opened.tokenizer.fingerprint:
            _add_seeing("baseline", base_scored, seeing, figures, units, config.seed)
    _add_differences(units, figures, config.seed)
    curves: dict[str, Curve] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    if config.sweep:
        ks = sorted({config.num_neighbors, *config.sweep})
        swept = [by_mode["on"] if k == config.num_neighbors and "on" in by_mode else scored_by("on", k) for k in ks]
        values = tuple(bits_per_byte(scored, read) for scored in swept)
        curves["Number of neighbors"] = Curve(
            x_label="neighbors of a chunk", y_label="bits per byte", x=tuple(ks), series={"retrieval on": values}
        )
    if config.overlap:
        if baseline is not None and baseline.tokenizer.fingerprint != opened.tokenizer.fingerprint:
            raise MismatchError(
                "the overlap curve of a baseline needs the same tokenizer: its chunks are others otherwise"
            )
        title = "Allowed overlap of a chunk and its neighbors"
        curves[title], table = _overlap(read, by_mode, base_scored, config, M)
        rows |= {title: table} if table else {}
    if last_word_texts:
        hits = last_word_hits(
            opened.model,
            opened.tokenizer,
            last_words(last_word_texts),
            retriever=retriever if "on" in config.modes else None,
            num_neighbors=config.num_neighbors,
            neighbor_len=config.neighbor_len,
        )
        low, high = bootstrap_mean(np.array(hits, float), seed=config.seed)
        figures["last words found"] = Figure(
            value=100 * float(np.mean(hits)), unit="%", low=100 * low, high=100 * high, count=len(hits)
        )
    record = Record(
        kind="lm",
        name=opened.name,
        figures=figures,
        curves=curves,
        rows=rows,
        configuration=asdict(config)
        | {"documents": len(read), "baseline": None if baseline is None else baseline.name},
        fingerprints={"model": opened.fingerprint, "tokenizer": opened.tokenizer.fingerprint}
        | ({} if baseline is None else {"baseline": baseline.fingerprint}),
        notes=_notes(config, read),
        seed=config.seed,
        seconds=round(time.monotonic() - began, 3),
    )
    return record, units


def _check(opened: Opened, config: LmConfig, retriever: Retriever | None) -> None:
    if not opened.retrieves and set(config.modes) != {"off"}:
        raise ConfigError(f"{opened.name} was made without retrieval: measure it with --modes off")
    if config.looked_up and retriever is None:
        raise ConfigError("neighbors are needed: name an index with --index, or measure with --modes off")


def _add_mode(
    mode: Mode,
    scored: list[Scored],
    read: list[EvalDocument],
    seeing: list[NDArray[np.bool_]],
    figures: dict[str, Figure],
    units: dict[str, list[Any]],
    seed: int,
) -> None:
    losses = [float(s.loss_n.sum()) for s in scored]
    units[f"loss_{mode}_nats"] = losses
    figures[f"bits per byte, retrieval {mode}"] = bits_figure(losses, units["bytes"], seed)
    if mode in ("on", "off"):
        for name, value in perplexities(scored, read).items():
            figures[f"perplexity {name}, retrieval {mode}"] = Figure(value=value, unit="", count=len(read))
    if "bytes_seeing" in units:
        _add_seeing(mode, scored, seeing, figures, units, seed)


def _add_seeing(
    mode: Mode | Literal["baseline"],
    scored: list[Scored],
    seeing: list[NDArray[np.bool_]],
    figures: dict[str, Figure],
    units: dict[str, list[Any]],
    seed: int,
) -> None:
    """The same tokens for all, whether this one reads neighbors or not."""
    seen = [float(s.loss_n[which].sum()) for s, which in zip(scored, seeing, strict=True)]
    units[f"loss_{mode}_seeing_nats"] = seen
    name = mode if mode == "baseline" else f"retrieval {mode}"
    figures[f"bits per byte, {name}, tokens that can see neighbors"] = bits_figure(seen, units["bytes_seeing"], seed)


def _bytes_of(document: EvalDocument, which_n: NDArray[np.bool_], M: int) -> float:
    """Bytes of some tokens: of each chunk's by their share."""
    shares_c = chunk_sums(which_n.astype(float), M) / np.maximum(chunk_sums(np.ones(len(which_n)), M), 1)
    return float((document.chunk_bytes * shares_c).sum())


def _add_differences(units: dict[str, list[Any]], figures: dict[str, Figure], seed: int) -> None:
    """Retrieval on against the others, document by document, in percent of the other's bits per byte."""
    if "loss_on_nats" not in units or len(units["id"]) < 2:
        return
    for other in ("off", "shuffled", "baseline"):
        for seeing in ("", "_seeing"):
            first, second = units.get(f"loss_on{seeing}_nats"), units.get(f"loss_{other}{seeing}_nats")
            if first is None or second is None or not math.fsum(second):
                continue
            name = f"retrieval on against {other}" + (", tokens that can see neighbors" if seeing else "")
            figures[name] = change_figure(first, second, seed)


def change_figure(first: Sequence[float], second: Sequence[float], seed: int) -> Figure:
    """Losses of one system against another's of the same documents, in percent of the other's, with the interval over documents."""
    found = paired_bootstrap(np.array(first), np.array(second), np.array(second), seed=seed)
    return Figure(value=100 * found.value, unit="%", low=100 * found.low, high=100 * found.high, count=len(first))


def bits_figure(losses: Sequence[float], sizes: Sequence[float], seed: int) -> Figure:
    """Bits per byte of losses in nats and of bytes, with the interval over documents."""
    value = math.fsum(losses) / math.log(2) / max(math.fsum(sizes), 1e-12)
    if len(losses) < 2:
        return Figure(value=value, unit="bits per byte", count=len(losses))
    low, high = bootstrap_ratio(np.array(losses), np.array(sizes, float), seed=seed)
    return Figure(value=value, unit="bits per byte", low=low / math.log(2), high=high / math.log(2), count=len(losses))


def _score_baseline(
    baseline: Opened | None,
    documents: Sequence[Document],
    window: Window,
    config: LmConfig,
    progress: Progress | None,
) -> tuple[list[EvalDocument], list[Scored]]:
    if baseline is None:
        return [], []
    read = read_eval_documents(documents, baseline.tokenizer, baseline.model.chunk_len, retriever=None, num_neighbors=0)
    scored = score(baseline.model, read, mode="off", window=window, batch_size=config.batch_size, progress=progress)
    return read, scored


def _overlap(
    read: list[EvalDocument], by_mode: dict[Mode, list[Scored]], base_scored: list[Scored], config: LmConfig, M: int
) -> tuple[Curve, list[dict[str, Any]]]:
    """Equation 5 of the paper: each chunk counts where it overlaps at most so much with its own 10 best neighbors.

    Returns:
        The curve, and a table of its values with their intervals and what retrieval on adds to the others.
    """
    chunks, neighbors, sizes, keys = [], [], [], []
    losses: dict[str, list[float]] = {f"retrieval {mode}": [] for mode in by_mode}
    if base_scored:
        losses["baseline"] = []
    for number, document in enumerate(read):
        for chunk in range(len(document.chunk_bytes)):
            chunks.append(document.ids[max(chunk * M, 1) : (chunk + 1) * M])
            found = document.neighbors[chunk] if chunk < len(document.neighbors) else ()
            neighbors.append([n.tokens("both")[: config.neighbor_len] for n in found[:10]])
            keys.append(document.key)
        sizes += document.chunk_bytes.tolist()
        for mode, scored in by_mode.items():
            losses[f"retrieval {mode}"] += chunk_sums(scored[number].loss_n, M).tolist()
        if base_scored:
            losses["baseline"] += chunk_sums(base_scored[number].loss_n, M).tolist()
    loss_N = {name: np.array(values) for name, values in losses.items()}
    bytes_N, overlap_N = np.array(sizes), chunk_overlaps(chunks, neighbors)
    series = {name: overlap_curve(values, bytes_N, overlap_N, THRESHOLDS) for name, values in loss_N.items()}
    curve = Curve(
        x_label="longest run of tokens in common, share of the chunk",
        y_label="bits per byte",
        x=THRESHOLDS,
        series=series,
    )
    if len(read) < 2:
        return curve, []
    rows: list[dict[str, Any]] = [
        {"allowed overlap": allowed, "chunks": int((overlap_N <= np.float32(allowed)).sum())} for allowed in THRESHOLDS
    ]
    for name, values in loss_N.items():
        ends = overlap_intervals(values, bytes_N, overlap_N, keys, THRESHOLDS, seed=config.seed)
        for row, value, pair in zip(rows, series[name], ends, strict=True):
            row |= {name: value, f"{name}, from": pair and pair[0], f"{name}, to": pair and pair[1]}
    for other in ("retrieval off", "baseline"):
        if "retrieval on" not in loss_N or other not in loss_N:
            continue
        found_T = overlap_differences(
            loss_N["retrieval on"], loss_N[other], bytes_N, overlap_N, keys, THRESHOLDS, seed=config.seed
        )
        for row, difference in zip(rows, found_T, strict=True):
            name = f"on less {other}"
            ends_of = (None, None, None) if difference is None else (difference.value, difference.low, difference.high)
            row |= dict(zip((name, f"{name}, from", f"{name}, to"), ends_of, strict=True))
    return curve, rows


def _notes(config: LmConfig, read: list[EvalDocument]) -> tuple[str, ...]:
    notes = ["Shuffled: with the neighbors of chunks of other documents; what is as good shuffled was not read."]
    if "oracle" in config.modes:
        notes.append("Oracle: the neighbor of each chunk is the chunk itself with its true continuation.")
    if not any(any(d.neighbors) for d in read) and config.looked_up:
        notes.append("No chunk had any neighbor: the documents are shorter than a chunk, or the index holds only them.")
    return tuple(notes)
