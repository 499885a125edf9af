"""The command line: parse, call one library function, print. No arithmetic here."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

import click

from adapterops import __version__
from adapterops.errors import AdapterOpsError, FileError, Interrupted, MemoryLimitError

COMMANDS = {
    "merge": "adapterops.cli.merge",
    "calc": "adapterops.cli.calc",
    "compress": "adapterops.cli.compress",
    "convert": "adapterops.cli.convert",
    "extract": "adapterops.cli.extract",
    "bake": "adapterops.cli.bake",
    "drift": "adapterops.cli.drift",
    "verify": "adapterops.cli.drift",
    "unbake": "adapterops.cli.unbake",
    "diff": "adapterops.cli.diff",
    "analyze": "adapterops.cli.analyze",
    "inspect": "adapterops.cli.inspect",
    "check": "adapterops.cli.check",
    "index": "adapterops.cli.index",
    "cluster": "adapterops.cli.cluster",
    "assign": "adapterops.cli.assign",
    "deploy": "adapterops.cli.deploy",
    "report": "adapterops.cli.report",
    "run": "adapterops.cli.run",
    "methods": "adapterops.cli.methods",
}


class LazyGroup(click.Group):
    """Loads a command's module when it is run, so that `--help` answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name])
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from adapterops.suggestion import meant

            hint = meant(args[0], COMMANDS) or f"there is: {', '.join(COMMANDS)}"
            raise click.UsageError(f"No such command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="adapterops")
def app() -> None:
    """Arithmetic on LoRA adapters: exact where it can be, certified where it cannot.

    \b
    Exit codes: 0 done, 1 unexpected, 2 usage, 3 malformed or unsafe input,
    4 inputs that do not go together, 5 a numerical check failed (nothing written),
    6 input/output, 7 memory, 130 interrupted.
    """


def main() -> NoReturn:
    """Run the command line and exit with the code that its errors call for."""
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names and figures need not fit the locale
            stream.reconfigure(errors="replace")
    wants_json = "--json" in sys.argv
    try:
        code = app.main(standalone_mode=False)
        for number in (signal.SIGINT, signal.SIGTERM):  # there is nothing left to be interrupted
            signal.signal(number, signal.SIG_IGN)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        if wants_json:
            _print_json({"code": 2, "type": "UsageError", "message": error.format_message()})
        else:
            error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        said = error.__cause__ if isinstance(error, click.Abort) else error
        _fail(said if isinstance(said, Interrupted) else _interrupted(), wants_json)
    except AdapterOpsError as error:
        _fail(error, wants_json)
    except MemoryError:
        _fail(MemoryLimitError("out of memory; try a smaller -j or --memory"), wants_json)
    except OSError as error:
        _fail(FileError(f"{error.strerror or error}", path=error.filename), wants_json)
    except Exception as error:
        if os.environ.get("ADAPTEROPS_DEBUG"):
            raise
        unexpected = AdapterOpsError(
            f"unexpected {type(error).__name__}: {error}",
            hint="this is a defect; ADAPTEROPS_DEBUG=1 shows where",
        )
        _fail(unexpected, wants_json)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt  # no Exception: `threading` takes one for a thread that did not start


def _interrupted() -> Interrupted:
    from adapterops.files.publish import complete

    done = complete()
    if not done:
        return Interrupted("interrupted; no unfinished output was left")
    return Interrupted(f"interrupted, but {done} had been written before and can be used")


def _fail(error: AdapterOpsError, wants_json: bool) -> NoReturn:
    if os.environ.get("ADAPTEROPS_DEBUG"):
        import traceback

        traceback.print_exc()
    if wants_json:
        _print_json(error.to_dict())
    else:
        click.echo(f"error: {error}", err=True)
    if isinstance(error, Interrupted):  # without waiting for threads at work
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code)
    sys.exit(error.exit_code)


def _print_json(error: dict[str, Any]) -> None:
    click.echo(json.dumps({"error": error}, ensure_ascii=False), err=True)
