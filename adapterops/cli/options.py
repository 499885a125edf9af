"""Options that several commands share, each defined once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import click

from adapterops.errors import UsageError

Command = Callable[..., Any]


class Rank(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """A whole number, or the word same."""

    name = "N|same"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | Literal["same"]:
        if value == "same":
            return "same"
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor 'same'", param, ctx)


def all_of(command: Command, *options: Command) -> Command:
    """The command with these options, which `--help` lists in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def runner_option(command: Command) -> Command:
    """Where a fleet's work is done."""
    return click.option(
        "--runner",
        default="threads",
        show_default=True,
        type=click.Choice(["threads", "ray"]),
        help="This machine, or the Ray cluster (RAY_ADDRESS) that it is a node of.",
    )(command)


def rank_options(command: Command) -> Command:
    """How the rank of the output is chosen."""
    return all_of(
        command,
        click.option(
            "-r", "--rank", type=Rank(), help="Rank of the output; same: the largest input's."
        ),
        target_options,
    )


def target_options(command: Command) -> Command:
    """What the rank of the output may be chosen by."""
    return all_of(
        command,
        click.option(
            "--energy",
            type=float,
            metavar="E",
            help="Smallest rank that keeps this share of Σσ² (0.99 means an error of 0.1).",
        ),
        click.option(
            "--max-error",
            type=float,
            metavar="X",
            help="Smallest rank whose relative error, as written, is at most X.",
        ),
        click.option(
            "--size", metavar="SIZE", help="Largest rank whose file fits, e.g. 20MB (10⁶)."
        ),
    )


def allocation_options(command: Command) -> Command:
    """More ways to choose ranks, and what lets modules differ in theirs."""
    return all_of(
        command,
        click.option(
            "--ratio",
            type=float,
            metavar="X",
            help="Largest rank with this share of the parameters.",
        ),
        click.option(
            "--sv-ratio",
            "--sv_ratio",
            type=float,
            metavar="X",
            help="sd-scripts' rule, by module: keep σ > σ₁/X.",
        ),
        click.option(
            "--sv-fro",
            "--sv_fro",
            type=float,
            metavar="X",
            help="sd-scripts' rule, by module: the fewest with Σσ² ≥ X²·total.",
        ),
        click.option(
            "--sv-cumulative",
            "--sv_cumulative",
            type=float,
            metavar="X",
            help="sd-scripts' rule, by module: the fewest with Σσ ≥ X·total.",
        ),
        click.option(
            "--allocate",
            default="uniform",
            show_default=True,
            type=click.Choice(["uniform", "global"]),
            help="One rank for all modules, or ranks where they save most error per parameter.",
        ),
        click.option("--ragged", is_flag=True, help="Apply the target to each module by itself."),
        click.option("--min-rank", type=int, metavar="N", help="Least rank of every module."),
        max_rank_option(),
    )


def max_rank_option(default: int | None = None) -> Command:
    """The largest rank that any module may have."""
    return click.option(
        "--max-rank",
        type=int,
        metavar="N",
        default=default,
        show_default=default is not None,
        help="Largest rank of every module.",
    )


def form_option(command: Command) -> Command:
    """How the factors of a product are chosen."""
    return click.option(
        "--form",
        default="balanced",
        show_default=True,
        type=click.Choice(["balanced", "svd", "orthonormal-a", "orthonormal-b"]),
        help="Factors: of equal norms; U√Σ, √ΣVᵀ; UΣ, Vᵀ; U, ΣVᵀ.",
    )(command)


def scaling_option(default: str) -> Command:
    """Where the scale of the output stands."""
    return click.option(
        "--scaling",
        default=default,
        show_default=True,
        type=click.Choice(["folded", "keep", "rslora"]),
        help="alpha = rank; the adapter's own scale; or alpha / √rank.",
    )


_PICKLE = click.option(
    "--allow-pickle",
    is_flag=True,
    help="Dangerous: read adapters in .bin/.pt files (weights_only, never code).",
)
_EXTRAS = click.option(
    "--extras",
    default="error",
    show_default=True,
    type=click.Choice(["error", "first", "average", "drop"]),
    help="Heads, biases and token rows on which the inputs disagree.",
)
_ALPHA = click.option(
    "--alpha", multiple=True, metavar="X|PATH=X", help="For inputs that lack a scale."
)


def file_options(command: Command) -> Command:
    """What is written, and as what."""
    return all_of(
        command,
        click.option("--modules", metavar="REGEX", help="Only modules whose whole path matches."),
        click.option(
            "--dtype",
            default="keep",
            show_default=True,
            metavar="TYPE",
            help="keep (the first input's), float32, bfloat16 or float16.",
        ),
        click.option(
            "--to",
            type=click.Choice(["peft", "kohya", "diffusers", "mlx"]),
            help="Dialect to write; default the first input's.",
        ),
    )


def adapter_options(command: Command) -> Command:
    """`file_options`, and how adapters are read: extras, missing scales, pickles."""
    return all_of(
        command,
        file_options,
        _EXTRAS,
        _ALPHA,
        _PICKLE,
    )


def base_options(command: Command) -> Command:
    """How adapters are read beside their base model."""
    return all_of(
        command,
        click.option("--modules", metavar="REGEX", help="Only modules whose whole path matches."),
        click.option(
            "--residual",
            metavar="MODEL",
            help="The base as an initialisation (CorDA, LoftQ, …) left it.",
        ),
        _EXTRAS,
        _ALPHA,
        _PICKLE,
    )


def from_option(command: Command) -> Command:
    """A list of inputs."""
    return click.option(
        "--from",
        "from_file",
        metavar="FILE",
        help="Also the paths in this file, one a line; - is stdin.",
    )(command)


def run_options(command: Command) -> Command:
    """Where and how a command runs and talks."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Print the plan, write nothing."),
        click.option("--strict", is_flag=True, help="Turn warnings into errors."),
        click.option("-v", "--verbose", is_flag=True, help="One line per module."),
    ):
        command = option(command)
    return place_options(command)


def place_options(command: Command) -> Command:
    """Where a command runs and writes, and how much it says."""
    for option in (
        click.option("--overwrite", is_flag=True, help="Replace an existing output."),
        click.option("--no-progress", is_flag=True, help="No progress on stderr."),
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but warnings and errors."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
        click.option("-j", "--jobs", type=int, metavar="N", help="Workers: threads, or processes."),
        click.option("--memory", metavar="SIZE", help="Bytes in flight, e.g. 2GB."),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            metavar="DEVICE",
            help="auto, cpu, cuda or cuda:N.",
        ),
    ):
        command = option(command)
    return command


def input_options(command: Command) -> Command:
    """What the commands share that look at many adapters one by one."""
    for option in (
        _PICKLE,
        click.option("--strict", is_flag=True, help="Stop at the first error or warning."),
        click.option("--no-progress", is_flag=True, help="No progress on stderr."),
        click.option("-v", "--verbose", is_flag=True, help="One line (in JSON: entry) per module."),
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but warnings and errors."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
        click.option("-j", "--jobs", type=int, metavar="N", help="Workers."),
        click.option("--memory", metavar="SIZE", help="Bytes in flight, e.g. 2GB."),
        _ALPHA,
        from_option,
    ):
        command = option(command)
    return command


def parse_alphas(values: tuple[str, ...], paths: list[str]) -> float | dict[str, float] | None:
    """`--alpha 16` for every input without a scale, or `--alpha path=16` for one of them.

    A path may be given as on the command line or by its last component.
    """
    import os

    general: list[float] = []
    single: dict[str, float] = {}
    for text in values:
        name, equals, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            raise UsageError(f"--alpha {text!r}: expected a number, or PATH=number") from None
        if not 0 < value < float("inf"):
            raise UsageError(f"--alpha {text!r}: expected a number above 0")
        if not equals:
            general.append(value)
            continue
        matches = [p for p in paths if p == name or os.path.basename(p.rstrip("/")) == name]
        if len(matches) != 1:
            raise UsageError(
                f"--alpha {text!r}: {len(matches)} inputs are called {name!r}",
                hint="give the path as on the command line",
            )
        single[matches[0]] = value
    if len(general) > 1 or (general and single):
        raise UsageError("--alpha: give one number for all inputs, or PATH=number for some")
    return single or (general[0] if general else None)
