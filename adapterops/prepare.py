"""What is known of an output before anything is read: how it is meant, its plan, its provenance."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, get_args

from adapterops import passes
from adapterops.align import align
from adapterops.casts import format_name
from adapterops.certificate import PlanReport
from adapterops.descriptions import says_ranks
from adapterops.errors import UsageError
from adapterops.formats import peft
from adapterops.formats.diffusers import METADATA_KEY
from adapterops.formats.model import AdapterFile
from adapterops.formats.names import DIRECTORIES
from adapterops.layout import Layout
from adapterops.linalg import Form
from adapterops.plan import Module, Plan, Weighting
from adapterops.provenance import (
    Origin,
    Provenance,
    distinct,
    file_sha256,
    given_alphas,
    given_labels,
    label_of,
)
from adapterops.rangefinder import LARGE, is_dense
from adapterops.ranks import Ranks
from adapterops.scaling import Scaling, check_scaling
from adapterops.stream import Compute

if TYPE_CHECKING:
    from adapterops.serving.legal import LegalForm

FROBENIUS = Weighting()
NAMES = {  # of a file in the folder that was given for it
    "merge": "merged",
    "calc": "calculated",
    "compress": "compressed",
    "convert": "converted",
    "extract": "extracted",
}
_DEFAULTS = asdict(Ranks())


@dataclass(frozen=True, slots=True)
class Options:
    """How a sum is written; the verbs document each.

    `verb` is what made it and `recorded` what of the verb's own options decides its tensors.
    `weighting` is what error is measured in. `base` tells the shapes of modules that `engine` needs
    and the inputs lack. `left_out` are tensors of the inputs that a policy drops.
    """

    out: str
    ranks: Ranks
    verb: str = "merge"
    recorded: Mapping[str, Any] = field(default_factory=dict)
    form: Form = "balanced"
    scaling: Scaling = "folded"
    weighting: Weighting = FROBENIUS
    engine: str | None = None
    base: str | os.PathLike[str] | None = None
    with_spectra: bool = False
    modules: str | None = None
    extras: str = "error"
    dtype: str = "keep"
    to: str | None = None
    left_out: tuple[str, ...] = ()
    overwrite: bool = False
    strict: bool = False
    dry_run: bool = False
    progress: Callable[[str, int, int], None] | None = None


def planned_for(
    inputs: Sequence[AdapterFile], weights: Sequence[float], options: Options
) -> tuple[Plan, LegalForm | None]:
    """The plan of an output, and what an engine asks of it; modules it needs are added as zeros."""
    to = options.to or ("peft" if options.engine else None)
    if options.engine and to != "peft":
        raise UsageError(f"--engine {options.engine} reads PEFT's dialect; leave --to {to} away")
    plan = align(inputs, weights, modules=options.modules, dtype=options.dtype, to=to).expanded()
    check_scaling(options.scaling, plan.dialect)
    if options.form not in get_args(Form):
        raise UsageError(f"--form {options.form!r}: expected one of {', '.join(get_args(Form))}")
    if options.scaling != "folded" and options.engine:
        raise UsageError(
            f"--scaling {options.scaling}: engines read scales each in its own way; --engine "
            f"{options.engine} folds them"
        )
    if options.scaling != "folded" and len(plan.live) > 1:
        raise UsageError(
            f"--scaling {options.scaling}: {len(plan.live)} inputs have scales of their own"
        )
    plan = replace(plan, scaling=options.scaling).measured_by(options.weighting)
    scales = {part.site.scale for module in plan.modules for part in module.parts}
    if plan.dialect == "mlx" and len(scales) > 1:
        plan = replace(plan, scaling="folded")  # its config has one for all modules
    if options.ranks.is_ragged and not says_ranks(plan):
        raise UsageError(
            f"loaders of {plan.dialect} files take one rank for all modules; --ragged, --allocate "
            "global and the --sv rules make several",
            hint="leave them away, or write --to peft or kohya",
        )
    if options.engine is None:
        return plan, None
    from adapterops.basemodel.shapes import load  # what few runs need is imported when it is
    from adapterops.serving.legal import legal_form

    form = legal_form(
        options.engine,
        {module.stem: (module.shape, module.layer) for module in plan.modules},
        plan.dtype,
        keep=options.dtype == "keep",
        base=None if options.base is None else load(os.fspath(options.base)).shapes,
    )
    zeros = (Module(stem, "peft", "linear", size, (), ()) for stem, size in form.fill.items())
    modules = sorted((*plan.modules, *zeros), key=lambda module: module.stem)
    return replace(plan, modules=tuple(modules), dtype=form.dtype, listed_targets=True), form


def check_engine(
    form: LegalForm, output: Layout, name: str, *, directory: bool, side_files: Sequence[str]
) -> tuple[str, ...]:
    """What the engine would say of the output; raises IncompatibleError where it would not do."""
    from adapterops.serving.legal import check
    from adapterops.serving.written import as_written

    text = output.files[peft.CONFIG] if directory else output.metadata[METADATA_KEY]
    draft = as_written(
        output.tensors,
        json.loads(text),
        weights_file=name,
        config_file=peft.CONFIG if directory else None,
        side_files=side_files,
    )
    return (*form.notes, *check(draft, form.engine.name))


def is_copy(plan: Plan, options: Options) -> bool:
    """One adapter with coefficient 1, nothing cut, no other format: its bytes are the result."""
    keeps_kinds = options.verb in ("merge", "calc") and plan.dialect not in DIRECTORIES
    return (
        options.ranks in (Ranks(), Ranks(as_stored=True))
        and (options.form, options.engine) == ("balanced", None)
        and options.scaling == ("folded" if options.verb in ("merge", "calc") else "keep")
        and options.dtype == "keep"
        and plan.dialect == plan.inputs[0].dialect
        and all(
            len(module.parts) == 1
            and module.parts[0].coefficient == module.parts[0].site.scale
            and (module.parts[0].site.kind == "lora" or keeps_kinds)
            and "base" not in module.parts[0].site.parts
            and not module.leaves
            for module in plan.modules
        )
        and not any(delta.factors for delta in plan.deltas)
        and plan.whole_tensors
        and [weight for weight in plan.weights if weight] == [1.0]
        and all(module.columns for module in plan.modules)
        and not any(
            part.site.alpha_given and part.site.dialect not in DIRECTORIES
            for module in plan.modules
            for part in module.parts
        )
    )


def is_bounded(plan: Plan, options: Options) -> bool:
    """Whether all that is stored are balanced factors, whose rounding has a bound."""
    return (
        (options.form, plan.scaling) == ("balanced", "folded")
        and options.weighting.name != "activation"
        and not plan.deltas
        and is_exact(plan)
    )


def is_exact(plan: Plan) -> bool:
    """Whether every module is cut by its own singular values, none by a range finder."""
    return not any(
        module.inputs is None and (is_dense(module) or module.columns > LARGE)
        for module in plan.modules
    )


def provenance_of(
    inputs: Sequence[AdapterFile], weights: Sequence[float], options: Options, on: Compute
) -> Provenance:
    """What an output made so will carry: hashes of the inputs, weights and options."""
    chosen = options.ranks
    recorded = {
        **{name: value for name, value in asdict(chosen).items() if value != _DEFAULTS[name]},
        "form": None if options.form == "balanced" else options.form,
        "scaling": None if options.scaling == "folded" else options.scaling,
        "metric": None if options.weighting.name == "frobenius" else options.weighting.name,
        "engine": options.engine,
        "modules": options.modules,
        "extras": None if options.extras == "error" else options.extras,
        "dtype": None if options.dtype == "keep" else options.dtype,
        "to": options.to,
        "alpha": given_alphas(inputs) or None,
        "labels": given_labels(inputs),
        **options.recorded,
    }
    return Provenance(options.verb, origins_of(inputs, weights, on), recorded)


def origins_of(
    inputs: Sequence[AdapterFile], weights: Sequence[float], on: Compute
) -> tuple[Origin, ...]:
    """The inputs by name and hash, with their weights."""
    names = distinct([label_of(file) for file in inputs])
    hashed = iter(passes.sha256s([f.weights_file for f in inputs if not f.identity], on))
    hashes = [file.identity or next(hashed) for file in inputs]
    return tuple(
        Origin(name, sha256, weight, file_sha256(file.config_file) if file.config_file else None)
        for file, name, sha256, weight in zip(inputs, names, hashes, weights, strict=True)
    )


def dry_run(plan: Plan, out: str, size: int, extras: Mapping[str, str]) -> PlanReport:
    """What `--dry-run` returns."""
    modules = {}
    for module in plan.modules:
        widths = [0] * len(plan.inputs)
        for part in module.parts:
            widths[part.input] = part.site.rank
        modules[module.stem] = (module.shape, tuple(widths))
    for delta in plan.deltas:
        shape = (delta.shape[0], math.prod(delta.shape[1:])) if delta.shape else (1, 1)
        modules[delta.name] = (shape, tuple([0] * len(plan.inputs)))
    return PlanReport(
        out,
        plan.dialect,
        format_name(plan.dtype),
        plan.rank,
        size,
        modules,
        ranks={module.stem: module.kept for module in plan.modules},
        dropped=tuple(module.stem for module in plan.modules if not module.kept),
        extras=extras,
    )
