"""What an output must be like for an engine to serve it right: its ranks, zeros and number format.

`legal_form` decides before anything is read, `check` asks the engine's own rows about the output as
it will be written: what they would reject or misread is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adapterops.casts import format_name
from adapterops.errors import (
    AdapterOpsError,
    BudgetError,
    IncompatibleError,
    UsageError,
)
from adapterops.files.source import MemoryFile
from adapterops.formats import peft
from adapterops.formats.model import AdapterFile, Layer, Ref, Site
from adapterops.serving.finding import few
from adapterops.serving.model import Engine, Objection
from adapterops.serving.modules import is_taken, layers
from adapterops.serving.objections import behaviour, engine_named, judge
from adapterops.serving.zeros import (
    LAYERS,
    SIBLINGS,
    BaseShapes,
    Shape,
    layer_counts,
    zero_modules,
)

_GPUS = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class LegalForm:
    """An output that `engine` serves: alpha = rank, one rank for all modules, PEFT's directory.

    `fill` are modules to be written as zeros, stem -> (out, in), all of them linear; `dtype` is the
    storage type of all factors; `notes` say what was added or changed and what is not known.
    """

    engine: Engine
    fill: Mapping[str, Shape]
    dtype: str
    notes: tuple[str, ...]

    def rank_for(self, needed: int) -> int | None:
        """The smallest legal rank from `needed` on, None if there is none."""
        return self.engine.legal_rank(needed)

    def beyond(self, needed: int, *, asked: bool = False) -> AdapterOpsError:
        """The error for a rank that is too large: BudgetError, UsageError if the user `asked`."""
        engine = self.engine
        most = engine.largest_rank
        message = f"rank {needed} is more than {engine.title} {engine.version} serves"
        flag = f" ({engine.rank_flag} {most})" if engine.rank_flag else ""
        listed = f" (of {', '.join(map(str, engine.ranks))})" if engine.ranks else flag
        hint = f"the largest is --rank {most}{listed}"
        if asked:
            return UsageError(message, hint=hint)
        return BudgetError(f"{message}, and no smaller one will do", hint=hint)


def legal_form(
    engine: str,
    modules: Mapping[str, tuple[Shape, Layer]],
    dtype: str,
    *,
    keep: bool = True,
    base: BaseShapes | None = None,
) -> LegalForm:
    """What an output with `modules`, stem -> ((out, in), layer), must be like for `engine`.

    `dtype` is the storage type that it would have, `keep` whether it is only the input's. `base`
    are the shapes of the base model's weights by module path in its own names, if it is known.
    Raises UsageError for an unknown engine and IncompatibleError, naming the module and --base, for
    a module of zeros whose shape is not known.
    """
    spec = engine_named(engine)
    served = _served(modules, spec)
    zeros = zero_modules(served, spec, base)
    notes = []
    for rule in (SIBLINGS, LAYERS):
        added = [stem for stem, zero in zeros.items() if zero.rule == rule]
        if added:
            notes.append(f"{few(added)} added as zeros: {behaviour(spec, rule)}")
    counts = layer_counts(served) if spec.every_layer and base is None else {}
    if counts:
        named = ", ".join(f"{count} of {prefix}" for prefix, count in counts.items())
        notes.append(
            f"layers are counted by what the adapter names ({named}), --base tells how many there "
            f"are: {behaviour(spec, LAYERS)}"
        )
    stored, note = _storage(dtype, keep, spec)
    notes += [note] if note else []
    fill = {stem: zero.shape for stem, zero in zeros.items()}
    return LegalForm(spec, fill, stored, tuple(notes))


def _storage(dtype: str, keep: bool, engine: Engine) -> tuple[str, str]:
    """The type to store, and what to say of it where no slot of the engine has the planned one."""
    if dtype in engine.slot_dtypes:
        return dtype, ""
    slot, wide = engine.slot_dtypes[0], format_name(dtype)
    refusal = behaviour(engine, "dtype")
    if keep and refusal:
        return slot, f"{wide} is stored as {format_name(slot)}: {refusal}"
    return dtype, (
        f"{wide} factors are rounded to the model's own type when they are loaded, which the "
        f"errors here do not include; --dtype {format_name(slot)} rounds them here"
    )


def _served(modules: Mapping[str, tuple[Shape, Layer]], engine: Engine) -> dict[str, Shape]:
    """The ordinary linear modules that `engine` takes, under the names they have in PEFT."""
    nowhere = MemoryFile(peft.WEIGHTS, b"")
    sites = []
    for stem, (shape, layer) in modules.items():
        if layer != "linear" or "[" in stem:
            continue
        names = peft.names(stem, layer)
        parts = {
            "A": Ref(nowhere, names["A"], "BF16", (1, shape[1]), 0, 0),
            "B": Ref(nowhere, names["B"], "BF16", (shape[0], 1), 0, 0),
        }
        sites.append(Site(stem, "peft", "lora", layer, shape, (), 1, 1, parts))
    return {site.stem: site.shape for site in layers(sites) if is_taken(site, engine)}


def check(file: AdapterFile, engine: str) -> tuple[str, ...]:
    """Notes about an output that `engine` serves, on what condition and at what cost.

    `file` is the output as `written.as_written` describes it. Raises IncompatibleError for what the
    engine would reject or misread, with the first reason and the way out.
    """
    found = judge(file, engine)
    wrong = [objection for objection in found if objection.severity != "note"]
    if wrong:
        rules = dict.fromkeys(o.rule for o in wrong if o.rule != wrong[0].rule)
        more = f" (and more: {', '.join(rules)})" if rules else ""
        raise IncompatibleError(f"--engine {engine}: {wrong[0].message}{more}")
    spread = (o for gpus in _GPUS for o in _grave(file, engine, gpus))
    notes = [o.message for o in found] + [o.message for o in spread][:1]
    return tuple(dict.fromkeys(notes))


def _grave(file: AdapterFile, engine: str, gpus: int) -> list[Objection]:
    """What would go wrong on several GPUs."""
    return [o for o in judge(file, engine, tensor_parallel=gpus) if o.severity != "note"]
