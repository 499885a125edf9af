"""What must hold before and after an output is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from adapterops.certificate import Figures, Report
from adapterops.errors import BudgetError, FinishedError, NumericsError, OutputExistsError
from adapterops.files.output import check_output, is_our_sidecar
from adapterops.formats.model import AdapterFile
from adapterops.provenance import Provenance


def check_free(
    out: str, *, directory: bool, overwrite: bool, made: Callable[[], Provenance]
) -> Path:
    """`check_output`, which says of an existing output of ours whether it is what is asked for.

    `made` is called where that must be known. Raises FinishedError where there is nothing to do.
    """
    try:
        return check_output(out, directory=directory, overwrite=overwrite)
    except OutputExistsError as error:
        from adapterops.batch.outputs import is_done, recorded

        if overwrite or recorded(out) is None:
            raise
        if is_done(out, made()) == "done":
            raise FinishedError(
                "exists already, made from the same input with the same options",
                path=out,
                hint="there is nothing to do; --overwrite makes it again",
            ) from None
        raise OutputExistsError(
            "exists already, made from another input, with other options or by another version",
            path=out,
            hint=error.hint,
        ) from None


def check_apart(final: Path, inputs: Sequence[AdapterFile]) -> None:
    """The output must not be an input, nor a directory that holds one."""
    for file in inputs:
        for path in (file.path, *file.weights_files):
            real = Path(os.path.realpath(path))
            if real == final or final in real.parents:
                raise OutputExistsError(
                    f"the output is or contains the input {path}",
                    path=os.fspath(final),
                    hint="choose another name; inputs are never changed",
                )


def check_sidecar(path: Path) -> None:
    """A file that happens to be called like our sidecar is not replaced."""
    if path.exists() and not is_our_sidecar(path):
        raise OutputExistsError(
            "exists, was not written by adapterops, and is where the certificate would go",
            path=os.fspath(path),
            hint="choose another name for the output",
        )


def check_promises(report: Report, figures: Sequence[Figures], bound: float | None) -> None:
    """Refuse a result below the noise of its inputs, or beyond the error that was promised."""
    something = any(figure.beta > 0 for figure in figures)
    check_cancellation(report.norm, report.floor, something, len(report.inputs))
    noise = report.floor / report.norm if report.norm else 0.0
    if bound is not None and max(report.metric_error, noise) > bound * (1 + 1e-12):
        raise BudgetError(
            f"the error as written is {report.metric_error:.4g}, measured to within {noise:.2g}: "
            f"--max-error {bound:g} cannot be promised"
        )


def check_cancellation(norm: float, floor: float, something: bool, inputs: int) -> None:
    """Refuse a sum of which nothing is left but rounding noise."""
    if something and norm <= floor:
        raise NumericsError(
            f"{'the inputs cancel' if inputs > 1 else 'the adapter cancels in itself'}: "
            f"‖ΔW‖ = {norm:.2g} is below the rounding noise {floor:.2g} of what went in",
            hint="are two of the inputs the same adapter with opposite weights?"
            if inputs > 1
            else "its factors leave nothing of each other; leave it out",
        )
