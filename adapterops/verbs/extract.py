"""extract: the LoRA between two checkpoints of one model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from adapterops.basemodel import BaseModel, open_model
from adapterops.casts import format_name
from adapterops.certificate import PlanReport, Report
from adapterops.errors import BudgetError, UsageError
from adapterops.extraction.adapter import Extraction, difference, sources
from adapterops.extraction.rounding import notes as rounding_notes
from adapterops.files.output import check_outside
from adapterops.linalg import Form
from adapterops.options import compute
from adapterops.save import save_sum

_Path = str | os.PathLike[str]
_WRITTEN = ("F16", "BF16", "F32")
_COARSE = ("F16", "BF16", "F8_E4M3", "F8_E5M2")
_GLOBAL = ", or let modules go with --allocate global"  # which only compress has


def extract(
    base: _Path,
    tuned: _Path,
    *,
    out: _Path,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    size: str | int | None = None,
    max_rank: int = 128,
    vectors: str = "save",
    embeddings: str = "lora",
    form: Form = "balanced",
    modules: str | None = None,
    dtype: str = "keep",
    to: str | None = None,
    device: str = "auto",
    memory: str | int | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    strict: bool = False,
    dry_run: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report | PlanReport:
    """Write tuned − base as a LoRA and return its certificate.

    Both models are read tensor by tensor; of what differs, matrices are factored to the rank or
    error asked for. The error is that of the factors as stored, measured on every row.

    Args:
        base, tuned: the model before and after training: a safetensors file, an index or folder of
            shards, a folder with a config.json, or a diffusers pipeline.
        rank: uniform rank. energy: keep this share of Σσ². max_error: smallest uniform rank whose
            relative Frobenius error, as written, is within this. size: largest uniform rank whose
            weights file fits. One of the four is needed.
        max_rank: the largest rank that energy, max_error and size may choose.
        vectors: norms and biases that differ: "save" them whole (PEFT), "drop" them, named in the
            report, or "error".
        embeddings: embeddings and the head: "lora", "save" them whole, or "drop" them. A grown
            vocabulary can only be saved or dropped; one that other modules share under names
            which the files do not tell, only dropped. Embeddings of positions that PEFT has no
            LoRA for are saved whole with "lora" too.
        form: how factors share the singular values: balanced, svd, orthonormal-a, orthonormal-b.
        modules: regular expression that a module path must match as a whole; others are not
            compared.
        dtype: keep (the tuned model's), float32, bfloat16 or float16.
        to: dialect to write; peft, or diffusers for its pipelines and their parts, by default.
        device, memory, jobs, overwrite, strict, dry_run, progress: as in `merge`.

    Raises:
        AdapterOpsError: one of the tree in `adapterops.errors`; nothing is written then.
    """
    if to not in (None, "peft", "kohya", "diffusers", "mlx"):
        raise UsageError(f"to={to!r}: expected peft, kohya, diffusers or mlx")
    if isinstance(rank, str):
        raise UsageError(f"--rank {rank}: a checkpoint has no rank of its own; give a number")
    models = open_model(base), open_model(tuned)
    found: Extraction | None = None
    try:
        check_outside(out, [model.path for model in models if os.path.isdir(model.path)])
        found = difference(
            *models,
            modules=modules,
            vectors=vectors,
            embeddings=embeddings,
            to=to,
            on=compute(device, memory, jobs),
            progress=progress,
        )
        report = save_sum(
            [found.file],
            [1.0],
            out,
            verb="extract",
            recorded=_recorded(modules, vectors, embeddings, models),
            rank=rank,
            energy=energy,
            max_error=max_error,
            size=size,
            max_rank=max_rank if rank is None else None,
            form=form,
            dtype=_dtype(dtype, found),
            to=to,
            left_out=found.dropped,
            device=device,
            memory=memory,
            jobs=jobs,
            overwrite=overwrite,
            strict=strict,
            dry_run=dry_run,
            progress=progress,
        )
    except BudgetError as error:
        raise _explained(error, found, energy is not None or max_error is not None) from None
    finally:
        for model in models:
            for source in sources(model):
                source.close()
    return _told(report, found)


def _explained(error: BudgetError, found: Extraction | None, precise: bool) -> BudgetError:
    """The error with what an extraction can do about it, and why a `precise` one was missed."""
    hint = (error.hint or "").removesuffix(_GLOBAL) or None
    if precise and found and found.rounded in _COARSE:
        hint = (
            f"{hint or 'allow more'}; what rounding to {format_name(found.rounded)} left in the "
            "difference is of full rank, and no LoRA holds it"
        )
    return BudgetError(error.message, path=error.path, module=error.module, hint=hint)


def _recorded(
    modules: str | None,
    vectors: str,
    embeddings: str,
    models: tuple[BaseModel, BaseModel],
) -> dict[str, Any]:
    """What decides the tensors, and both models by name and by a hash of samples."""
    named = {
        role: {"name": model.name, "sampled_sha256": model.identity}
        for role, model in zip(("base", "tuned"), models, strict=True)
    }
    return {**named, "modules": modules, "vectors": vectors, "embeddings": embeddings}


def _dtype(asked: str, found: Extraction) -> str:
    """`keep` is the type that most of the tuned model's changed matrices have."""
    if asked != "keep":
        return asked
    return format_name(found.dtype if found.dtype in _WRITTEN else "F32")


def _told(report: Report | PlanReport, found: Extraction) -> Report | PlanReport:
    """The report with what only an extraction knows: what is left out, and what is noise."""
    notes = list(report.notes)
    if isinstance(report, Report):
        notes += rounding_notes(report, found.rounded)
    if found.dropped:
        notes.append(
            f"{len(found.dropped)} tensors that differ are left out ({found.dropped[0]} is one)"
        )
    if found.unchanged:
        notes.append(f"{found.unchanged} modules are the same in both models")
    if found.outside:
        notes.append(f"--modules leaves out {found.outside} modules, which were not compared")
    return replace(report, notes=tuple(notes))
