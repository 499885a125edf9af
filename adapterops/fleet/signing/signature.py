"""The signature of one adapter, in one pass over its bytes: what the index keeps of it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from adapterops.errors import AdapterOpsError
from adapterops.fleet.signing import sketch
from adapterops.fleet.signing.content import content_hash, extras_hash
from adapterops.fleet.signing.eligible import judged, refused
from adapterops.fleet.signing.fingerprint import fingerprint
from adapterops.fleet.signing.finished import Finished, finished, joined
from adapterops.fleet.signing.kronecker import finished_kronecker, is_kronecker
from adapterops.fleet.signing.measured import Measured, measure
from adapterops.fleet.signing.reading import Pass
from adapterops.fleet.signing.spectra import needed_ranks
from adapterops.fleet.types import Layout, Signature
from adapterops.formats import AdapterFile, read_adapter

_HELD = 1 << 21  # numbers of Gram matrices that are kept, to be solved together


def signature(path: str, seed: int, *, allow_pickle: bool = False) -> Signature:
    """The signature of the adapter at a local path, sketched with the fleet's seed.

    A file that cannot be used is no error: `status` and `reason` say so. Only MemoryError and
    KeyboardInterrupt are raised.
    """
    known = Signature("broken")
    try:
        file = read_adapter(path, allow_pickle=allow_pickle)
        known = _described(file)
        return _signature(file, known, seed)
    except (MemoryError, KeyboardInterrupt):
        raise
    except AdapterOpsError as error:
        status, reason = refused(error, path, allow_pickle)
    except Exception as error:  # a fleet's run does not end for one file, whatever is wrong with it
        status, reason = "broken", f"cannot be read ({type(error).__name__}: {error})"
    return replace(known, status=status, reason=reason)


def _described(file: AdapterFile) -> Signature:
    """What the headers say."""
    return Signature(
        "broken",
        base=file.base or "",
        dialect=file.dialect,
        dtype=file.dtype,
        size=os.path.getsize(file.weights_file),
        rank=file.rank,
    )


def _signature(file: AdapterFile, known: Signature, seed: int) -> Signature:
    verdict = judged(file)
    side = sketch.side_of(len(file.sites))
    reader = Pass(file)
    measured: list[Measured] = []
    live: list[Finished] = []
    held = 0
    try:
        for ready in reader.modules({} if verdict else file.sites):
            plain = [site for site in ready if not is_kronecker(site)]
            for part in measure(plain, reader, seed, side):
                measured.append(part)
                held += part.gram_b.size
            found = (
                finished_kronecker(site, reader, seed, side) for site in ready if is_kronecker(site)
            )
            live += [part for part in found if part is not None]
            if held > _HELD:
                live += finished(measured, side)
                measured, held = [], 0
        for source in file.sources:
            source.check_unchanged()
    finally:
        for source in file.sources:
            source.close()
    known = replace(
        known,
        content=content_hash(file, reader.digests),
        extras=extras_hash(file, reader.digests),
    )
    if verdict:
        return replace(known, status=verdict[0], reason=verdict[1])
    live += finished(measured, side)
    if not live and known.extras:
        return replace(known, status="ineligible", reason="only extras: every ΔW is zero")
    if not live:
        return replace(known, status="no-op", reason="every ΔW is zero")
    return _sketched(known, live, seed, side)


def _sketched(known: Signature, live: Sequence[Finished], seed: int, side: int) -> Signature:
    """The finished signature, of the modules whose ΔW is not zero."""
    whole = joined(live)
    norm = math.hypot(*whole.norms)
    # Of ΔW over its norm: nothing is too large or too small in between, whatever the scales.
    scales = whole.scales / norm
    squares = [part.squares * np.square(part.scales / norm)[:, None] for part in live]
    numbers = whole.outputs * np.square(scales)[:, None]
    outputs = sketch.folded(numbers, seed, whole.stems, "outputs", sketch.OUTPUTS)
    outputs /= math.sqrt(numbers.shape[1] * math.fsum(float((s * s).sum()) for s in squares))
    return replace(
        known,
        status="ok",
        needed=needed_ranks(squares),
        norm=norm,
        layout=Layout(whole.stems, whole.shapes, side),
        norms=whole.norms,
        sketch=(whole.sketches * scales[:, None, None]).astype(np.float16),
        outputs=outputs.astype(np.float16),
        start=fingerprint(whole.starts, seed, whole.stems),
    )
