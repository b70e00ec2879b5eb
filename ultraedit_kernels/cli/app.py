"""The commands of the console script, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from ultraedit_kernels._version import __version__
from ultraedit_kernels.cli.check import check
from ultraedit_kernels.cli.edit import edit
from ultraedit_kernels.cli.eval import evaluate
from ultraedit_kernels.cli.export import export, merge
from ultraedit_kernels.cli.fleet import push, status
from ultraedit_kernels.cli.options import with_settings
from ultraedit_kernels.cli.serve import serve
from ultraedit_kernels.cli.show import OUT

app = typer.Typer(
    name="ultraedit",
    help="Change facts in a language model.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(with_settings(edit))
app.command("eval")(with_settings(evaluate))
app.command()(export)
app.command()(merge)
app.command()(check)
app.command()(push)
app.command()(status)
# The model and any options go to the server as they are, `--help` too.
app.command(
    add_help_option=False,
    context_settings={
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "allow_interspersed_args": False,
    },
)(serve)


def _print_version(wanted: bool) -> None:
    if wanted:
        OUT.print(f"ultraedit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass
