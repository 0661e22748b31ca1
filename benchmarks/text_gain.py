"""What neighbors are worth to a small language model on real text: examples/reader_text.toml, its baseline, and both measured.

    python benchmarks/text_gain.py enwiki_core_2015.jsonl.xz --out text [--articles 10000] [--limit 60]

Articles of the corpus (JSON lines of id, title, split, text) that have 1,500 characters or more are put in an order that their
ids give; of the split train the first `--articles` are the index and the first 1,500 of these are trained on; 40 of the split valid
watch the trainings, `--limit` of 120 of the split test are measured. The index is searched by BM25 alone, so its vectors, which an
index has to have, are the cheapest there are: means of 32 numbers for each token. Run again, it goes on.
"""

import argparse
import hashlib
import heapq
import json
import lzma
import subprocess
import sys
import time
from pathlib import Path

import torch

from retro.config import DEFAULT_ENCODER
from retro.pretrained_encoder import encoder_place

RECIPE = Path(__file__).parent.parent / "examples" / "reader_text.toml"
INIT = RECIPE.parent / "answers.model"
MIN_CHARS = 1500
TRAINED_ON = 1500
HELD_OUT = {"valid": 40, "test": 120}


def cut(corpus: Path, out: Path, articles: int) -> None:
    """Writes core.jsonl, which is indexed, and train.jsonl, valid.jsonl, test.jsonl."""
    wanted = {"train": articles, **HELD_OUT}
    heaps: dict[str, list[tuple[int, str]]] = {split: [] for split in wanted}
    with lzma.open(corpus, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if len(row["text"]) >= MIN_CHARS:
                # The smallest keys, of which a heap keeps the negatives.
                key = -int(hashlib.md5(("lm" + row["id"]).encode()).hexdigest(), 16)
                heap = heaps[row["split"]]
                (heapq.heappush if len(heap) < wanted[row["split"]] else heapq.heappushpop)(heap, (key, line))
    ordered = {split: [line for _, line in sorted(heap, reverse=True)] for split, heap in heaps.items()}
    files = {"core": ordered["train"], "train": ordered["train"][:TRAINED_ON], **{s: ordered[s] for s in HELD_OUT}}
    for name, lines in files.items():
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def make_encoder(folder: Path) -> None:
    """The default encoder's table of tokens, in its 32 main directions, as an encoder that takes no time."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from transformers import AutoModel

    place = Path(encoder_place(DEFAULT_ENCODER))
    table_VE = AutoModel.from_pretrained(place).get_input_embeddings().weight.detach().float()
    table_VE = table_VE - table_VE.mean(dim=0)
    directions_XE = torch.linalg.svd(table_VE, full_matrices=False).Vh[:32]
    tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    table_VX = (table_VE @ directions_XE.T).numpy()
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=table_VX)], device="cpu").save(
        str(folder)
    )


def retro(folder: Path, *arguments: str | Path) -> None:
    """Runs a command in a folder, with its time; what it says of itself is shown where it fails."""
    began = time.monotonic()
    command = [sys.executable, "-m", "retro", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True, check=False)
    print(f"{time.monotonic() - began:6.0f} s  retro {' '.join(map(str, arguments[:3]))}", file=sys.stderr)
    if done.returncode:
        sys.exit(done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="JSON lines of id, title, split and text, .xz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--articles", type=int, default=10_000, help="in the index")
    parser.add_argument("--limit", type=int, default=60, help="articles that are measured")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    cut_for = out / "articles.txt"
    if not cut_for.is_file():
        cut(options.corpus, out, options.articles)
        cut_for.write_text(str(options.articles), encoding="utf-8")
    if cut_for.read_text(encoding="utf-8") != str(options.articles):
        sys.exit(
            f"{out} was made with --articles {cut_for.read_text(encoding='utf-8')}: give the same, or another --out"
        )
    if not (out / "static").is_dir():
        make_encoder(out / "static")
    tokens = f"--tokenizer {DEFAULT_ENCODER}"
    retro(out, *f"index build core=core.jsonl --encoder static {tokens} --out core.index --device cpu".split())
    neighbors = "--index core.index --retriever bm25"
    retro(
        out,
        *f"data core=train.jsonl valid.jsonl {tokens} {neighbors} -k 2 --exclude-near-duplicates --out core.data".split(),
    )
    begin = f"--set train.init={INIT.resolve()} --set train.device=cpu".split()
    retro(out, "train", RECIPE.resolve(), *begin, "--out", "text.model")
    retro(out, "train", RECIPE.resolve(), *begin, "--out", "base.model", "--set", "model.cca_layers=[]")
    measured = f"-k 1 --baseline base.model --window 512 --stride 256 --overlap --limit {options.limit} --device cpu --out report"
    retro(out, *f"eval lm text.model test.jsonl {neighbors} {measured}".split())


if __name__ == "__main__":
    main()
