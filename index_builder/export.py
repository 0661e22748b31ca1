"""An index as one Parquet file, for any vector store."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from index_builder.build import open_vectors
from index_builder.search import Snapshot
from index_builder.shards import Progress
from retro.artifact import write_atomically
from retro.errors import ConfigError


def export_parquet(folder: Path, out: Path, *, overwrite: bool = False, progress: Progress | None = None) -> int:
    """Writes every chunk that was not removed: row, key, title, url, split, metadata, first and end character, text,
    vector (float16).

    One row group a shard, so that memory is bounded by the shard.

    Returns:
        The number of chunks written.

    Raises:
        FormatError: There is no finished index.
        ConfigError: The file is there already, without `overwrite`.
        StorageError: It cannot be written.
    """
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} is there already: choose another --out, or --overwrite")
    now = Snapshot.open(folder)
    store, dim = now.store, now.index.dim
    texts = ("key", "title", "url", "split", "metadata")
    schema = pa.schema(
        [
            ("row", pa.int64()),
            *((name, pa.large_string()) for name in texts),
            ("start", pa.int64()),
            ("end", pa.int64()),
            ("text", pa.large_string()),
            ("vector", pa.list_(pa.float16(), dim)),
        ],
        metadata={"encoder": str(now.manifest["encoder"]["name"]), "metric": str(now.manifest["index"]["metric"])},
    )
    vectors = open_vectors(folder, store.shards)
    written = 0

    def write(file: object) -> None:
        nonlocal written
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for shard in range(len(store.shards)):
                rows = np.arange(store.first_row[shard], store.first_row[shard + 1])
                owners, spans, chunks = [], [], []
                for entry, (document, spans_N2) in enumerate(store.shard_documents(shard)):
                    owners += [entry] * len(spans_N2)
                    spans.append(spans_N2)
                    chunks += [document.text[start:end] for start, end in spans_N2.tolist()]
                alive = np.ones(len(rows), np.bool_) if store.dead_N is None else ~store.dead_N[rows]
                spans_N2 = np.concatenate([np.empty((0, 2), np.int64), *spans])
                owned = store.tables[shard].select(texts).take(pa.array(owners, pa.int64()))
                flat = vectors.gather(rows).astype(np.float16).reshape(-1)
                columns = [
                    pa.array(rows),
                    *(owned[name] for name in texts),
                    pa.array(spans_N2[:, 0]),
                    pa.array(spans_N2[:, 1]),
                    pa.array(chunks, pa.large_string()),
                    pa.FixedSizeListArray.from_arrays(pa.array(flat), dim),
                ]
                table = pa.table(columns, schema=schema).filter(pa.array(alive))
                writer.write_table(table)
                written += len(table)
                if progress is not None:
                    progress("export", written, store.num_live_chunks)

    write_atomically(out, write)
    return written
