"""The `retro` command: composes the commands of the three packages. Nothing heavy is imported before it is needed."""

import io
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from eval.cli import eval_app
from index_builder.cli import cloze, data, index_app, open_retriever, plan_app, questions, tokenizer_app
from retro.errors import ConfigError, DependencyError, RetroError
from retro.terminal import (
    SETTINGS,
    AsJson,
    Device,
    IndexPath,
    Method,
    ModelPath,
    Overwrite,
    QuestionMethod,
    Seed,
    Where,
    bars,
    choice,
    parse_bytes,
    passage_json,
    print_json,
    print_report,
    resolve_devices,
    train_bar,
)

for _name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_DATASETS_DISABLE_TELEMETRY"):
    os.environ.setdefault(_name, "1")

app = typer.Typer(
    help="Retrieval-enhanced language models: index a corpus, train with its neighbors, ask.\n\n"
    "\b\nFirst steps:\n  retro demo\n  retro index build my_folder --out my.index\n"
    '  retro index search my.index "a question" -k 5',
    **SETTINGS,
)
app.add_typer(index_app, name="index")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(plan_app, name="plan")
app.add_typer(eval_app, name="eval")
app.command("data")(data)
app.command("cloze")(cloze)
app.command("questions")(questions)


# --- plan ---------------------------------------------------------------------------------------------------------


@plan_app.command("train")
def plan_train(
    flops: Annotated[float | None, typer.Option(help="The budget, as in 1e21; or")] = None,
    hours: Annotated[float | None, typer.Option(help="hours of the GPUs.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Which, as in h200, h100, a100, l4 or rtx-4090.")] = None,
    gpus: Annotated[int, typer.Option(help="How many of them train together.")] = 1,
    utilization: Annotated[float, typer.Option("--mfu", help="Share of the peak that is reached.")] = 0.4,
    preset: Annotated[str | None, typer.Option(help="Plan this one [the nearest to the optimum].")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a budget of training is best spent on, and what it buys of a preset.

    \b
    Examples:
      retro plan train --flops 1e21
      retro plan train --hours 24 --gpu h200 --gpus 8 --preset base
    """
    from retro.plan import plan_training

    plan = plan_training(flops=flops, hours=hours, gpu=gpu, gpus=gpus, utilization=utilization, preset=preset)
    print_report(plan.report(), as_json)


# --- train, export, generate, ask ---------------------------------------------------------------------------------


@app.command("train")
def train(
    config: Annotated[Path | None, typer.Argument(help="TOML file with [model] and [train].")] = None,
    preset: Annotated[str | None, typer.Option(help="Start from a preset: tiny or small.")] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Training data; same as --set train.data=... Several are mixed.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the model; same as --set train.out=...")] = None,
    base: Annotated[
        str | None, typer.Option(help="Put retrieval into this pretrained model: a folder, or a name on the hub.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: train.steps=100.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same as --set train.seed=...")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write event files for TensorBoard, too.")] = False,
    corpus: Annotated[
        list[str] | None, typer.Option(help="Make the training data of this first (again: and of this).")
    ] = None,
    index: Annotated[Path | None, typer.Option(help="With --corpus: index that the neighbors come from.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="With --corpus: of the model; as in `retro data`.")] = None,
    overfit_batch: Annotated[
        bool, typer.Option("--overfit-batch", help="Only check that the model learns a few sequences by heart.")
    ] = False,
    print_config: Annotated[bool, typer.Option(help="Print the resolved configuration and stop.")] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Time a few steps, print what the run takes, and write nothing.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON.")] = False,
) -> None:
    """Train a model; run again, an interrupted training goes on exactly.

    \b
    Examples (a quick trial; all GPUs of a machine):
      retro train --preset tiny --data wiki.data --out wiki.model --set train.steps=20
      torchrun --nproc-per-node gpu -m retro train small.toml
      retro train --base my_gpt2 --data wiki.data --out wiki.model --set base.lora_rank=8
    """
    from retro.artifact import read_json
    from retro.config import config_to_dict, load_run_config

    overrides = list(set_ or [])
    listed = ",".join(f"'{folder}'" for folder in data or ())
    overrides += [f"train.data=[{listed}]" if len(data or ()) > 1 else f"train.data={listed}"] if data else []
    overrides += [f"train.out='{out}'"] if out is not None else []
    overrides += [f"train.seed={seed}"] if seed is not None else []
    overrides += [f"base.name='{base}'"] if base is not None else []
    overrides += ["train.tensorboard=true"] if tensorboard else []
    run = load_run_config(config, overrides, preset=preset, sizes=_base_sizes)
    if print_config:
        print_json(config_to_dict(run))
        return
    if dry_run:
        from retro.distributed import rank_of_environment
        from retro.dry_run import measure_training

        if rank_of_environment() > 0:  # the first rank speaks for all
            measure_training(run, overwrite=overwrite)
            return
        with train_bar() as progress:
            report = measure_training(run, overwrite=overwrite, progress=progress).report()
        print_report(report, as_json)
        return
    if corpus:
        _make_training_data(run, corpus, index, tokenizer)
    if overfit_batch:
        from retro.overfit import overfit_batch as run_overfit

        with train_bar() as progress:
            first, last, steps = run_overfit(run, progress=progress)
        typer.echo(
            f"The loss of one batch fell from {first:.4f} to {last:.4f} nats in {steps} steps: the model learns."
        )
        return
    from retro import train as training
    from retro.distributed import rank_of_environment

    if rank_of_environment() > 0:  # the first rank speaks for all
        for name in ("retro", "index_builder"):
            logging.getLogger(name).setLevel(logging.ERROR)
        training.train(run, overwrite=overwrite)
        return
    with train_bar() as progress:
        folder = training.train(run, overwrite=overwrite, progress=progress)
    steps = read_json(folder / "config.json")["training"]["steps"]
    typer.echo(f"{folder}: trained for {steps:,} steps; losses in {folder / 'metrics.jsonl'} and loss.png")


@app.command("export")
def export(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.")],
    out: Annotated[Path, typer.Option(help="Folder of the copy.")],
    weights: Annotated[
        str,
        typer.Option(help="float32; bfloat16: half as large; int8: a quarter, rounded to 8 bits with a scale a row."),
    ] = "bfloat16",
    bfloat16: Annotated[
        list[str] | None,
        typer.Option(help="Module whose matrices stay in bfloat16 beside int8, as in encoder; any number."),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Largest file with weights, as in 16MiB [they are one file].")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Copy a finished model with smaller weights and without what training left; the copy opens as any other model.

    \b
    Example:
      retro export wiki.model --out wiki.int8.model --weights int8 --bfloat16 encoder --max-shard-size 16MiB
    """
    from retro.export import export_model
    from retro.quantized import FORMS

    limit = None if max_shard_size is None else parse_bytes(max_shard_size)
    form = choice(weights, FORMS, "--weights")
    made = export_model(model, out, weights=form, bfloat16=bfloat16 or (), max_shard_bytes=limit, overwrite=overwrite)
    print_report(made.report(), as_json)


@app.command("generate")
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    model: ModelPath,
    index: IndexPath = None,
    k: Annotated[int, typer.Option("-k", help="Neighbors at each chunk border; 0 turns retrieval off.")] = 2,
    method: Method = "dense",
    where: Where = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the continuation.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among this many tokens; 0 means all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among tokens with this much probability.")] = 1.0,
    seed: Seed = 0,
    stream: Annotated[bool, typer.Option(help="Print while generating.")] = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue a text, retrieving neighbors at every chunk border.

    \b
    Example:
      retro generate --model wiki.model --index wiki.index "The oil crisis of 1973" --max-new-tokens 80
    """
    from retro.config import GenerateConfig
    from retro.generate import generate as run_generate

    settings = GenerateConfig(
        max_new_tokens=max_new_tokens,
        num_neighbors=k,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    loaded, tokenizer, retriever = _open_model(model, index if k > 0 else None, resolve_devices(device), method, where)
    streaming = stream and not as_json
    result = run_generate(
        loaded,
        tokenizer,
        [prompt],
        settings,
        retriever=retriever,
        on_token=(lambda _, piece: typer.echo(piece, nl=False)) if streaming else None,
    )[0]
    if as_json:
        retrieved = {chunk: [passage_json(p) for p in few] for chunk, few in result.retrieved.items()}
        print_json(
            {"prompt": prompt, "text": result.text, "finished": result.finished, "tokens": len(result.ids)}
            | {"retrieved": retrieved}
        )
    else:
        typer.echo("" if streaming else prompt + result.text)


@app.command("ask")
def ask(
    question: Annotated[
        str | None, typer.Argument(help="A question. Without one: those that are typed, or piped in, one a line.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a trained model [the one that comes with the project].")
    ] = None,
    index: IndexPath = None,
    k: Annotated[int, typer.Option("-k", min=0, help="Passages to read; 0 answers without.")] = 10,
    mode: Annotated[
        str,
        typer.Option(
            help="retro: passages are read by cross-attention; prompt: they are pasted into the prompt of any causal language "
            "model of Hugging Face (--model NAME or folder), untrained; closed: there are none, as with -k 0."
        ),
    ] = "retro",
    method: QuestionMethod = "auto",
    where: Where = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 32,
    min_confidence: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Below it the answer is I don't know [the one chosen for the model, else 0]."),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer questions and show the passages the answers came from, each with its share of the model's attention.

    Without a question, those are answered that are typed on the terminal (:help lists what else can be typed there), or
    piped in, one a line; with --json each makes a line of JSON.

    \b
    Examples:
      retro ask --index wiki.index "When did the 1973 oil crisis begin?"
      retro ask --model wiki.model --index wiki.index "When did the 1973 oil crisis begin?" -k 5
      cat questions.txt | retro ask --model wiki.model --index wiki.index --json > answers.jsonl
    """
    from retro.answer import answer_config, question_prompt
    from retro.asking import MODES, Asker

    choice(mode, MODES, "--mode")
    if question is not None:
        question_prompt(question)
    config = answer_config(0 if mode == "closed" else k, max_new_tokens)
    if config.num_neighbors and index is None:
        raise ConfigError("finding passages needs an index: name one, or ask without (-k 0)")
    if model is None and mode == "prompt":
        raise ConfigError("--mode prompt needs a causal language model of Hugging Face: name one with --model")
    model = _or_bundled(model)
    opened = index if config.num_neighbors else None
    answerer = _open_answerer(model, opened, resolve_devices(device), method, where, pasted=mode == "prompt")
    asker = Asker(config=config, as_json=as_json, **answerer)
    if min_confidence is not None:
        asker.min_confidence = min_confidence
    if question is not None:
        asker.ask_once(question)
    elif sys.stdin.isatty() and sys.stdout.isatty():
        asker.converse()
    else:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")
        if not asker.ask_each(sys.stdin):
            raise typer.Exit(1)


# --- serve --------------------------------------------------------------------------------------------------------


@app.command("serve")
def serve(
    model: Annotated[
        Path | None, typer.Argument(help="Folder of a trained model [the one that comes with the project].")
    ] = None,
    index: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="Folder of an index. Given again: others, which the admin key can load in its place by their names.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; beyond this machine only with a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="Keys, one a line, each perhaps with a space and what its searches are confined to; or RETRO_API_KEY."
        ),
    ] = None,
    admin_key_file: Annotated[
        Path | None, typer.Option(help="Key of whoever may change the index; or RETRO_ADMIN_KEY.")
    ] = None,
    root_path: Annotated[str, typer.Option(help="Prefix under which a proxy shows the server, as in /retro.")] = "",
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-origins",
            help="Another web site whose pages may ask, as in https://example.org. Can be given again.",
        ),
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Its name for clients [that of the folder].")] = None,
    k: Annotated[int, typer.Option("-k", min=0, help="Passages for questions and chats.")] = 10,
    method: Annotated[
        str,
        typer.Option(
            "--retriever", help="dense, bm25, hybrid or rerank; auto: hybrid for questions, where there is BM25."
        ),
    ] = "auto",
    where: Where = None,
    device: Device = "auto",
    max_concurrency: Annotated[int, typer.Option(help="Sequences that are decoded together.")] = 64,
    max_queue: Annotated[int, typer.Option(help="Sequences that may wait; more are refused with 429.")] = 256,
    timeout_s: Annotated[float, typer.Option(help="Longest time for a request.")] = 120.0,
    grace_s: Annotated[float, typer.Option(help="How long running requests may take to end when stopped.")] = 30.0,
    max_connections: Annotated[int, typer.Option(help="Clients that are connected at once.")] = 1000,
    max_body_bytes: Annotated[str, typer.Option(help="Longest request, as in 4MiB.")] = "4MiB",
    max_context: Annotated[int, typer.Option(help="Tokens of a prompt and its continuation.")] = 4096,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a continuation.")] = 1024,
    max_k: Annotated[int, typer.Option(help="Passages that a request may ask for.")] = 50,
    max_documents: Annotated[int, typer.Option(help="Documents that a request may add.")] = 100,
    log_prompts: Annotated[bool, typer.Option(help="Write questions and prompts to the log.")] = False,
) -> None:
    """Answer over HTTP: OpenAI's API, questions with sources, searches, and a page for people at /.

    \b
    Examples:
      retro serve --index wiki.index
      retro serve wiki.model --index wiki.index --host 0.0.0.0 --api-key-file keys.txt --admin-key-file admin.txt
    """
    from index_builder.search import AUTO, METHODS

    try:
        from retro.serve.config import Keys, ServeConfig, named_indexes
        from retro.serve.server import serve as run
    except ModuleNotFoundError as error:
        raise DependencyError(f"serving needs {error.name}: pip install 'retro-lm[serve]'") from error
    model = _or_bundled(model)
    environment = os.environ.get
    keys = Keys.read(
        key_file=api_key_file,
        key=environment("RETRO_API_KEY"),
        admin_file=admin_key_file,
        admin_key=environment("RETRO_ADMIN_KEY"),
    )
    config = ServeConfig(
        host=host,
        port=port,
        root_path=root_path.rstrip("/"),
        allowed_origins=tuple(allowed_origin or ()),
        model_name=served_model_name or model.resolve().name,
        retriever=choice(method, (*METHODS, AUTO), "--retriever"),
        where=where,
        num_passages=k,
        max_concurrency=max_concurrency,
        max_queue=max_queue,
        timeout_s=timeout_s,
        grace_s=grace_s,
        max_connections=max_connections,
        max_body_bytes=parse_bytes(max_body_bytes),
        max_context=max_context,
        max_tokens=max_tokens,
        max_passages=max_k,
        max_documents=max_documents,
        log_prompts=log_prompts,
    )
    run(model, named_indexes(index or []), config, keys, device=resolve_devices(device))


# --- demo, env ----------------------------------------------------------------------------------------------------


@app.command("demo")
def demo(
    folder: Annotated[
        Path,
        typer.Option("--dir", help="Where demo.index is made, and with --train demo.tok, demo.data and demo.model."),
    ] = Path(),
    train: Annotated[bool, typer.Option("--train", help="Train a tiny model, too, in some minutes.")] = False,
    device: Device = "auto",
) -> None:
    """The whole path on a small corpus: index, search, ask, change the index. Run again, finished stages are reused.

    \b
    Examples:
      retro demo
      retro demo --train
    """
    from retro.demo import run_demo

    run_demo(folder, device=resolve_devices(device), bars=bars, train_bar=train_bar if train else None)


@app.command("env")
def env(as_json: AsJson = False) -> None:
    """Print what a bug report needs.

    \b
    Example:
      retro env
    """
    import importlib.metadata
    import platform

    import torch

    packages = "retro-lm torch numpy faiss-cpu faiss-gpu sentence-transformers transformers tokenizers datasets pyarrow"
    versions: dict[str, Any] = {}
    for package in packages.split():
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "packages": versions,
    }
    if as_json:
        print_json(report)
        return
    for key, value in report.items():
        if key != "packages":
            typer.echo(f"{key:24}{', '.join(value) or 'none' if isinstance(value, list) else value}")
    for package, version in versions.items():
        typer.echo(f"{package:24}{version or 'not installed'}")


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="More messages on stderr.")] = False,
) -> None:
    if version:
        import importlib.metadata

        typer.echo(importlib.metadata.version("retro-lm"))
        raise typer.Exit
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr
    )
    for name in ("retro", "index_builder", "eval"):
        logging.getLogger(name).setLevel(logging.INFO)
    for name in ("faiss", "httpx", "sentence_transformers", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)


def main() -> None:
    """Entry point: a RetroError is one line on stderr and exit code 1; usage is 2, an interrupt 130."""
    try:
        app()
    except RetroError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        typer.echo("Interrupted. What is finished is kept: run the same command again to go on.", err=True)
        sys.exit(130)


def _make_training_data(run: Any, corpora: list[str], index: Path | None, tokenizer: str | None) -> None:
    """Makes the folder `train.data` where it is missing or unfinished; a finished one must have been made by the same settings."""
    from index_builder.config import DataConfig
    from index_builder.neighbors import build_training_data
    from index_builder.search import IndexRetriever
    from retro.tokenizer import Tokenizer

    folders = run.train.folders
    if index is None or tokenizer is None or len(folders) != 1 or not folders[0]:
        raise ConfigError(
            "--corpus needs --index, --tokenizer and one folder for the training data, as in --data wiki.data"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--corpus works without torchrun: make the training data first, with `retro data`")
    lengths = {"chunk_len": run.model.chunk_len, "neighbor_len": max(run.train.neighbor_len, DataConfig().neighbor_len)}
    with bars() as progress:
        build_training_data(
            corpora,
            Path(folders[0]),
            tokenizer=Tokenizer.load(tokenizer),
            retriever=IndexRetriever.open(index, device=resolve_devices(run.train.device)),
            config=DataConfig(num_neighbors=run.train.num_neighbors, **lengths),
            progress=progress,
        )


def _base_sizes(base: Any) -> dict[str, Any]:
    from retro.pretrained import base_sizes

    return base_sizes(base)


def _or_bundled(model: Path | None) -> Path:
    """The model that is named, else the one that comes with the project."""
    if model is not None:
        return model
    from retro.demo import bundled_model

    return bundled_model()


def _open_model(model: Path, index: Path | None, device: str, method: str, where: str | None) -> tuple[Any, Any, Any]:
    from retro.checkpoint import load_model

    loaded, tokenizer, _ = load_model(model, device)
    return loaded, tokenizer, None if index is None else open_retriever(index, device, method, where)


def _open_answerer(
    model: Path, index: Path | None, device: str, method: str, where: str | None, *, pasted: bool
) -> dict[str, Any]:
    """What answers questions, as `retro.asking.Asker` takes it."""
    import functools

    parts: dict[str, Any]
    if pasted:
        from retro.prompted import PromptedModel

        parts = {"answer": PromptedModel.open(model, device=device).ask}
        retriever = None if index is None else open_retriever(index, device, method, where)
    else:
        from retro.attribution import ask_and_explain
        from retro.threshold import load_threshold

        loaded, tokenizer, retriever = _open_model(model, index, device, method, where)
        chosen = load_threshold(model)
        parts = {
            "answer": functools.partial(ask_and_explain, loaded, tokenizer),
            "min_confidence": 0.0 if chosen is None else chosen.min_confidence,
        }
    if retriever is None:
        return parts

    def search_by(name: str) -> None:
        from index_builder.search import AUTO, METHODS

        if name not in (*METHODS, AUTO):
            raise ConfigError(f"retriever {name!r} is unknown: use {', '.join(METHODS)}")
        retriever.method = cast("Any", name)

    return parts | {"retriever": retriever, "set_method": search_by}
