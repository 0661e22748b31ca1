"""Peak memory of a whole index build, stage by stage, above that of the encoder alone.

    python benchmarks/build_memory.py CORPUS... [--limit 20000] [--encoder NAME] [--deduplicate near] [--index-type auto] [--json]

Both in processes of their own, sampled every 10 ms. Anonymous memory is what a process holds; pages of memory maps (file-backed)
are shown beside it, for the system takes them back when it needs the room. The encoder's own is what a process has that opens it
and encodes 2,048 chunks of the corpus in batches as the build does. `--encoder small` takes a random network of one narrow layer
with the tokenizer and the 384 dimensions of the default, so that large corpora take minutes; no other stage is changed by that.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STAGES = {
    ("build", "read_stage"): "read and chunk",
    ("build", "encode_stage"): "encode",
    ("index", "train"): "train",
    ("index", "add_part"): "add",
    ("index", "merge_parts"): "merge",
    ("index", "tune"): "tune",
    ("build", "lexical_stage"): "BM25",
    ("build", "finish"): "checksums",
}
KINDS = {"RssAnon": "anonymous_bytes", "RssFile": "file_bytes"}
EVERY = 0.01


@dataclass(slots=True, kw_only=True)
class Stage:
    """What was seen of one stage, all its calls together."""

    seconds: float = 0.0
    peaks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS.values(), 0))


def memory(pid: int) -> dict[str, int]:
    """Resident bytes of a process by kind; none where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found = dict(line.split(":", 1) for line in lines)
    return {name: int(found[kind].split()[0]) * 1024 for kind, name in KINDS.items() if kind in found}


def watch(work: dict[str, Any]) -> dict[str, Stage]:
    """Runs `work` in a process of its own; its stages in the order in which they began."""
    stages: dict[str, Stage] = {}
    reader, writer = os.pipe()
    command = [sys.executable, __file__, "--work", json.dumps(work | {"pipe": writer})]
    with subprocess.Popen(command, pass_fds=[writer], stdout=subprocess.DEVNULL) as process:
        os.close(writer)
        os.set_blocking(reader, False)
        running, last = ["start"], time.monotonic()
        while process.poll() is None:
            with contextlib.suppress(BlockingIOError):
                for line in os.read(reader, 1 << 16).decode().split("\n")[:-1]:
                    running = running[:-1] if line == "end" else [*running, line]
            time.sleep(EVERY)
            now = time.monotonic()
            stage = stages.setdefault(running[-1], Stage())
            stage.seconds += now - last
            for name, value in memory(process.pid).items():
                stage.peaks[name] = max(stage.peaks[name], value)
            last = now
    os.close(reader)
    if process.returncode:
        raise SystemExit(process.returncode)
    return stages


# --- in the processes that are watched ------------------------------------------------------------------------------


def told(function: Callable[..., Any], name: str, pipe: Any) -> Callable[..., Any]:
    """The function, which says when it begins and ends."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        pipe.write(f"{name}\n")
        try:
            return function(*arguments, **options)
        finally:
            pipe.write("end\n")

    return call


def run(work: dict[str, Any]) -> None:
    """Opens and tries an encoder, or builds an index."""
    from index_builder import build, index
    from index_builder.config import BuildConfig
    from index_builder.corpus import ReadOptions, read_documents
    from retro.chunks import Document

    read = ReadOptions(limit=work["limit"], deduplicate=work["deduplicate"])
    config = BuildConfig(encoder=work["encoder"], index_type=work["index_type"], read=read)
    if work["out"] is None:
        encoder = build.open_encoder(config, "cpu")
        documents = (item for item in read_documents(work["corpora"], ReadOptions()) if isinstance(item, Document))
        parts = (d.text[i : i + 250] for d in documents for i in range(0, min(len(d.text), 2500), 250))
        encoder.encode(list(itertools.islice(parts, 2048)), role="document")
        return
    with os.fdopen(work["pipe"], "w", buffering=1) as pipe:
        for (module, name), stage in STAGES.items():
            place = {"build": build, "index": index}[module]
            setattr(place, name, told(getattr(place, name), stage, pipe))
        build.build_index(work["corpora"], work["out"], config, device="cpu")


def small_encoder(folder: Path) -> str:
    """A random sentence-transformers model of one layer with the default's tokenizer and dimensions."""
    import sentence_transformers
    import torch
    import transformers
    from sentence_transformers.sentence_transformer import modules

    from index_builder.encoder import Encoder
    from retro.config import DEFAULT_ENCODER

    default = Encoder.open(DEFAULT_ENCODER)
    tokenizer = transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=default.tokenizer().backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    network = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertModel(network).save_pretrained(folder / "network")
    tokenizer.save_pretrained(folder / "network")
    model = sentence_transformers.SentenceTransformer(
        modules=[
            modules.Transformer(str(folder / "network"), max_seq_length=default.max_length),
            modules.Pooling(32),
            modules.Dense(32, default.dim),
            modules.Normalize(),
        ]
    )
    model.save(str(folder / "small"))
    return str(folder / "small")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", nargs="*", metavar="CORPUS")
    parser.add_argument("--limit", type=int, default=0, help="documents; 0 means all")
    parser.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2", help="or small")
    parser.add_argument("--deduplicate", default="none", choices=["none", "exact", "near"])
    parser.add_argument("--index-type", default="auto")
    parser.add_argument("--out", help="keep the index here; otherwise it is deleted")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        run(json.loads(options.work))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = {
            "corpora": options.corpora,
            "limit": options.limit or None,
            "encoder": small_encoder(Path(folder)) if options.encoder == "small" else options.encoder,
            "deduplicate": options.deduplicate,
            "index_type": options.index_type,
        }
        alone = {name: max(s.peaks[name] for s in watch(work | {"out": None}).values()) for name in KINDS.values()}
        out = Path(options.out or f"{folder}/x.index")
        stages = watch(work | {"out": str(out)})
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    report = {
        "documents": manifest["documents"],
        "chunks": manifest["chunks"],
        "index": manifest["index"]["factory"],
        "encoder_alone": alone,
        "stages": {name: {"seconds": round(s.seconds, 1)} | s.peaks for name, s in stages.items()},
    }
    if options.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return
    own = alone["anonymous_bytes"]
    lines = [f"{report['documents']:,} documents, {report['chunks']:,} chunks, {report['index']}; GiB"]
    lines.append(f"{'':16}{'seconds':>10}{'anonymous':>12}{'above the encoder':>20}{'file-backed':>14}")
    lines.append(f"{'encoder alone':16}{'':10}{own / 2**30:12.2f}{'':20}{alone['file_bytes'] / 2**30:14.2f}")
    for name, s in stages.items():
        held, mapped = s.peaks["anonymous_bytes"], s.peaks["file_bytes"]
        lines.append(
            f"{name:16}{s.seconds:10.1f}{held / 2**30:12.2f}{(held - own) / 2**30:20.2f}{mapped / 2**30:14.2f}"
        )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
