"""The output's ranks, from what the user asked for."""

from __future__ import annotations

from adapterops.choosing.allocated import allocated
from adapterops.choosing.known import Choice, Known
from adapterops.choosing.ragged import ragged
from adapterops.choosing.uniform import uniform
from adapterops.descriptions import says_ranks
from adapterops.errors import UsageError
from adapterops.plan import Plan
from adapterops.ranks import Ranks

__all__ = ["Choice", "Known", "check_size", "choose_ranks"]

_WHOLE = "; bake BASE … --method writes all of it, --space core or knots is of low rank"


def check_size(plan: Plan, chosen: Ranks) -> None:
    """Refuse a lossless result that would be larger than the dense deltas.

    It concerns sums whose rank outgrows every input's, and kinds whose factors are larger than
    what they were made from; a single plain LoRA is never refused.
    """
    plain = all(part.site.kind == "lora" for module in plan.modules for part in module.parts)
    if chosen.target or not plan.modules or (plain and plan.bound <= plan.input_rank):
        return
    full = _as_stored(plan) if chosen.as_stored else (plan.bound,) * len(plan.modules)
    parameters = plan.parameters(full)
    if parameters >= plan.dense:
        raise UsageError(
            f"without a rank the result may need rank {max(full)} and "
            f"{parameters:,} numbers, the dense weight changes themselves have "
            f"{plan.dense:,}",
            hint="choose --rank N, --energy E or --max-error X" + _WHOLE * _any_dense(plan),
        )


def _any_dense(plan: Plan) -> bool:
    parts = (part for module in plan.modules for part in module.parts)
    return any(part.site.kind == "elementwise" for part in parts)


def choose_ranks(chosen: Ranks, known: Known) -> Choice:
    """The ranks that `chosen` means. Raises BudgetError where none will do."""
    if not known.plan.modules:
        return Choice(())
    if chosen.as_stored:
        return Choice(_as_stored(known.plan))
    if chosen.allocate == "global":
        return allocated(chosen, known)
    if chosen.is_ragged:
        return Choice(ragged(chosen, known))
    rank = uniform(chosen, known)
    return Choice((rank,) * len(known.plan.modules))


def _as_stored(plan: Plan) -> tuple[int, ...]:
    """Every module's columns; of those that share tensors, or all where need be, the most."""
    result = [
        module.columns if [p.site.kind for p in module.parts] == ["lora"] else module.bound
        for module in plan.modules
    ]
    for members in plan.groups if says_ranks(plan) else [list(range(len(result)))]:
        most = max(result[i] for i in members)
        for i in members:
            result[i] = most
    return tuple(result)
