"""The commands that make and use an index: `retro index`, `retro data`, `retro tokenizer`, `retro plan`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retro.terminal import (
    SETTINGS,
    AsJson,
    Corpora,
    Device,
    IdField,
    IndexFolder,
    Limit,
    MaxChars,
    Method,
    OnError,
    Overwrite,
    QuestionMethod,
    Seed,
    TextField,
    TitleField,
    Where,
    bars,
    choice,
    parse_bytes,
    passage_json,
    print_json,
    print_passages,
    print_report,
    resolve_devices,
)

if TYPE_CHECKING:
    from index_builder.search import IndexRetriever

index_app = typer.Typer(help="Build, search, change and check an index.", **SETTINGS)
tokenizer_app = typer.Typer(help="Train a tokenizer.", **SETTINGS)
plan_app = typer.Typer(help="Sizes, memory and time before anything is started.", **SETTINGS)

Deduplicate = Annotated[
    str,
    typer.Option(
        help="none; exact: leave out texts that came before; near: also those that share 80% of their 13-grams."
    ),
]
ModelTokenizer = Annotated[str, typer.Option(help="Of the model: a folder, a tokenizer.json, or a name on the hub.")]
HeldOut = Annotated[float, typer.Option(help="Held out where documents name no split.")]
MaxMemory = Annotated[str | None, typer.Option(help="What the vector index may take when it is searched, as in 8GiB.")]


# --- build --------------------------------------------------------------------------------------------------------


@index_app.command("build")
def index_build(
    corpora: Corpora,
    out: Annotated[Path, typer.Option(help="Folder of the index.")],
    encoder: Annotated[str, typer.Option(help="A sentence-transformers model: folder or name on the hub.")] = "",
    revision: Annotated[str | None, typer.Option(help="Revision of the encoder on the hub.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16: how the encoder computes.")] = "auto",
    backend: Annotated[str, typer.Option(help="torch, or openvino, which is faster on CPUs: what encodes.")] = "torch",
    max_length: Annotated[int | None, typer.Option(help="Tokens of a text the encoder reads [its own limit].")] = None,
    query_prompt: Annotated[str | None, typer.Option(help="Put before questions [the encoder's own].")] = None,
    document_prompt: Annotated[str | None, typer.Option(help="Put before chunks [the encoder's own].")] = None,
    normalize: Annotated[bool | None, typer.Option(help="Scale vectors to length 1 [as the encoder does].")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with an encoder of the hub.")] = False,
    tokenizer: Annotated[str | None, typer.Option(help="Whose tokens a chunk counts [the encoder's].")] = None,
    chunk_len: Annotated[int, typer.Option(help="Tokens of a chunk.")] = 64,
    title_in_key: Annotated[bool, typer.Option(help="Put the title in front of stored chunks when encoding.")] = False,
    index_type: Annotated[str, typer.Option(help="auto, or a factory string of FAISS.")] = "auto",
    max_memory: MaxMemory = None,
    recall: Annotated[float, typer.Option(help="Recall@10 that an approximate index is tuned to.")] = 0.95,
    lexical: Annotated[
        str, typer.Option(help="Language of the BM25 index, none (words as they are) or off.")
    ] = "english",
    deduplicate: Deduplicate = "none",
    shard_chars: Annotated[int, typer.Option(help="Characters of a shard, the unit of resuming.")] = 2_000_000,
    text_field: TextField = "text",
    id_field: IdField = "id",
    title_field: TitleField = "title",
    vectors_field: Annotated[
        str | None, typer.Option(help="Field with a vector made elsewhere; a record is then one chunk.")
    ] = None,
    limit: Limit = None,
    on_error: OnError = "stop",
    max_document_chars: MaxChars = 10_000_000,
    shard: Annotated[str | None, typer.Option(help="i/n: make part i of n (from 0), for `retro index merge`.")] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="auto, or the address of a Ray cluster that shares this folder.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Check everything, measure a sample, print the plan, and stop.")
    ] = False,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Turn a corpus into a searchable index; run again, an interrupted build goes on.

    \b
    Examples:
      retro index build wiki.jsonl --out wiki.index
      retro index build wiki.jsonl --out large.index --max-memory 2GiB --dry-run
      retro index build wiki.jsonl --out part0.index --shard 0/2
    """
    from index_builder.config import BuildConfig
    from retro.config import DEFAULT_ENCODER

    config = BuildConfig(
        encoder=encoder or DEFAULT_ENCODER,
        revision=revision,
        dtype=choice(dtype, ("auto", "float32", "bfloat16", "float16"), "--dtype"),
        backend=choice(backend, ("torch", "openvino"), "--backend"),
        max_length=max_length,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
        normalize=normalize,
        trust_remote_code=trust_remote_code,
        tokenizer=tokenizer,
        chunk_len=chunk_len,
        title_in_key=title_in_key,
        index_type=index_type,
        max_memory=None if max_memory is None else parse_bytes(max_memory),
        recall=recall,
        lexical=lexical,
        shard_chars=shard_chars,
        read=_read_options(
            text_field, id_field, title_field, limit, on_error, max_document_chars, deduplicate, vectors_field
        ),
    )
    devices = resolve_devices(device)
    if dry_run:
        from index_builder.plan import measure_build

        with bars() as progress:
            plan = measure_build(corpora, out, config, device=devices, progress=progress)
        print_report(plan.report(), as_json)
        return
    if ray_address is not None:
        if shard is not None:
            raise typer.BadParameter("give --shard or --ray-address, not both", param_hint="--shard")
        from index_builder.cluster import build_on_cluster

        with bars() as progress:
            manifest = build_on_cluster(
                corpora, out, config, address=ray_address, device=devices, overwrite=overwrite, progress=progress
            )
    else:
        from index_builder.build import build_index

        part = None if shard is None else _part(shard)
        with bars() as progress:
            manifest = build_index(
                corpora, out, config, part=part, device=devices, overwrite=overwrite, progress=progress
            )
        if part is not None:
            typer.echo(f"{out}: part {part[0]} of {part[1]}; merge all parts with `retro index merge`")
            return
    _show_index(out, manifest, as_json)


@index_app.command("merge")
def index_merge(
    parts: Annotated[list[Path], typer.Argument(help="All parts that --shard i/n made.", metavar="PART...")],
    out: Annotated[Path, typer.Option(help="Folder of the index.")],
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make one index of the parts that were built on several machines: the same bytes as one build makes.

    \b
    Example:
      retro index merge part0.index part1.index --out merged.index
    """
    from index_builder.build import merge_index

    with bars() as progress:
        manifest = merge_index(parts, out, device=resolve_devices(device), overwrite=overwrite, progress=progress)
    _show_index(out, manifest, as_json)


# --- use ----------------------------------------------------------------------------------------------------------


@index_app.command("search")
def index_search(
    index: IndexFolder,
    query: Annotated[str, typer.Argument(help="A question, or any text.")],
    k: Annotated[int, typer.Option("-k", help="Passages to show.")] = 5,
    method: QuestionMethod = "auto",
    where: Where = None,
    role: Annotated[
        str, typer.Option(help="query for a question, document for a text like the stored ones.")
    ] = "query",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Show the best passages, by meaning, by words or by both.

    \b
    Examples:
      retro index search wiki.index "When did the 1973 oil crisis begin?" -k 5 --json
      retro index search wiki.index "oil embargo" --retriever dense --where 'title != "1973 oil crisis"'
    """
    choice(role, ("query", "document"), "--role")
    retriever = open_retriever(index, resolve_devices(device), method)
    started = time.perf_counter()
    passages = retriever.retrieve([query], k, role="query" if role == "query" else "document", where=where)[0]
    seconds = time.perf_counter() - started
    if as_json:
        print_json({"query": query, "seconds": round(seconds, 4), "results": [passage_json(p) for p in passages]})
        return
    print_passages(passages)


@index_app.command("info")
def index_info(index: IndexFolder, as_json: AsJson = False) -> None:
    """Show what an index holds, how it was made and how well it finds.

    \b
    Example:
      retro index info wiki.index
    """
    from retro.artifact import read_manifest

    _show_index(index, read_manifest(index, "index"), as_json)


@index_app.command("verify")
def index_verify(index: IndexFolder, as_json: AsJson = False) -> None:
    """Compare every byte of an index with its checksums; exit code 1 where something differs.

    \b
    Example:
      retro index verify wiki.index
    """
    from index_builder.build import verify_index

    problems = verify_index(index)
    if as_json:
        print_json({"index": str(index), "intact": not problems, "problems": problems})
    else:
        typer.echo("\n".join(problems) if problems else f"{index} is intact")
    if problems:
        raise typer.Exit(1)


@index_app.command("export")
def index_export(
    index: IndexFolder,
    out: Annotated[Path, typer.Option(help="The file to write.")],
    format_: Annotated[str, typer.Option("--format", help="parquet.")] = "parquet",
    overwrite: Overwrite = False,
) -> None:
    """Write keys, texts, metadata and vectors of all chunks to one file that any vector store can read.

    \b
    Example:
      retro index export wiki.index --format parquet --out wiki.parquet
    """
    from index_builder.export import export_parquet

    choice(format_, ("parquet",), "--format")
    with bars() as progress:
        rows = export_parquet(index, out, overwrite=overwrite, progress=progress)
    typer.echo(f"{out}: {rows:,} chunks")


# --- change -------------------------------------------------------------------------------------------------------


@index_app.command("add")
def index_add(index: IndexFolder, corpora: Corpora, device: Device = "auto", as_json: AsJson = False) -> None:
    """Add documents; the next search finds them. A key that is there already is an error.

    \b
    Example:
      retro index add wiki.index news.jsonl
    """
    from index_builder.live import add_documents

    _leave_room_for_searches()
    with bars() as progress:
        _show_changes(add_documents(index, corpora, device=resolve_devices(device), progress=progress), as_json)


@index_app.command("update")
def index_update(index: IndexFolder, corpora: Corpora, device: Device = "auto", as_json: AsJson = False) -> None:
    """Add documents, replacing those with the same keys whose contents differ.

    \b
    Example:
      retro index update wiki.index corrected.jsonl
    """
    from index_builder.live import add_documents

    _leave_room_for_searches()
    with bars() as progress:
        changes = add_documents(index, corpora, update=True, device=resolve_devices(device), progress=progress)
    _show_changes(changes, as_json)


@index_app.command("remove")
def index_remove(
    index: IndexFolder,
    keys: Annotated[list[str], typer.Argument(help="Keys of documents, CORPUS:ID.", metavar="KEY...")],
    as_json: AsJson = False,
) -> None:
    """Remove documents; the next search finds them no more.

    \b
    Example:
      retro index remove wiki.index wiki:1973_oil_crisis-0
    """
    from index_builder.live import remove_documents

    _show_changes(remove_documents(index, keys), as_json)


@index_app.command("sync")
def index_sync(
    index: IndexFolder,
    source: Annotated[str, typer.Argument(help="The folder or file to follow.", metavar="FOLDER")],
    delete: Annotated[bool, typer.Option("--delete", help="Remove documents that are no longer there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")] = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Make an index follow a folder: only new and changed documents are encoded.

    \b
    Example:
      retro index sync docs.index docs --delete --dry-run
    """
    from index_builder.live import sync_folder

    _leave_room_for_searches()
    with bars() as progress:
        changes = sync_folder(
            index, source, delete=delete, dry_run=dry_run, device=resolve_devices(device), progress=progress
        )
    _show_changes(changes, as_json, would=dry_run)


@index_app.command("compact")
def index_compact(
    index: IndexFolder,
    lexical: Annotated[str | None, typer.Option(help="Another language of the BM25 index, none or off.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Free the space of removed documents; the index is trained anew, and rows get new numbers.

    \b
    Example:
      retro index compact wiki.index
    """
    from index_builder.live import compact_index

    with bars() as progress:
        manifest = compact_index(index, lexical=lexical, device=resolve_devices(device), progress=progress)
    _show_index(index, manifest, as_json)


# --- plan ---------------------------------------------------------------------------------------------------------


@plan_app.command("index")
def plan_index_command(
    tokens: Annotated[float, typer.Option(help="Tokens of the corpus, as in 1.7e12.")],
    encoder: Annotated[str, typer.Option(help="minilm, bert-base or bert-large.")] = "minilm",
    dim: Annotated[int | None, typer.Option(help="Numbers of a vector [the encoder's].")] = None,
    chunk_len: Annotated[int, typer.Option(help="Tokens of a chunk.")] = 64,
    gpu: Annotated[str | None, typer.Option(help="l4, l40s, a100, h100 or h200 [CPU].")] = None,
    gpus: Annotated[int, typer.Option(help="How many of them; without --gpu, how many machines.")] = 1,
    cores: Annotated[int, typer.Option(help="Cores of a machine.")] = 2,
    chunks_per_s: Annotated[float | None, typer.Option(help="What you measured on one device.")] = None,
    max_memory: MaxMemory = None,
    disk: Annotated[str | None, typer.Option(help="Disk there is, as in 10TB.")] = None,
    recall: Annotated[float, typer.Option(help="Recall@10 that an approximate index is tuned to.")] = 0.95,
    lexical: Annotated[bool, typer.Option(help="With a BM25 index.")] = True,
    as_json: AsJson = False,
) -> None:
    """Say what an index of a corpus of so many tokens takes, from rates that are named.

    \b
    Examples:
      retro plan index --tokens 2.3e8
      retro plan index --tokens 1.7e12 --gpu h200 --gpus 64 --cores 128 --max-memory 1TiB
    """
    from index_builder.plan import plan_corpus

    plan = plan_corpus(
        tokens,
        chunk_len=chunk_len,
        dim=dim,
        gpu=gpu,
        gpus=gpus,
        cores=cores,
        encoder=encoder,
        chunks_per_s=chunks_per_s,
        max_memory=None if max_memory is None else parse_bytes(max_memory),
        disk=None if disk is None else parse_bytes(disk),
        recall=recall,
        lexical=lexical,
    )
    print_report(plan.report(), as_json)


# --- tokenizer, data ----------------------------------------------------------------------------------------------


@tokenizer_app.command("train")
def tokenizer_train(
    corpora: Corpora,
    out: Annotated[Path, typer.Option(help="Folder of the tokenizer.")],
    vocab_size: Annotated[int, typer.Option(help="Entries, 256 bytes and 2 special tokens included.")] = 16384,
    text_field: TextField = "text",
    id_field: IdField = "id",
    title_field: TitleField = "title",
    limit: Limit = None,
    on_error: OnError = "stop",
    max_document_chars: MaxChars = 10_000_000,
    overwrite: Overwrite = False,
) -> None:
    """Train a byte-level BPE on a corpus.

    \b
    Example:
      retro tokenizer train wiki.jsonl --vocab-size 8192 --out wiki.tok
    """
    from index_builder.build import train_tokenizer

    options = _read_options(text_field, id_field, title_field, limit, on_error, max_document_chars)
    with bars() as progress:
        tokenizer = train_tokenizer(
            corpora, out, vocab_size=vocab_size, options=options, overwrite=overwrite, progress=progress
        )
    typer.echo(f"{out}: {tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint}")


def data(
    corpora: Corpora,
    tokenizer: ModelTokenizer,
    index: Annotated[Path, typer.Option(help="Index that the neighbors come from.")],
    out: Annotated[Path, typer.Option(help="Folder of the training data.")],
    k: Annotated[int, typer.Option("-k", help="Neighbors of a chunk.")] = 2,
    neighbor_len: Annotated[int, typer.Option(help="Tokens of a neighbor that are kept.")] = 128,
    chunk_len: Annotated[int, typer.Option(help="Tokens of a chunk of the model.")] = 64,
    method: Method = "dense",
    where: Where = None,
    neighbors: Annotated[
        str | None, typer.Option(help="Table of index rows made elsewhere (.npy or Parquet) instead of a search.")
    ] = None,
    exclude: Annotated[str, typer.Option(help="group, or none: a chunk may then find itself.")] = "group",
    exclude_near_duplicates: Annotated[
        bool, typer.Option(help="Nor neighbors of documents that share 80% of their 13-grams with the chunk's own.")
    ] = False,
    exclude_ngrams_of: Annotated[
        list[str] | None, typer.Option(help="Nor any that share 13 words in a row with this evaluation corpus.")
    ] = None,
    lead_share: Annotated[float, typer.Option(help="Share of training documents that begin inside a chunk.")] = 0.25,
    valid_share: HeldOut = 0.02,
    test_share: HeldOut = 0.02,
    seed: Seed = 0,
    shard_chars: Annotated[int, typer.Option(help="Characters of a shard, the unit of resuming.")] = 2_000_000,
    text_field: TextField = "text",
    id_field: IdField = "id",
    title_field: TitleField = "title",
    limit: Limit = None,
    on_error: OnError = "stop",
    max_document_chars: MaxChars = 10_000_000,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Tokenize a corpus for a model and look up the neighbors of all its chunks.

    \b
    Examples:
      retro data wiki.jsonl --tokenizer wiki.tok --index wiki.index -k 2 --out wiki.data
      retro data wiki.jsonl --tokenizer wiki.tok --index wiki.index --out clean.data --exclude-ngrams-of test.jsonl
    """
    from index_builder.config import DataConfig
    from index_builder.neighbors import build_training_data
    from retro.tokenizer import Tokenizer

    config = DataConfig(
        num_neighbors=k,
        neighbor_len=neighbor_len,
        chunk_len=chunk_len,
        exclude=choice(exclude, ("group", "none"), "--exclude"),
        exclude_near_duplicates=exclude_near_duplicates,
        exclude_ngrams_of=tuple(exclude_ngrams_of or ()),
        where=where,
        neighbors=neighbors,
        lead_share=lead_share,
        valid_share=valid_share,
        test_share=test_share,
        seed=seed,
        shard_chars=shard_chars,
        read=_read_options(text_field, id_field, title_field, limit, on_error, max_document_chars),
    )
    opened = Tokenizer.load(tokenizer)
    retriever = open_retriever(index, resolve_devices(device), method)
    with bars() as progress:
        manifest = build_training_data(
            corpora, out, tokenizer=opened, retriever=retriever, config=config, overwrite=overwrite, progress=progress
        )
    shown = {key: manifest[key] for key in ("documents", "chunks", "tokens", "chunks_with_neighbors", "rejects")}
    if as_json:
        print_json({"data": str(out), **shown})
    else:
        typer.echo(f"{out}: " + ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in shown.items()))


def questions(
    files: Annotated[
        list[str], typer.Argument(help="JSON lines of questions and answers, or of messages.", metavar="FILE...")
    ],
    tokenizer: ModelTokenizer,
    index: Annotated[Path, typer.Option(help="Index that the passages come from.")],
    out: Annotated[Path, typer.Option(help="Folder of the question data.")],
    k: Annotated[int, typer.Option("-k", help="Passages that are looked up for a question.")] = 20,
    method: Method = "auto",
    where: Where = None,
    others: Annotated[
        float, typer.Option(help="Keep so many questions that no passage answers for each one that some passage does.")
    ] = 1.0,
    valid_share: Annotated[float, typer.Option(help="Held out where records name no split.")] = 0.02,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave out the questions of this file, of a test set.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many records of each file.")] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make data to train answering on: questions (or conversations) with the passages that are found for them.

    Records have `question` and `answers`; of a passage that holds an answer, its own words are what the model is to say. Records
    with `messages`, a list of roles and contents, train `task = "chat"`; they are written by the chat template that lies beside the
    tokenizer, else in ChatML. Run again, an interrupted run goes on.

    \b
    Examples:
      retro questions nq_dev.jsonl webq_train.jsonl --tokenizer wiki.tok --index wiki.index --out qa.questions
      retro questions talks.jsonl --tokenizer wiki.tok --index wiki.index -k 4 --out chat.questions
    """
    from index_builder.questions import QuestionConfig, build_questions
    from retro.chat import ChatFormat
    from retro.tokenizer import Tokenizer

    config = QuestionConfig(
        num_passages=k, where=where, others=others, valid_share=valid_share, exclude=tuple(exclude or ()), limit=limit
    )
    opened = Tokenizer.load(tokenizer)
    retriever = open_retriever(index, resolve_devices(device), method, for_questions=True)
    with bars() as progress:
        manifest = build_questions(
            files,
            out,
            tokenizer=opened,
            retriever=retriever,
            config=config,
            chat=ChatFormat.of(tokenizer, opened),
            overwrite=overwrite,
            progress=progress,
        )
    report = {
        "out": str(out),
        **manifest["questions"],
        "passages": manifest["passages"],
        "too_long": manifest["too_long"],
    }
    print_report(report, as_json)


def cloze(
    corpora: Corpora,
    tokenizer: ModelTokenizer,
    out: Annotated[Path, typer.Option(help="Folder of the questions.")],
    questions: Annotated[int, typer.Option(help="Questions to make, if the corpus gives as many.")] = 1_000_000,
    candidates: Annotated[int, typer.Option(help="Passages of a question, those with the answer included.")] = 16,
    question_tokens: Annotated[int, typer.Option(help="Longest prompt: one chunk of the model.")] = 64,
    valid_share: HeldOut = 0.02,
    test_share: HeldOut = 0.02,
    seed: Seed = 0,
    workers: Annotated[int | None, typer.Option(help="Processes [the number of cores].")] = None,
    shard_chars: Annotated[int, typer.Option(help="Characters of a shard, the unit of resuming.")] = 4_000_000,
    text_field: TextField = "text",
    id_field: IdField = "id",
    title_field: TitleField = "title",
    limit: Limit = None,
    on_error: OnError = "stop",
    max_document_chars: MaxChars = 10_000_000,
    dry_run: Annotated[
        bool, typer.Option(help="Make questions of 2,000 documents, show some, and keep nothing.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make questions of a corpus: sentences with a name or a number blanked, and passages that state it or only seem to.

    \b
    Examples:
      retro cloze wiki.jsonl --tokenizer wiki.tok --out wiki.questions --questions 100000
      retro cloze wiki.jsonl --tokenizer wiki.tok --out wiki.questions --dry-run
    """
    import os
    import tempfile

    from index_builder.cloze import ClozeConfig, make_cloze, sample_cloze
    from retro.tokenizer import Tokenizer

    config = ClozeConfig(
        questions=questions,
        candidates=candidates,
        question_tokens=question_tokens,
        valid_share=valid_share,
        test_share=test_share,
        seed=seed,
        shard_chars=shard_chars,
        read=_read_options(text_field, id_field, title_field, limit, on_error, max_document_chars),
    )
    opened = Tokenizer.load(tokenizer)
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            report, examples = sample_cloze(corpora, Path(folder), tokenizer=opened, config=config)
        if as_json:
            shown = [{**made._asdict(), "passage": passage} for made, passage in examples]
            print_json({**report, "examples": shown})
            return
        print_report(report, as_json)
        for made, passage in examples:
            typer.echo(f"\n{made.question}\n  {made.answer}\n    {passage}")
        return
    with bars() as progress:
        report = make_cloze(
            corpora,
            out,
            tokenizer=opened,
            config=config,
            workers=workers or os.cpu_count() or 1,
            overwrite=overwrite,
            progress=progress,
        )
    print_report({"out": str(out), **report}, as_json)


# --- shared by the commands ---------------------------------------------------------------------------------------


def open_retriever(
    index: Path, device: str, method: str, where: str | None = None, *, for_questions: bool = False
) -> "IndexRetriever":
    """Opens an index to search it as --retriever and --where say.

    `for_questions` settles now what `auto` stands for, where it is to be written down how passages were found.
    """
    from index_builder.search import AUTO, METHODS, IndexRetriever, settled
    from retro.artifact import open_manifest

    chosen: Any = choice(method, (*METHODS, AUTO), "--retriever")
    if for_questions and chosen == AUTO:
        chosen = settled(chosen, "query", has_words=open_manifest(index, "index")["lexical"] is not None)
    return IndexRetriever.open(index, device=device, method=chosen, where=where)


def _read_options(
    text_field: str,
    id_field: str,
    title_field: str,
    limit: int | None,
    on_error: str,
    max_document_chars: int,
    deduplicate: str = "none",
    vectors_field: str | None = None,
) -> Any:
    from index_builder.corpus import ReadOptions

    return ReadOptions(
        text_field=text_field,
        id_field=id_field,
        title_field=title_field,
        limit=limit,
        on_error=choice(on_error, ("stop", "skip"), "--on-error"),
        max_document_chars=max_document_chars,
        deduplicate=choice(deduplicate, ("none", "exact", "near"), "--deduplicate"),
        vectors_field=vectors_field,
    )


def _part(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and int(number) < int(of)):
        raise typer.BadParameter(f"{text!r} is not i/n with i from 0 to n - 1, as in 0/8", param_hint="--shard")
    return int(number), int(of)


def _leave_room_for_searches() -> None:
    """A change of a live index takes half of the cores."""
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // 2))


def _show_changes(changes: Any, as_json: bool, *, would: bool = False) -> None:
    from dataclasses import asdict

    counts = asdict(changes)
    if as_json:
        print_json(counts)
        return
    shown = ", ".join(f"{value:,} {name}" for name, value in counts.items() if name != "chunks")
    typer.echo(f"{'would be: ' if would else ''}{shown} documents; {counts['chunks']:,} new chunks")


def _show_index(folder: Path, manifest: dict[str, Any], as_json: bool) -> None:
    encoder, index, lexical = manifest["encoder"], manifest["index"], manifest["lexical"]
    report = {
        "index": str(folder),
        "documents": manifest["documents"],
        "chunks": manifest["chunks"],
        "removed_rows": 0 if manifest["removed"] is None else _removed_rows(folder, manifest),
        "changes": manifest["state"],
        "rejects": manifest["rejects"],
        "duplicates": manifest["duplicates"],
        "truncated_chunks": manifest["truncated_chunks"],
        "chunk_len": manifest["chunk_len"],
        "encoder": encoder["name"],
        "dim": encoder["dim"],
        "metric": index["metric"],
        "index_type": index["factory"],
        "reason": index["reason"],
        **{name: index[name] for name in ("nprobe", "ef_search", "rescore") if index.get(name) is not None},
        "measured": index["measured"],
        "bm25": "off" if lexical is None else lexical["language"],
        "bytes": sum(record["bytes"] for record in manifest["files"].values()),
    }
    print_report(report, as_json)


def _removed_rows(folder: Path, manifest: dict[str, Any]) -> int:
    from retro.chunks import load_array

    return len(load_array(folder / manifest["removed"]))
