"""What commands say: the result on stdout, everything else on stderr, and the next command."""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import Any

import click

from adapterops.errors import AdapterOpsError, FileError
from adapterops.render.text import printable

# Options that choose ranks, with the number of values that follow each.
_CHOOSING = {
    **dict.fromkeys(("-r", "--rank", "--energy", "--max-error", "--size", "--ratio"), 1),
    **dict.fromkeys(("--sv-ratio", "--sv-fro", "--sv-cumulative"), 1),
    **dict.fromkeys(("--sv_ratio", "--sv_fro", "--sv_cumulative"), 1),
    **dict.fromkeys(("--allocate", "--min-rank", "--max-rank"), 1),
    **dict.fromkeys(("--ragged", "--dry-run", "--overwrite"), 0),
}


def note(text: str) -> None:
    """Something a user should know."""
    click.echo(f"note: {printable(text)}", err=True)


def warn(text: str) -> None:
    """Something a user should look at."""
    click.echo(f"warning: {printable(text)}", err=True)


def failure(error: AdapterOpsError, as_json: bool) -> None:
    """One line about an adapter of many that failed."""
    if as_json:
        click.echo(json.dumps({"error": error.to_dict()}, ensure_ascii=False), err=True)
    else:
        click.echo(f"error: {printable(str(error))}", err=True)


def document(found: dict[str, Any]) -> str:
    """The one document that `--json` prints."""
    return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)


def result(text: str, output: str) -> None:
    """A result on stdout, of what is written at `output` already.

    Raises FileError where it cannot be printed, unless whoever read it has seen enough.
    """
    try:
        click.echo(text)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise FileError(
            f"the result is complete, but its report cannot be printed: {error.strerror}",
            path=output,
        ) from None


def with_rank(verb: str, rank: int) -> str:
    """This command line with another rank, ready to run: it replaces what was just written."""
    kept: list[str] = []
    arguments = iter(sys.argv[sys.argv.index(verb) + 1 :])
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name in _CHOOSING:
            if _CHOOSING[name] and not equals:
                next(arguments, None)
        elif not argument.startswith("-r"):
            kept.append(argument)
    return shlex.join(["adapterops", verb, "--rank", str(rank), "--overwrite", *kept])
