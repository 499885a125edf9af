"""unbake: the base of a model that was baked reversibly, bit by bit."""

from __future__ import annotations

import os
from collections.abc import Callable

from adapterops.options import compute
from adapterops.undoing.restoring import UnbakeReport, restore_file, restore_folder


def unbake(
    baked: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    device: str = "auto",
    memory: str | int | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> UnbakeReport:
    """Restore what `baked` was made from; neither base nor adapters are needed.

    Every file is checked by its sha256 before anything gets its final name. A file makes a file, a
    directory a directory.

    Args:
        baked: what `bake(..., reversible=True)` wrote, with its undo files.
        out: where to write the base.
        device, memory, jobs, overwrite, progress: as in `merge`.

    Raises:
        AdapterOpsError: IncompatibleError for a model that was changed since, FormatError for undo
            files that are missing or damaged, NumericsError where a restored file is not the
            base's; nothing is written then.
    """
    on = compute(device, memory, jobs)
    path, final = os.fspath(baked), os.fspath(out)
    restore = restore_folder if os.path.isdir(path) else restore_file
    return restore(path, final, on, overwrite=overwrite, progress=progress)
