"""The commands of `retro eval`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from index_builder.cli import open_retriever
from retro.terminal import (
    SETTINGS,
    AsJson,
    Corpora,
    Device,
    IdField,
    IndexFolder,
    IndexPath,
    Method,
    Overwrite,
    Seed,
    TextField,
    Where,
    bars,
    choice,
    resolve_devices,
)

if TYPE_CHECKING:
    from eval.records import Record
    from retro.chunks import Document

eval_app = typer.Typer(help="Measure a model, an index, or both; figures go into a report's folder.", **SETTINGS)

Out = Annotated[Path | None, typer.Option(help="Folder of the report: the record is added to those that are there.")]
Limit = Annotated[int | None, typer.Option(help="Only so many documents or questions, evenly spaced.")]
PRINTED_POINTS = 10
"""Of a curve, on the terminal."""


@eval_app.callback()
def root() -> None:
    """Keeps the commands below `retro eval` even where there is only one."""


@eval_app.command("lm")
def lm(
    model: Annotated[str, typer.Argument(help="Folder of a model of ours, or a causal LM of Hugging Face.")],
    corpora: Corpora,
    index: IndexPath = None,
    modes: Annotated[
        str, typer.Option(help="Of on, off, shuffled and oracle, separated by commas.")
    ] = "on,off,shuffled",
    k: Annotated[int, typer.Option("-k", help="Neighbors of each chunk that are read; 0 is --modes off.")] = 2,
    sweep: Annotated[str, typer.Option(help="Other numbers of neighbors to measure too, as in 1,4,10,40.")] = "",
    part: Annotated[str, typer.Option(help="Of each neighbor read both, its chunk or its continuation.")] = "both",
    neighbor_len: Annotated[int, typer.Option(help="Tokens of a neighbor that are read.")] = 128,
    method: Method = "dense",
    where: Where = None,
    keep_own: Annotated[bool, typer.Option(help="Let documents find passages of their own group.")] = False,
    baseline: Annotated[str | None, typer.Option(help="A model without retrieval, measured beside.")] = None,
    overlap: Annotated[bool, typer.Option(help="Bits per byte over the allowed overlap with neighbors, too.")] = False,
    last_words: Annotated[
        Path | None, typer.Option(help="JSON lines of passages (`text`) whose last words are to be found.")
    ] = None,
    window: Annotated[int, typer.Option(help="Slots that the model sees at once.")] = 512,
    stride: Annotated[int, typer.Option(help="Slots from one window to the next.")] = 256,
    text_field: TextField = "text",
    limit: Limit = None,
    batch_size: Annotated[int, typer.Option(help="Windows at once.")] = 8,
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Bits per byte and perplexity of a model on any corpus, with retrieval on, off and shuffled.

    \b
    Example:
      retro eval lm wiki.model valid.jsonl --index wiki.index -k 10 --sweep 1,2,5 --overlap --out report
    """
    from typing import get_args

    from eval.language_modeling import MODES, Part, evenly
    from eval.lm_record import LmConfig, measure_language_model, open_for_eval

    wanted = tuple(choice(name.strip(), MODES, "--modes") for name in modes.split(","))
    config = LmConfig(
        modes=wanted if k > 0 else ("off",),
        num_neighbors=max(k, 1),
        sweep=tuple(_number(text, "--sweep") for text in sweep.split(",") if text.strip()) if k > 0 else (),
        part=choice(part, get_args(Part), "--part"),
        neighbor_len=neighbor_len,
        window=window,
        stride=stride,
        overlap=overlap,
        batch_size=batch_size,
        seed=seed,
    )
    places = resolve_devices(device)
    opened = open_for_eval(model, places)
    retriever = None if index is None else open_retriever(index, places, method, where)
    documents = evenly(_documents(corpora, text_field), limit)
    with bars() as progress:
        record, units = measure_language_model(
            opened,
            documents,
            config,
            retriever=retriever,
            exclude_own=not keep_own,
            baseline=None if baseline is None else open_for_eval(baseline, places),
            last_word_texts=() if last_words is None else _texts(last_words),
            progress=progress,
        )
    _show(record, units, out, as_json=as_json)


@eval_app.command("knn-lm")
def knn_lm(
    model: Annotated[str, typer.Argument(help="Folder of a model of ours, or a causal LM of Hugging Face.")],
    corpora: Corpora,
    datastore: Annotated[Path, typer.Option(help="Folder of the datastore; made of --store where it is not there.")],
    store: Annotated[list[str] | None, typer.Option(help="Corpus of the datastore; again: and of this.")] = None,
    tune: Annotated[
        list[str] | None,
        typer.Option(help="Corpus on which share and temperature are chosen; never the one measured on."),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Keys that are looked up for each token.")] = 64,
    share: Annotated[float, typer.Option(help="Of the neighbors' distribution (lambda).")] = 0.25,
    temperature: Annotated[float, typer.Option(help="What squared distances are divided by.")] = 1.0,
    index_type: Annotated[
        str, typer.Option(help="Of the datastore: auto, Flat, or a factory string of FAISS.")
    ] = "auto",
    window: Annotated[int, typer.Option(help="Slots that the model sees at once.")] = 512,
    stride: Annotated[int, typer.Option(help="Slots from one window to the next.")] = 256,
    text_field: TextField = "text",
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """The kNN-LM baseline: a decoder mixed with the nearest of its own states in a datastore.

    \b
    Example:
      retro eval knn-lm plain.model test.jsonl --store wiki.jsonl --datastore wiki.datastore --tune valid.jsonl --out report
    """
    from eval.knn_lm import Datastore, KnnConfig, build_datastore, measure_knn_lm
    from eval.language_modeling import Window, evenly
    from eval.lm_record import open_for_eval

    config = KnnConfig(num_neighbors=k, share=share, temperature=temperature, window=window, stride=stride, seed=seed)
    opened = open_for_eval(model, resolve_devices(device))
    with bars() as progress:
        if store:
            made = build_datastore(
                opened,
                _documents(store, text_field),
                datastore,
                window=Window(length=window, stride=stride),
                index_type=index_type,
                overwrite=overwrite,
                progress=progress,
            )
        else:
            made = Datastore(datastore)
        record, units = measure_knn_lm(
            opened,
            evenly(_documents(corpora, text_field), limit),
            made,
            config,
            tuning=_documents(tune, text_field) if tune else (),
            progress=progress,
        )
    _show(record, units, out, as_json=as_json)


@eval_app.command("leakage")
def leakage(
    index: IndexFolder,
    files: Annotated[list[str], typer.Argument(help="Evaluation files, as corpora.", metavar="EVALUATION_FILE...")],
    fail_above: Annotated[
        float | None, typer.Option(help="Exit with 1 where more than this share (0 to 1) of a file is in the index.")
    ] = None,
    text_field: TextField = "text",
    id_field: IdField = "id",
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Look for the documents of evaluation files in an index: word for word, near-duplicates, reworded copies.

    \b
    Example:
      retro eval leakage wiki.index valid.jsonl test.jsonl --out report --fail-above 0.01
    """
    from eval.audit import audit_index
    from index_builder.corpus import ReadOptions

    if fail_above is not None and not 0 <= fail_above <= 1:
        raise typer.BadParameter("must be a share from 0 to 1", param_hint="--fail-above")
    with bars() as progress:
        record, units = audit_index(
            index, files, ReadOptions(text_field=text_field, id_field=id_field), progress=progress
        )
    _show(record, units, out, as_json=as_json)
    if not as_json:
        for row in record.rows["Found in the index"]:
            shown = [
                f"{name} {value:.3g}" if isinstance(value, float) else value for name, value in row.items() if value
            ]
            typer.echo("  ".join(map(str, shown)))
    shares = {row["file"]: row["found"] / row["documents"] for row in record.rows["Evaluation files"]}
    beyond = [f"{name} {100 * share:.3g}%" for name, share in shares.items() if share > (fail_above or 0.0)]
    if fail_above is not None and beyond:
        typer.echo(f"more than {100 * fail_above:g}% in the index: {', '.join(beyond)}", err=True)
        raise typer.Exit(1)


@eval_app.command("attribution")
def attribution(
    model: Annotated[str, typer.Argument(help="Folder of a model of ours.")],
    text: Annotated[str, typer.Argument(help="A text; with --generate a prompt.")],
    index: Annotated[Path, typer.Option(help="Folder of the index that the passages come from.")],
    k: Annotated[int, typer.Option("-k", help="Neighbors of each chunk that are read.")] = 2,
    generate: Annotated[int, typer.Option(help="Continue the prompt by so many tokens, which are attributed.")] = 0,
    neighbor_len: Annotated[int, typer.Option(help="Tokens of a neighbor that are read.")] = 128,
    method: Method = "dense",
    where: Where = None,
    device: Device = "auto",
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Which passages moved which words: attention, and what becomes of them when a passage is left out.

    With --out, a page of the shaded texts and a heat map lie beside the record, in `attribution`.

    \b
    Example:
      retro eval attribution wiki.model "The capital of France" --index wiki.index --generate 16 --out report
    """
    from eval.attribution import AttributionConfig, measure_attribution
    from eval.attribution_page import heat_map, write_page
    from eval.lm_record import open_for_eval

    config = AttributionConfig(num_neighbors=k, neighbor_len=neighbor_len, generate=generate)
    places = resolve_devices(device)
    opened = open_for_eval(model, places)
    retriever = open_retriever(index, places, method, where)
    record, units, found = measure_attribution(opened, text, config, retriever=retriever)
    path = _show(record, units, out, as_json=as_json)
    if out is not None and path is not None:
        page = out / "attribution" / f"{path.stem}.html"
        write_page(page, found, record.name)
        heat_map(found, page.with_suffix(".svg"))
        typer.echo(f"{page}; the heat map is {page.with_suffix('.svg')}", err=True)
    if not as_json:
        for row in record.rows["Passages"]:
            share, added = row["share of attention, %"], row["added log-probability, nats"]
            title = " ".join(row["title"].split())
            typer.echo(
                f"{row['passage']:3}  {share:5.1f}% attention  {added:+.3f} nats  {title}: {row['most attended']!r}"
            )


@eval_app.command("retrieval")
def retrieval(
    index: IndexFolder,
    questions: Annotated[Path | None, typer.Option(help="JSON lines of `question` and `answers`.")] = None,
    beir: Annotated[Path | None, typer.Option(help="Folder of a BEIR data set, of whose corpus the index is.")] = None,
    queries: Annotated[Path | None, typer.Option(help="TREC topics, id-tab-text lines or BEIR's JSON lines;")] = None,
    qrels: Annotated[Path | None, typer.Option(help="and their relevance judgments.")] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--retriever", help="As in dense,bm25,hybrid,rerank; the others are compared with the first."),
    ] = None,
    k: Annotated[str, typer.Option("-k", help="Passages or documents looked at.")] = "1,5,20,100",
    exact: Annotated[
        bool, typer.Option("--exact", help="Against exact search of the same vectors, too; always without questions.")
    ] = False,
    where: Where = None,
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Recall of an index against exact search, answers or relevance judgments; how fast; several retrievers side by side.

    \b
    Examples:
      retro eval retrieval wiki.index
      retro eval retrieval wiki.index --questions nq.jsonl --retriever dense,bm25,hybrid,rerank --out report
      retro eval retrieval scifact.index --beir scifact --retriever dense,bm25
    """
    from eval.judgments import read_beir, read_judged, read_questions
    from eval.retrieval import measure_retrieval
    from index_builder.search import METHODS, IndexRetriever

    if (queries is None) != (qrels is None) or sum(given is not None for given in (questions, beir, qrels)) > 1:
        raise typer.BadParameter("give --questions, --beir, or --queries with --qrels: one of these at most")
    names = [name.strip() for part in methods or ["dense"] for name in part.split(",")]
    chosen = [choice(name, METHODS, "--retriever") for name in names]
    asked = None
    if questions is not None:
        asked = read_questions(questions)
    elif beir is not None:
        asked = read_beir(beir)
    elif queries is not None and qrels is not None:
        asked = read_judged(queries, qrels)
    retriever = IndexRetriever.open(index, device=resolve_devices(device), where=where)
    with bars() as progress:
        record, units = measure_retrieval(
            retriever,
            asked,
            methods=chosen,
            ks=[_number(part, "-k") for part in k.split(",")],
            exact=exact,
            limit=limit,
            seed=seed,
            progress=progress,
        )
    _show(record, units, out, as_json=as_json)


@eval_app.command("qa")
def qa(
    model: Annotated[Path, typer.Argument(help="Folder of a model of ours.")],
    questions: Annotated[
        list[Path],
        typer.Option(help="JSON lines of `question` and `answers` (and id, relation, gold); again: and of these."),
    ],
    index: IndexPath = None,
    modes: Annotated[
        str, typer.Option(help="Of retrieval, shuffled, closed, gold, prompt and frequent; default: all that can be.")
    ] = "",
    method: Method = "auto",
    k: Annotated[int, typer.Option("-k", help="Passages that are read; 0: none.")] = 10,
    neighbor_len: Annotated[int, typer.Option(help="Tokens of a passage that are read.")] = 160,
    where: Where = None,
    gold_index: Annotated[
        Path | None, typer.Option(help="Index of the documents that questions name, if it is another one.")
    ] = None,
    gold_corpus: Annotated[
        list[str] | None, typer.Option(help="TAG=NAME: what a corpus that `gold` names is called in the index.")
    ] = None,
    prompt_model: Annotated[
        str | None, typer.Option(help="Causal LM of Hugging Face; the passages are pasted into its prompt.")
    ] = None,
    train_questions: Annotated[
        list[Path] | None, typer.Option(help="Questions of whose relations the most frequent answers are taken.")
    ] = None,
    group_field: Annotated[str, typer.Option(help="Field of a question's relation.")] = "relation",
    choose_threshold: Annotated[
        float | None,
        typer.Option(
            help="Save the smallest confidence from which on this share (0 to 1) of the answers is right into the model's folder."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many questions of each file, evenly spaced.")] = None,
    on_error: Annotated[str, typer.Option(help="stop, or skip: leave lines out that cannot be scored.")] = "stop",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Questions at once.")] = 16,
    seed: Seed = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Exact match and F1 of answers: with the passages found, others', none, the right document's, and pasted into a prompt.

    With --out, what was said is kept as JSON lines in `predictions`; interrupted, the same command goes on there.

    \b
    Examples:
      retro eval qa small.model --questions nq_open_dev.jsonl.xz --index wiki.index --out report
      retro eval qa small.model --questions squad.jsonl --questions webq.jsonl --index wiki.index --prompt-model gpt2
      retro eval qa small.model --questions dev.jsonl --index wiki.index --modes retrieval --choose-threshold 0.5
    """
    from eval.predictions import MODES, QaConfig
    from eval.qa_record import save_chosen_threshold
    from eval.question_answering import Prompted, measure_answers, open_model
    from eval.questions import read_questions

    skip_bad = choice(on_error, ("stop", "skip"), "--on-error") == "skip"
    if choose_threshold is not None and not 0 < choose_threshold <= 1:
        raise typer.BadParameter("must be a share above 0, at most 1", param_hint="--choose-threshold")
    tags = dict(_pair(text, "--gold-corpus") for text in gold_corpus or [])
    config = QaConfig(
        modes=tuple(choice(name.strip(), MODES, "--modes") for name in modes.split(",") if name.strip()),
        num_neighbors=k,
        neighbor_len=neighbor_len,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
    )
    asked, notes = read_questions(questions, limit=limit, skip_bad=skip_bad, group_field=group_field, corpora=tags)
    training = read_questions(train_questions, skip_bad=True, group_field=group_field)[0] if train_questions else []
    places = resolve_devices(device)
    opened = open_model(model, places)
    prompted = None
    if prompt_model is not None:
        from retro.prompted import PromptedModel

        prompted = Prompted(name=prompt_model, model=PromptedModel.open(prompt_model, device=places))
    with bars() as progress:
        record, units, lines = measure_answers(
            opened,
            asked,
            config,
            retriever=None
            if index is None or k == 0
            else open_retriever(index, places, method, where, for_questions=True),
            gold=None if gold_index is None else open_retriever(gold_index, places, "dense"),
            prompted=prompted,
            training=training,
            skip_bad=skip_bad,
            out=out,
            overwrite=overwrite,
            notes=notes,
            progress=progress,
        )
    _show(record, units, out, as_json=as_json)
    if choose_threshold is not None:
        chosen = save_chosen_threshold(model, lines, choose_threshold, ", ".join(path.name for path in questions))
        typer.echo(
            f"{model}: below a confidence of {chosen.min_confidence:.4f} it does not know; it answers "
            f"{100 * chosen.coverage:.1f}% of these questions, {100 * chosen.accuracy:.1f}% of them right",
            err=True,
        )


def _pair(text: str, option: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise typer.BadParameter("must be TAG=NAME", param_hint=option)
    return name, value


@eval_app.command("training")
def training(
    model: Annotated[Path, typer.Argument(help="Folder of a model.", exists=True)],
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Losses over the steps of a training, finished or not: its curve for the report.

    \b
    Example:
      retro eval training wiki.model --out report
    """
    from eval.training import training_record

    _show(training_record(model), None, out, as_json=as_json)


@eval_app.command("compare")
def compare_records(
    reports: Annotated[
        list[Path], typer.Argument(help="Folders of reports, or files of records.", metavar="REPORT...", exists=True)
    ],
    seed: Seed = 0,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Records of the same kind side by side: seeds as one, pairs tested by paired bootstrap over their units.

    \b
    Example:
      retro eval compare report-off report-on --out report
    """
    from eval.compare import compare

    record = compare(reports, seed=seed)
    _keep(record, None, out)
    if as_json:
        _print_json(record)
        return
    from eval.markup import column

    for title, rows in record.rows.items():
        columns = []
        for name in rows[0]:
            values = [row[name] for row in rows]
            right = all(isinstance(value, int | float | None) for value in values)
            texts = [name, *(column(values) if right else map(str, values))]
            columns.append(
                [text.rjust(max(map(len, texts))) if right else text.ljust(max(map(len, texts))) for text in texts]
            )
        typer.echo("\n".join([f"{title}:", *("  ".join(line).rstrip() for line in zip(*columns, strict=True)), ""]))
    for note in record.notes:
        typer.echo(note)


@eval_app.command("readme")
def fill_readme(
    file: Annotated[Path, typer.Argument(help="Text with markers: <!-- results:NAME --> and <!-- /results -->.")],
    reports: Annotated[
        list[Path], typer.Argument(help="Folders of reports, or files of records.", metavar="REPORT...", exists=True)
    ],
    check: Annotated[bool, typer.Option(help="Write nothing; fail where the file differs from the records.")] = False,
) -> None:
    """Puts tables of results into a text, between markers; NAME is a record's file without its number.

    \b
    Example:
      retro eval readme README.md report --check
    """
    from eval.readme import fill

    count = fill(file, reports, check=check)
    typer.echo(f"{file}: {count} tables {'are those of' if check else 'from'} the records")


def _documents(corpora: list[str], text_field: str) -> "list[Document]":
    from index_builder.corpus import ReadOptions, read_documents
    from retro.chunks import Document

    read = read_documents(corpora, ReadOptions(text_field=text_field))
    return [item for item in read if isinstance(item, Document)]


@eval_app.command("harness", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def harness(context: typer.Context) -> None:
    """The lm-evaluation-harness, with our models beside its own; `retro eval harness -- --help` lists its options.

    \b
    Example:
      retro eval harness --model retro --model_args pretrained=my.model,index=my.index,k=10 --tasks lambada_openai
    """
    from eval.harness import run

    run(context.args)


def _number(text: str, option: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise typer.BadParameter("must be whole numbers above 0, separated by commas", param_hint=option)
    return int(text)


def _texts(path: Path) -> list[str]:
    """The field `text` of JSON lines."""
    return [document.text for document in _documents([str(path)], "text")]


def _keep(record: "Record", units: dict[str, list[Any]] | None, out: Path | None) -> Path | None:
    """Adds a record to a report where one is named; returns its file there."""
    if out is None:
        return None
    from eval.report import finish

    path = finish(out, record, units)
    typer.echo(f"{path}; the page is {out / 'report.html'}", err=True)
    return path


def _print_json(record: "Record") -> None:
    from eval.records import to_json

    typer.echo(to_json(record))


def _show(record: "Record", units: dict[str, list[Any]] | None, out: Path | None, *, as_json: bool) -> Path | None:
    """Prints a record, and adds it to a report where one is named; returns its file there."""
    path = _keep(record, units, out)
    if as_json:
        _print_json(record)
        return path
    width = max(map(len, record.figures), default=0)
    for name, figure in record.figures.items():
        value = "-" if figure.value is None else f"{figure.value:,.4g}"
        interval = (
            f"  [{figure.low:,.4g}, {figure.high:,.4g}]" if figure.low is not None and figure.high is not None else ""
        )
        typer.echo(f"{name:{width}}  {value} {figure.unit}{interval}")
    for title, curve in record.curves.items():
        typer.echo(f"\n{title} ({curve.y_label} over {curve.x_label})")
        # Of long curves evenly spaced points, to the last one; the record and the page have all.
        shown = sorted(range(len(curve.x) - 1, -1, -max(1, -(-len(curve.x) // PRINTED_POINTS))))
        for name, values in curve.series.items():
            points = "  ".join(f"{curve.x[i]:g}: {'-' if values[i] is None else f'{values[i]:.4g}'}" for i in shown)
            typer.echo(f"  {name}: {points}")
    return path
