"""What one engine would reject, misread or only serve on a condition, of one adapter file."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from adapterops.errors import UsageError
from adapterops.formats.model import AdapterFile
from adapterops.serving import (
    features,
    lorax,
    modules,
    numbers,
    portable,
    sglang,
    trtllm,
    vllm,
)
from adapterops.serving.advice import WAYS_OUT
from adapterops.serving.finding import Finding, Findings
from adapterops.serving.model import Engine, Objection, Row

ENGINES: Mapping[str, Engine] = MappingProxyType(
    {
        engine.name: engine
        for engine in (
            vllm.ENGINE,
            sglang.ENGINE,
            lorax.LORAX,
            lorax.TGI,
            trtllm.ENGINE,
            portable.ENGINE,
        )
    }
)
ROWS: tuple[Row, ...] = (
    *vllm.ROWS,
    *sglang.ROWS,
    *lorax.LORAX_ROWS,
    *lorax.TGI_ROWS,
    *trtllm.ROWS,
    *portable.ROWS,
)
_BY_RULE = {(row.engine, row.rule): row for row in ROWS}
_GRAVEST_FIRST = ("reject", "misread", "note")


def engine_named(name: str) -> Engine:
    """The engine of that name; raises UsageError for an unknown one."""
    if name not in ENGINES:
        raise UsageError(f"engine {name!r}: expected one of {', '.join(ENGINES)}")
    return ENGINES[name]


def behaviour(engine: Engine, rule: str) -> str:
    """What `engine` does where a file breaks `rule`, "" where it does not mind.

    For the portable profile what the first engine that minds does.
    """
    minded = [row for row in ROWS if row.rule == rule]
    rows = [row for row in minded if row.engine == engine.name]
    if engine.name == "portable":
        rows += minded
    return f"{ENGINES[rows[0].engine].title} {rows[0].version} {rows[0].does}" if rows else ""


def judge(
    file: AdapterFile,
    engine: str,
    *,
    max_lora_rank: int | None = None,
    tensor_parallel: int = 1,
) -> list[Objection]:
    """What `engine` would do wrongly with `file`, gravest first; nothing is read but `file`.

    `max_lora_rank` is the engine's limit as it is started, its default if None; `tensor_parallel`
    the number of GPUs that share a model, which some engines pad ranks by. "portable" asks all
    engines and the portable profile. Raises UsageError for an unknown engine.
    """
    profile = engine_named(engine)
    if engine == "portable":
        asked = [name for name in ENGINES if name != engine]
        found = [
            objection
            for name in asked
            for objection in judge(
                file, name, max_lora_rank=max_lora_rank, tensor_parallel=tensor_parallel
            )
        ]
        found += _objections(profile, numbers.profile(file, profile))
    else:
        found = _objections(profile, _find(file, profile, max_lora_rank, tensor_parallel))
    return sorted(found, key=lambda objection: _GRAVEST_FIRST.index(objection.severity))


def _find(
    file: AdapterFile, engine: Engine, max_lora_rank: int | None, tensor_parallel: int
) -> Findings:
    """All findings in a file, those about names, ranks and scales by the engine's measure."""
    dialects = sorted({site.dialect for site in file.sites.values()})
    if dialects not in ([], ["peft"]):
        yield Finding("dialect", f"its names are those of {' and '.join(dialects)}, expected peft")
        return
    plain = modules.layers(file.sites.values())
    taken = [site for site in plain if modules.is_taken(site, engine)]
    scaled = taken + [
        site
        for site in file.sites.values()
        if modules.vocabulary_layer(site) in engine.vocabulary_layers
    ]
    yield from features.files(file, engine)
    yield from features.config_fields(file, engine)
    yield from features.kinds(file)
    yield from features.extras(file, engine)
    yield from modules.names(plain, engine)
    yield from modules.vocabulary(file, engine)
    yield from modules.experts(file)
    yield from modules.siblings(file, taken, engine)
    yield from modules.missing_layers(taken, engine)
    yield from numbers.ranks(file, engine, max_lora_rank, tensor_parallel)
    yield from numbers.mixed_ranks(file, taken, engine, tensor_parallel)
    yield from numbers.scales(file, scaled, engine, tensor_parallel)


def _objections(engine: Engine, found: Findings) -> list[Objection]:
    """The findings that the engine has a row for."""
    return [
        _objection(engine, _BY_RULE[engine.name, finding.rule], finding)
        for finding in found
        if (engine.name, finding.rule) in _BY_RULE
    ]


def _objection(engine: Engine, row: Row, finding: Finding) -> Objection:
    todo = finding.todo or WAYS_OUT[row.rule]
    return Objection(
        rule=row.rule,
        severity=row.severity,
        engine=engine.name,
        message=f"{finding.detail}: {engine.title} {engine.version} {row.does}; {todo}",
        modules=finding.modules,
        version=row.version,
        source=row.source,
        evidence=row.evidence,
    )
