"""PEFT: a directory with `adapter_model.safetensors` and `adapter_config.json`.

Keys are `base_model.model.` + module path + `.lora_A.weight`; the scale is in the config, by rank
and alpha patterns. (peft 0.21.2, `tuners/lora/config.py`, `utils/other.py:get_pattern_key`.)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from adapterops.errors import FormatError, UnsafeFileError, UnsupportedError

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
KINDS = ("LORA", "LOHA", "LOKR", "ADALORA")  # values of `peft_type` that have a low-rank delta
BIASES = ("none", "lora_only", "all")  # values of `bias`, each trains what those before it do

# Initialisations whose tensors are relative to a changed base; the others leave the base alone.
_MOVED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
WITH_BASE = "convert it to a LoRA beside its base model (convert --base)"
_LISTS = ("modules_to_save", "target_parameters", "enable_lora")
_REFUSED_FIELDS = {
    "alora_invocation_tokens": (
        "aLoRA",
        "it applies to part of the tokens only; serve it as it is",
    ),
    "use_bdlora": ("BD-LoRA", "its factors are block-diagonal"),
    "use_qalora": ("QA-LoRA", "its A is grouped"),
    "kasa_config": ("KaSA", "it also changes the base"),
    "arrow_config": ("Arrow", "it routes between adapters at run time"),
    "layer_replication": ("layer replication", "its layers have no weights of their own"),
    "monteclora_config": ("MonteCLoRA", "its factors are sampled"),
    "velora_config": ("VeLoRA", "its factors are compressed"),
}


def listed(config: Mapping[str, Any], name: str) -> list[Any]:
    """A list in the config, empty where there is none or something else."""
    value = config.get(name)
    return value if isinstance(value, list) else []


def read_config(text: bytes | str, path: str) -> dict[str, Any]:
    """An adapter_config.json, duplicate keys refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise FormatError("a key appears twice in the config", path=path)
        return result

    try:
        config = json.loads(text, object_pairs_hook=unique)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the config is not valid JSON ({error})", path=path) from None
    if not isinstance(config, dict):
        raise FormatError("the config is not a JSON object", path=path)
    return config


def check_supported(config: Mapping[str, Any], path: str) -> None:
    """Raise UnsupportedError for a config whose adapter has no low-rank delta, on no base."""
    kind = str(config.get("peft_type") or "LORA").upper()
    if kind not in KINDS:
        raise UnsupportedError(
            f"this is a {kind} adapter, not a LoRA",
            path=path,
            hint=f"read are {', '.join(sorted(KINDS))}",
        )
    for name in _LISTS:
        value = config.get(name)
        if value is not None and not isinstance(value, list):
            raise FormatError(f"{name} in the config is {value!r}, not a list", path=path)
    for name, (what, way) in _REFUSED_FIELDS.items():
        if config.get(name):
            raise UnsupportedError(
                f"this is {what} ({name} is set), not a plain LoRA; {way}", path=path
            )


def check_unmoved(config: Mapping[str, Any], path: str) -> None:
    """Raise UnsupportedError for a config whose delta follows from the base's weights alone."""
    if config.get("use_dora"):
        raise UnsupportedError(
            f"this is DoRA (use_dora is set), not a plain LoRA; {WITH_BASE}", path=path
        )
    init = moved_base(config)
    if init:
        raise UnsupportedError(
            f"trained with init_lora_weights={init!r}: its tensors are relative to a base that the "
            "initialisation changed",
            path=path,
            hint=WITH_BASE,
        )


def moved_base(config: Mapping[str, Any]) -> str:
    """The initialisation that changed the base, "" if none did."""
    init = config.get("init_lora_weights")
    return init if isinstance(init, str) and init.lower().startswith(_MOVED_BASE) else ""


# Repetition of a repetition, such as (a+)+, is how a pattern is made to run for ever.
NESTED = re.compile(r"[*+}]\)[*+{]")
LONGEST_PATTERN = 1000


class Scales:
    """Scale of each module from a config: alpha / r, or alpha / √r for rsLoRA, by the patterns.

    LoHa and LoKr call lora_alpha `alpha`. AdaLoRA divides by init_r + 1e-5, whatever rank pruning
    has left (peft 0.21.2, `adalora/layer.py:get_delta_weight`; its rank_pattern holds masks).
    """

    def __init__(
        self, config: Mapping[str, Any], path: str, notes: list[str] | None = None
    ) -> None:
        self._path = path
        kind = str(config.get("peft_type") or "LORA").upper()
        self._pruned = kind == "ADALORA"
        self._ranks = Patterns({} if self._pruned else config, "rank_pattern", path)
        self._alphas = Patterns({} if self._pruned else config, "alpha_pattern", path)
        self._rank = _number(config, "init_r" if self._pruned else "r", path)
        self.alpha_key = "alpha" if kind in ("LOHA", "LOKR") else "lora_alpha"
        self._alpha = _number(config, self.alpha_key, path)
        self._stabilised = bool(config.get("use_rslora"))
        self._notes = [] if notes is None else notes

    @property
    def has_patterns(self) -> bool:
        """Whether modules of one rank may differ in scale."""
        return bool(self._ranks) or bool(self._alphas)

    @property
    def known(self) -> bool:
        """Whether the config says an alpha at all."""
        return self._alpha is not None

    def rank(self, module: str, actual: int) -> float | None:
        """The rank that the config expects of a module whose tensors have rank `actual`.

        JSON is saved sorted, so the order in which patterns were written is lost: where several
        match, the one that the tensors agree with was meant.
        """
        if self._pruned and self._rank is not None and actual <= self._rank:
            return float(actual)
        if not self._ranks:
            return self._rank
        values = self._ranks.values(target_path(module))
        if actual in values:
            return float(actual)
        return values[0] if values else self._rank

    def alpha(self, module: str) -> float:
        """The alpha of `module`; only where `known`."""
        alpha = self._alpha
        if self._alphas:
            alpha = self._match(module, alpha)
        assert alpha is not None
        return alpha

    def scaled(self, alpha: float, rank: int) -> float:
        """The factor of B·A for an alpha, of a module of this rank."""
        if self._pruned:
            whole = self._rank if self._rank is not None else float(rank)
            return (alpha if alpha > 0 else whole) / (whole + 1e-5)
        root = math.sqrt(rank) if self._stabilised else rank
        return alpha / root if rank else 1.0

    def _match(self, module: str, default: float | None) -> float | None:
        values = self._alphas.values(target_path(module))
        if len(set(values)) > 1:
            self._notes.append(
                f"{self._path}: alpha_pattern gives module {module} the values {values}; "
                f"PEFT takes the first, {values[0]}"
            )
        return values[0] if values else default


class Patterns:
    """rank_pattern or alpha_pattern: expressions to numbers, by PEFT's rule of matching.

    Expressions for one whole path, as we write them, are looked up; only others are tried.
    """

    def __init__(self, config: Mapping[str, Any], name: str, path: str) -> None:
        self._exact: dict[str, tuple[int, float]] = {}
        self._others: list[tuple[int, re.Pattern[str], float]] = []
        given = config.get(name) or {}
        if not isinstance(given, dict):
            raise FormatError(f"{name} in the config is not a JSON object", path=path)
        for place, pattern in enumerate(given):
            value = _number(given, pattern, path) or 0.0
            plain = pattern[1:].replace("\\", "")
            if pattern == "^" + re.escape(plain):
                self._exact[plain] = (place, value)
            else:
                self._others.append((place, _compiled(pattern, name, path), value))

    def __bool__(self) -> bool:
        return bool(self._exact or self._others)

    def values(self, path: str) -> list[float]:
        """The values of all patterns that match."""
        found = [self._exact[path]] if path in self._exact else []
        found += [(place, value) for place, pattern, value in self._others if pattern.match(path)]
        return [value for _, value in sorted(found)]


def _compiled(pattern: str, name: str, path: str) -> re.Pattern[str]:
    if not is_safe_pattern(pattern):
        raise UnsafeFileError(
            f"{name} {pattern[:80]!r} could take forever to match (nested repetition)", path=path
        )
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise FormatError(
            f"{name} {pattern!r} is no regular expression ({error})", path=path
        ) from None


def _number(config: Mapping[str, Any], name: str, path: str) -> float | None:
    value = config.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FormatError(f"{name} in the config is {value!r}, not a number", path=path)
    return float(value)


def module_path(stem: str) -> str:
    """The module's path in the base model: the key without its prefix."""
    return stem.removeprefix(PREFIX)


def target_path(module: str) -> str:
    """The path that PEFT matches targets and patterns against.

    A MultiheadAttention `x` carries the factors of its output projection at
    `x.base_layer.out_proj`, a module that `target_modules: [x]` and x's patterns stand for.
    """
    return module.partition(".base_layer.")[0]


def is_safe_pattern(pattern: str) -> bool:
    """Whether an expression of unknown origin is short and repeats no repetition."""
    return len(pattern) <= LONGEST_PATTERN and not NESTED.search(pattern)


def tails(path: str) -> list[str]:
    """The ends of a path that a listed name may match: `b.c` and `c` of `a.b.c`, and all of it."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def is_target(module: str, config: Mapping[str, Any]) -> bool:
    """Whether `target_modules` name a module, listed or by an expression."""
    given = config.get("target_modules")
    if isinstance(given, str):
        try:
            return is_safe_pattern(given) and re.fullmatch(given, module) is not None
        except re.error:
            return False
    return not set(map(str, listed(config, "target_modules"))).isdisjoint(tails(module))


def extra_name(name: str, modules: Collection[str]) -> str:
    """The saved name of a trained bias beside LoRA on `modules`.

    PEFT moves an adapted layer's own bias below `base_layer`; which layers are adapted may differ
    between an input and the result.
    """
    owner, _, leaf = name.removeprefix(PREFIX).rpartition(".")
    plain = owner.removesuffix(".base_layer")
    moved = leaf == "bias" or (leaf == "weight" and owner != plain)
    if not moved or not name.startswith(PREFIX):
        return name
    return f"{PREFIX}{plain}{'.base_layer' if plain in modules else ''}.{leaf}"


def names(module: str, layer: str) -> dict[str, str]:
    """The saved names of a module's tensors."""
    if layer == "embedding":
        return {side: f"{PREFIX}{module}.lora_embedding_{side}" for side in "AB"}
    return {
        "A": f"{PREFIX}{module}.lora_A.weight",
        "B": f"{PREFIX}{module}.lora_B.weight",
        "bias": f"{PREFIX}{module}.lora_B.bias",
    }
