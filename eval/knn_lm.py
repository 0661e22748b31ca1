"""The kNN-LM (Khandelwal et al. 2020, arXiv:1911.00172): a decoder whose next-token distribution is mixed with that of its own
states' nearest neighbors, so that it and RETRO can be compared on one corpus.

A datastore holds, for each token of a corpus, the decoder's final activations before it as key and the token as value. It is

    X.datastore/
      keys/00000.npy      float16 [n, D]         values/00000.npy   int32 [n]
      index/              as in an index of chunks
      manifest.json

On purpose different from the paper: keys are the final normed activations, not the input of the last feed-forward.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eval.language_modeling import EvalDocument, Floats, Window, losses_of, read_eval_documents, states
from eval.lm_record import Opened, bits_figure, change_figure
from eval.records import Curve, Figure, Record
from index_builder.build import index_stage
from index_builder.config import BuildConfig
from index_builder.index import VectorIndex, Vectors
from index_builder.shards import Progress
from retro.artifact import begin, fingerprint, finish, read_manifest, writing
from retro.chunks import Document, load_array, save_array, shard_path
from retro.errors import ConfigError, MismatchError

logger = logging.getLogger(__name__)

KIND = "datastore"
_SHARD = 65_536
_QUERIES = 1024
TEMPERATURES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
SHARES = (0.0, 0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnConfig:
    """How the two distributions are mixed."""

    num_neighbors: int = 64
    """Keys that are looked up for each token."""
    share: float = 0.25
    """Of the neighbors' distribution (lambda)."""
    temperature: float = 1.0
    """What squared distances are divided by before the softmax."""
    window: int = 512
    """Slots that the model sees at once."""
    stride: int = 256
    """Slots from one window to the next."""
    seed: int = 0
    """Of the intervals."""

    def __post_init__(self) -> None:
        if self.num_neighbors < 1 or not self.temperature > 0:
            raise ConfigError("num_neighbors and temperature must be above 0")
        if not 0 <= self.share < 1:
            raise ConfigError(f"share = {self.share}: give a number of at least 0 and below 1")


class Datastore:
    """States and next tokens of a corpus, searchable."""

    def __init__(self, folder: Path) -> None:
        """Opens a finished one.

        Raises:
            FormatError: It is missing, unfinished or damaged.
        """
        self.manifest = read_manifest(folder, KIND)
        keys = [load_array(path) for path in sorted((folder / "keys").glob("*.npy"))]
        self.values_N = np.concatenate([load_array(path) for path in sorted((folder / "values").glob("*.npy"))])
        self.index = VectorIndex.open(folder / "index", Vectors(keys), self.manifest["index"])

    def __len__(self) -> int:
        return len(self.values_N)

    def search(self, hidden_QD: NDArray[np.float32], k: int) -> tuple[Floats, NDArray[np.int64]]:
        """Squared distances, nearest first, and tokens [Q, k]; infinity and -1 where there is no further key."""
        scores_QK, rows_QK = self.index.search(hidden_QD, k)
        tokens_QK = np.where(rows_QK >= 0, self.values_N[np.maximum(rows_QK, 0)], -1).astype(np.int64)
        return -scores_QK.astype(np.float64), tokens_QK


def build_datastore(
    opened: Opened,
    documents: Sequence[Document],
    folder: Path,
    *,
    window: Window,
    index_type: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Datastore:
    """Makes the datastore of a corpus, or opens it where the same was made before.

    Args:
        opened: The decoder; retrieval stays off.
        documents: The corpus.
        folder: Of the datastore.
        window: How the decoder sees long documents.
        index_type: As of an index of chunks.
        overwrite: Start again where something else is there.
        progress: Told how far it is.

    Raises:
        ConfigError: There is no text, or something else was begun in the folder.
    """
    recipe = {
        "model": opened.fingerprint,
        "documents": fingerprint([[document.key, document.content_hash] for document in documents]),
        "window": asdict(window),
        "index_type": index_type,
    }
    with writing(folder):
        if begin(folder, KIND, recipe, overwrite=overwrite):
            return Datastore(folder)
        read = read_eval_documents(documents, opened.tokenizer, opened.model.chunk_len, retriever=None, num_neighbors=0)
        keys: list[NDArray[np.float16]] = []
        values: list[NDArray[np.int32]] = []
        shard, held = 0, 0

        def write() -> None:
            nonlocal shard, held
            if held:
                save_array(shard_path(folder / "keys", shard, ".npy"), np.concatenate(keys))
                save_array(shard_path(folder / "values", shard, ".npy"), np.concatenate(values))
                shard, held = shard + 1, 0
                keys.clear()
                values.clear()

        for _, _, hidden_tD, targets_t in states(opened.model, read, window, progress=progress):
            keys.append(hidden_tD.float().cpu().numpy().astype(np.float16))
            values.append(targets_t.cpu().numpy().astype(np.int32))
            held += len(targets_t)
            if held >= _SHARD:
                write()
        write()
        vectors = Vectors([load_array(path) for path in sorted((folder / "keys").glob("*.npy"))])
        description = index_stage(
            folder, "index", vectors, BuildConfig(index_type=index_type), normalized=False, progress=progress
        )
        finish(folder, KIND, recipe, {"index": description, "tokens": len(vectors)})
    return Datastore(folder)


def mixed_losses(
    loss_N: Floats,
    distances_NK: Floats,
    tokens_NK: NDArray[np.int64],
    targets_N: NDArray[np.int64],
    share: float,
    temperature: float,
) -> Floats:
    """-log of the mixed probability of each target, in nats.

    Args:
        loss_N: -log of the decoder's own.
        distances_NK: Squared distances of the nearest keys; infinity for none.
        tokens_NK: Their values.
        targets_N: The tokens that came.
        share: Of the neighbors (lambda); where a token has none, the decoder's distribution stands alone.
        temperature: See KnnConfig.

    Source: arXiv:1911.00172, equations 2 and 3.
    """
    logits_NK = -distances_NK / temperature
    highest_N = logits_NK.max(axis=1)
    there_N = np.isfinite(highest_N)
    weights_NK = np.exp(logits_NK - np.where(there_N, highest_N, 0.0)[:, None])
    weights_NK[~np.isfinite(distances_NK)] = 0.0
    total_N = weights_NK.sum(axis=1)
    p_knn_N = (weights_NK * (tokens_NK == targets_N[:, None])).sum(axis=1) / np.where(total_N > 0, total_N, 1.0)
    p_N = (1 - share) * np.exp(-loss_N) + share * p_knn_N
    with np.errstate(divide="ignore"):
        mixed_N = -np.log(p_N)
    # Where the decoder's probability is too small for exp, its own loss still says how small.
    far_N = loss_N > 700
    mixed_N = np.where(far_N & (p_knn_N == 0), loss_N - math.log(1 - share), mixed_N)
    return np.asarray(np.where(there_N, mixed_N, loss_N))


@torch.inference_mode()
def measure_knn_lm(
    opened: Opened,
    documents: Sequence[Document],
    datastore: Datastore,
    config: KnnConfig,
    *,
    tuning: Sequence[Document] = (),
    progress: Progress | None = None,
) -> tuple[Record, dict[str, list[Any]]]:
    """Bits per byte of a decoder with and without its datastore.

    Args:
        opened: The decoder that the datastore was made by.
        documents: To measure on; none of the datastore's own.
        datastore: See above.
        config: See KnnConfig.
        tuning: Other documents, on which share and temperature are chosen instead; empty: those of `config` hold.
        progress: Told how far it is.

    Raises:
        MismatchError: The datastore is of another model.
        ConfigError: There is no text.
    """
    began = time.monotonic()
    if datastore.manifest["recipe"]["model"] != opened.fingerprint:
        raise MismatchError(
            f"the datastore was made by another model ({datastore.manifest['recipe']['model']}) than {opened.name} "
            f"({opened.fingerprint}): make it again with this one (--overwrite)"
        )
    share, temperature = config.share, config.temperature
    curves: dict[str, Curve] = {}
    if tuning:
        share, temperature, curve = _tuned(_looked_up(opened, tuning, datastore, config, progress)[1], datastore)
        curves["Share of the neighbors, on the documents for tuning"] = curve
    read, rows = _looked_up(opened, documents, datastore, config, progress)
    number_N, loss_N, distances_NK, tokens_NK, targets_N = rows
    mixed_N = mixed_losses(loss_N, distances_NK, tokens_NK, targets_N, share, temperature)
    units: dict[str, list[Any]] = {
        "id": [document.key for document in read],
        "bytes": [document.num_bytes for document in read],
        "loss_off_nats": np.bincount(number_N, weights=loss_N, minlength=len(read)).tolist(),
        "loss_on_nats": np.bincount(number_N, weights=mixed_N, minlength=len(read)).tolist(),
    }
    figures = {}
    for name, column in (("kNN-LM", "loss_on_nats"), ("decoder alone", "loss_off_nats")):
        figures[f"bits per byte, {name}"] = bits_figure(units[column], units["bytes"], config.seed)
    for name, column in (("kNN-LM", "loss_on_nats"), ("decoder alone", "loss_off_nats")):
        figures[f"perplexity per token, {name}"] = Figure(
            value=math.exp(min(math.fsum(units[column]) / len(loss_N), 700)), unit="", count=len(read)
        )
    if len(read) > 1:
        figures["kNN-LM against the decoder alone"] = change_figure(
            units["loss_on_nats"], units["loss_off_nats"], config.seed
        )
    record = Record(
        kind="knn-lm",
        name=opened.name,
        figures=figures,
        curves=curves,
        configuration=asdict(config)
        | {"share": share, "temperature": temperature, "documents": len(read), "keys": len(datastore)},
        fingerprints={"model": opened.fingerprint, "datastore": datastore.manifest["recipe"]["documents"]},
        notes=("Keys are the decoder's final normed activations; neighbors by squared Euclidean distance.",),
        seed=config.seed,
        seconds=round(time.monotonic() - began, 3),
    )
    return record, units


_Rows = tuple[NDArray[np.int64], Floats, Floats, NDArray[np.int64], NDArray[np.int64]]
"""Of each token: its document, the decoder's loss, distances and values of its nearest keys, and itself."""


def _looked_up(
    opened: Opened, documents: Sequence[Document], datastore: Datastore, config: KnnConfig, progress: Progress | None
) -> tuple[list[EvalDocument], _Rows]:
    read = read_eval_documents(documents, opened.tokenizer, opened.model.chunk_len, retriever=None, num_neighbors=0)
    window = Window(length=config.window, stride=config.stride)
    numbers, losses, distances, tokens, targets = [], [], [], [], []
    for number, _, hidden_tD, targets_t in states(opened.model, read, window, progress=progress):
        loss_t, _ = losses_of(opened.model, hidden_tD, targets_t)
        for first in range(0, len(targets_t), _QUERIES):
            few = hidden_tD[first : first + _QUERIES].float().cpu().numpy()
            found = datastore.search(few, config.num_neighbors)
            distances.append(found[0])
            tokens.append(found[1])
        numbers.append(np.full(len(targets_t), number))
        losses.append(loss_t)
        targets.append(targets_t.cpu().numpy())
    return read, (
        np.concatenate(numbers),
        np.concatenate(losses),
        np.concatenate(distances),
        np.concatenate(tokens),
        np.concatenate(targets),
    )


def _tuned(rows: _Rows, datastore: Datastore) -> tuple[float, float, Curve]:
    """The share and temperature of the lowest loss, and the losses over the share at the best temperature."""
    _, loss_N, distances_NK, tokens_NK, targets_N = rows
    means = {
        (share, temperature): float(mixed_losses(loss_N, distances_NK, tokens_NK, targets_N, share, temperature).mean())
        for share in SHARES
        for temperature in TEMPERATURES
    }
    share, temperature = min(means, key=lambda pair: means[pair])
    logger.info("%d keys: share %s, temperature %s", len(datastore), share, temperature)
    values = tuple(means[s, temperature] for s in SHARES)
    curve = Curve(
        x_label="share of the neighbors' distribution",
        y_label="nats per token",
        x=SHARES,
        series={f"temperature {temperature:g}": values},
    )
    return share, temperature, curve
