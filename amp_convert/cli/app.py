"""The command's frame: what `--help` says above and below the commands, and `--version`."""

from __future__ import annotations

from typing import Annotated

import typer

from amp_convert import __version__

# One paragraph a line: the help is wrapped to the terminal.
_HELP = """\
Convert a PyTorch model to mixed precision and prove that the result is as good as FP32.

`amp-convert model.py` is short for `amp-convert convert model.py`.

All flags of it: `amp-convert convert --help`
"""
_EPILOG = """\
Exit codes: 0 pass, 1 parity or gate failed, 2 wrong usage or input, 3 inconclusive, 4 model not \
supported, 5 a fault in amp-convert. The model file is your own code and is executed.
"""

app = typer.Typer(
    name="amp-convert",
    help=_HELP,
    epilog=_EPILOG,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its markup would swallow "[default: 4]"
)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"amp-convert {__version__}")
