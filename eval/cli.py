"""The commands of `retro eval`."""

from pathlib import Path
from typing import Annotated

import typer

from retro.terminal import SETTINGS

eval_app = typer.Typer(help="Measure a model, an index, or both; figures go into a report's folder.", **SETTINGS)

Out = Annotated[Path, typer.Option(help="Folder of the report: the record is added to those that are there.")]
Limit = Annotated[int | None, typer.Option(help="Only so many documents or questions, evenly spaced.")]


@eval_app.callback()
def root() -> None:
    """Keeps the commands below `retro eval` even where there is only one."""
