"""The `retro` command in this process, for tests."""

import contextlib
import io
import sys
from typing import Any, NamedTuple

import pytest

from retro.cli import main


class Outcome(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


def command(*arguments: object) -> Outcome:
    """Runs `retro` through its entry point; the fixture `retro` is for single tests, this for what they share."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["retro", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    return Outcome(code, out.getvalue(), err.getvalue())


def done(*arguments: object) -> Outcome:
    """Runs a command that must succeed."""
    outcome = command(*arguments)
    assert outcome.code == 0, outcome
    return outcome


def refused(outcome: Outcome, *parts: str) -> None:
    """Checks that a command failed with one line that holds all parts."""
    assert outcome.code == 1, outcome
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("Error: ")
    for part in parts:
        assert part in lines[0], lines[0]
