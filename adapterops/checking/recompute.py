"""An adapter against its own provenance: made again from its inputs, as `run` does, and compared.

The inputs are found by their hashes; names count for nothing, they only say where to look first.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

import adapterops
from adapterops.adapter import Adapter
from adapterops.casts import FORMATS
from adapterops.checking.findings import Finding, few, finding
from adapterops.errors import AdapterOpsError, FormatError, MissingInputsError, UnsupportedError
from adapterops.files.output import MAIN, PROVENANCE_KEY
from adapterops.formats import AdapterFile, Ref, mlx, open_adapter_file
from adapterops.formats.names import DIRECTORIES
from adapterops.originals import Originals
from adapterops.recipe.calls import Verb, done
from adapterops.recipe.made import Made, find_made
from adapterops.recipe.repeat import repeated
from adapterops.stream import Compute

_ROUNDINGS = 4.0  # both files were rounded to storage, each factor once


def recomputed(
    path: str,
    verbs: Callable[[str], Verb],
    inputs: Originals,
    on: Compute,
    *,
    allow_pickle: bool,
) -> Finding:
    """What making the adapter at `path` again, by one of the `verbs`, says of it.

    `allow_pickle` concerns its inputs, too.
    """
    try:
        file = open_adapter_file(path, allow_pickle=allow_pickle)
    except AdapterOpsError as error:
        text = f"cannot be compared: {error.message}"
        return finding("recompute-failed", text, path=path, module=error.module)
    try:
        made = find_made(path)
        if made is None and PROVENANCE_KEY in file.metadata:
            raise FormatError("its provenance is damaged", path=path)
        if made is None:
            return finding("recompute-none", "carries no provenance of adapterops", path=path)
        with tempfile.TemporaryDirectory(prefix="adapterops-") as folder:
            out = os.path.join(folder, _output(file))
            _make(made, out, verbs, inputs, on, allow_pickle)
            again = open_adapter_file(out)
            try:
                return _compared(file, again, made.version)
            finally:
                again.source.close()
    except MissingInputsError as error:
        return finding("recompute-inputs", error.message, path=path, hint=error.hint)
    except AdapterOpsError as error:
        return finding("recompute-failed", str(error), path=path)
    finally:
        file.source.close()


def _make(
    made: Made,
    out: str,
    verbs: Callable[[str], Verb],
    inputs: Originals,
    on: Compute,
    allow_pickle: bool,
) -> None:
    """Write it again to `out`."""
    if made.verb == "bake":
        raise UnsupportedError("was made by bake, which writes models", path=made.path)
    call = repeated(made, verbs, inputs, allow_pickle=allow_pickle)
    how = {"out": out, "device": "cpu", "jobs": on.threads, "memory": on.memory}
    done(replace(call, arguments={**call.arguments, **how}))


def _output(file: AdapterFile) -> str:
    """A name for the copy, so that it becomes a folder or a file like the original."""
    name = os.path.basename(file.weights_file)
    is_folder = file.dialect in DIRECTORIES and name in (MAIN, mlx.WEIGHTS)
    return "again" if is_folder else "again.safetensors"


def _compared(file: AdapterFile, again: AdapterFile, version: str) -> Finding:
    unequal = list(_unequal(file, again))
    by = "" if version == adapterops.__version__ else f" (written by version {version})"
    if not unequal:
        text = f"computed again from its inputs: the same {len(file.tensors)} tensors, bit for bit"
        return finding("recompute-equal", text, path=file.path)
    travelling = [n for n in unequal if n in file.extras or n in again.extras]
    distance = math.inf if travelling else _distance(file, again)
    form = FORMATS.get(file.dtype)
    limit = _ROUNDINGS * 2.0 ** -(form.mantissa + 1) if form else 0.0
    if distance <= limit:
        return finding(
            "recompute-close",
            f"computed again: ‖ΔW − ΔW′‖ / ‖ΔW‖ = {distance:.3g}, within the rounding of "
            f"{form.name if form else file.dtype}{by}",
            path=file.path,
            hint="another machine or library rounds otherwise; the adapter is the same",
        )
    apart = f"‖ΔW − ΔW′‖ / ‖ΔW‖ = {distance:.3g}"
    what = f"{few(travelling)} differ" if travelling else apart
    return finding(
        "recompute-differs",
        f"computed again from its inputs it is another adapter: {what}{by}",
        path=file.path,
        hint="it was changed after it was written",
    )


def _unequal(a: AdapterFile, b: AdapterFile) -> Iterator[str]:
    """What one file lacks, or has otherwise: tensors by name, modules whose scale differs."""
    for stem in a.sites.keys() & b.sites.keys():
        if not math.isclose(a.sites[stem].scale, b.sites[stem].scale, rel_tol=1e-6):
            yield stem
    for name in a.tensors.keys() | b.tensors.keys():
        one, other = a.tensors.get(name), b.tensors.get(name)
        if one is None or other is None or not _same(one, other):
            yield name


def _same(one: Ref, other: Ref) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return one.raw().tobytes() == other.raw().tobytes()


def _distance(a: AdapterFile, b: AdapterFile) -> float:
    """‖A − B‖_F / ‖A‖_F over factors and full deltas; infinite where A is zero and B is not."""
    squares, whole = [], []
    difference = Adapter(((1.0, a), (-1.0, b)))
    for stem in difference:
        squares.append(difference[stem].norm() ** 2)
    whole += [factors.norm() ** 2 for factors in Adapter(((1.0, a),)).values()]
    for name in a.deltas.keys() | b.deltas.keys():
        one, other = a.deltas.get(name), b.deltas.get(name)
        x = np.asarray(one.read() if one else 0.0)
        y = np.asarray(other.read() if other else 0.0)
        squares.append(float(np.sum((x - y) ** 2)))
        whole.append(float(np.sum(x**2)))
    total, gap = math.fsum(whole), math.fsum(squares)
    return math.sqrt(gap / total) if total else (math.inf if gap else 0.0)
