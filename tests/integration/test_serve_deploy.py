"""What docs/deploy.md tells people to copy: every command is one, every file has the form that its reader wants."""

import configparser
import importlib
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from retro.cli import app
from retro.serve import connections, guard, masks
from retro.serve.config import ServeConfig
from retro.serve.metrics import Metrics

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = (REPOSITORY / "docs" / "deploy.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert found, language
    return found


def joined(text: str) -> list[str]:
    """Lines without comments, those that end in a backslash together with the next."""
    lines = re.sub(r"\\\n\s*", " ", text).split("\n")
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def check_retro(words: list[str]) -> None:
    """Parses the arguments of `retro` as the command itself does, and runs nothing."""
    command: Any = typer.main.get_command(app)
    context = None
    while True:
        context = command.make_context(words[0], words[1:], parent=context, resilient_parsing=False)
        if not hasattr(command, "resolve_command"):
            return
        arguments = [*getattr(context, "_protected_args", []), *context.args]
        _, command, rest = command.resolve_command(context, arguments)
        words = [arguments[0], *rest]


def retro_commands() -> list[str]:
    lines = [line for block in blocks("sh") for line in joined(block)]
    lines += re.findall(r"^ExecStart=\S*/(retro .*)$", TEXT, re.MULTILINE)
    lines += re.findall(r"`(retro (?:serve|index|plan) [^`]*)`", TEXT)
    return [line for line in lines if re.match(r"retro \w+", line)]


@pytest.mark.parametrize("line", retro_commands())
def test_every_retro_command_is_one(line: str) -> None:
    words = shlex.split(line.replace(" N`", " 1e9`").replace("--tokens N", "--tokens 1e9"))
    if words[:2] == ["retro", "index"] and len(words) == 3:
        words.append("x.index")  # named without what it works on
    if words[1:3] == ["index", "add"] and len(words) == 4:
        words.append("corpus.jsonl")
    check_retro(words)


def test_an_option_that_is_none_would_be_noticed() -> None:
    with pytest.raises(Exception, match="max-clients"):
        check_retro(["retro", "serve", "x.model", "--max-clients", "5"])


@pytest.mark.parametrize("block", blocks("sh"))
def test_every_line_for_the_shell_can_be_read_by_it(block: str) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run([bash, "-n"], input=block, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_container_file_builds_on_what_is_there() -> None:
    (block,) = blocks("dockerfile")
    lines = [line.partition(" ")[::2] for line in joined(block)]
    known = {
        "FROM",
        "WORKDIR",
        "COPY",
        "RUN",
        "ENV",
        "USER",
        "EXPOSE",
        "STOPSIGNAL",
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
    }
    assert {name for name, _ in lines} <= known
    values = dict(lines)
    assert values["USER"] not in ("root", "0")
    check_retro([*json.loads(values["ENTRYPOINT"]), *json.loads(values["CMD"])])
    check = json.loads(values["HEALTHCHECK"].partition("CMD ")[2])
    compile(check[2], "check", "exec")
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for named in re.findall(r"(?:\.|retro-lm)\[([\w,]+)\]", TEXT):
        assert set(named.split(",")) <= set(extras)
    assert (REPOSITORY / "constraints.txt").is_file()


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    (block,) = blocks("ini")
    parsed = configparser.RawConfigParser(strict=False)
    parsed.optionxform = str  # type: ignore[assignment, method-assign]
    parsed.read_string(block)
    assert int(parsed["Service"]["TimeoutStopSec"]) > ServeConfig().grace_s + 10
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("needs systemd-analyze")
    unit = tmp_path / "retro.service"
    unit.write_text(block.replace("/opt/retro/bin/retro", "/bin/true").replace("User=retro", "User=root"))
    done = subprocess.run([analyze, "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "retro.service" in line]
    assert ours == []


@pytest.mark.parametrize("language", ["nginx", "caddyfile"])
def test_the_files_of_proxies_are_closed_where_they_are_opened(language: str) -> None:
    for block in blocks(language):
        depth = 0
        for line in joined(block):
            words = re.sub(r'"[^"]*"', "x", line)
            if language == "nginx":
                assert words.endswith((";", "{", "}")), line
            depth += words.endswith("{") - (words == "}")
            assert depth >= 0
        assert depth == 0


def test_proxies_wait_longer_than_the_server() -> None:
    waits = [int(seconds) for seconds in re.findall(r"(?:proxy_read_timeout|response_header_timeout) (\d+)s", TEXT)]
    assert len(waits) == 3
    assert min(waits) > ServeConfig().timeout_s + 20


def test_the_limits_are_those_of_the_server() -> None:
    config = ServeConfig()
    (table,) = re.findall(r"^## Limits\n(.*?)^##|\Z", TEXT, re.MULTILINE | re.DOTALL)[:1]
    for shown in (
        f"{config.max_connections:,} at once",
        f"{connections.HEAD_TIMEOUT_S:g} s for the head, {guard.BODY_TIMEOUT_S:g} s for the body",
        f"{connections.STALL_S:g} s without a byte taken",
        f"{config.max_body_bytes >> 20} MiB",
        f"{config.max_context:,} tokens together, {config.max_tokens:,} new, {config.max_choices} choices",
        f"| {config.max_passages}, then 400",
        f"{config.timeout_s:g} s, then 504",
        f"{config.max_queue} wait, then 429",
        f"{masks.MIN_BUDGET_S:g} s of a core, or {masks.BUDGET_PER_DOCUMENT_S * 1e6:g} microseconds a document",
    ):
        assert shown in table
    command: Any = typer.main.get_command(app)
    options = {name for parameter in command.commands["serve"].params for name in parameter.opts}
    assert set(re.findall(r"`(--[\w-]+)`", table)) <= options


def test_the_metrics_are_those_of_the_server() -> None:
    exposed = Metrics().exposition().decode()
    for name in re.findall(r"\bretro_\w+(?=[`{\[, )])", TEXT):
        assert f"# TYPE {name} " in exposed, name
    (block,) = blocks("yaml")
    yaml: Any = importlib.import_module("yaml")  # it comes with transformers, without types
    assert yaml.safe_load(block)["scrape_configs"][0]["job_name"] == "retro"
