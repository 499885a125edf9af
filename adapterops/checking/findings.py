"""What `check` can find: a table of codes, and a finding as an instance of one of them.

The codes are stable: scripts filter by them. A code has one severity and one scope: a defect of a
file, or of files that do not go together (a set, a base model, the inputs a file was made from).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from adapterops.errors import AdapterOpsError, FileError, FormatError, IncompatibleError

# Wrong or unusable; probably not what was meant, or harmful with some tool; worth knowing.
Severity = Literal["error", "warning", "note"]
Scope = Literal["file", "set"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table; `exit_code` is the command's where the finding counts as an error."""

    code: str
    severity: Severity
    scope: Scope
    meaning: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found: what, where, both values, what to do.

    `rule` says which of an engine's dated rules speaks ("vllm 0.33.0: dora"), else "".
    """

    code: str
    severity: Severity
    message: str
    path: str | None = None
    module: str | None = None
    hint: str | None = None
    rule: str = ""

    @property
    def exit_code(self) -> int:
        """What the command exits with if this finding counts as an error."""
        return RULES[self.code].exit_code


Findings = Iterator[Finding]


def finding(
    code: str,
    message: str,
    *,
    path: str | None = None,
    module: str | None = None,
    hint: str | None = None,
    rule: str = "",
) -> Finding:
    """A finding of a code of the table, with its severity."""
    return Finding(code, RULES[code].severity, message, path, module, hint, rule)


def few(names: list[str] | tuple[str, ...], shown: int = 3) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def plural(count: int, what: str) -> str:
    """The number with its noun: 1 module, 2,000 modules."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


_FILE = FormatError.exit_code
_SET = IncompatibleError.exit_code
_CODES: tuple[tuple[str, Severity, Scope, str], ...] = (
    # files and their structure
    ("unreadable", "error", "file", "missing, a folder without permission, a failing disk"),
    ("out-of-memory", "error", "file", "the machine had too little memory to check it"),
    ("unexpected", "error", "file", "a defect of adapterops met while checking it"),
    ("remark", "warning", "file", "what else the reader of adapters warns of"),
    ("malformed", "error", "file", "a header or a tensor that no reader can make sense of"),
    ("truncated", "error", "file", "shorter than its header says, or empty"),
    ("unsafe", "error", "file", "what only an attack would look like: hostile names, holes, bombs"),
    ("lfs-pointer", "error", "file", "a Git LFS pointer or a web page in place of the file"),
    ("pickle", "error", "file", "a PyTorch pickle, not read without --allow-pickle"),
    ("not-an-adapter", "error", "file", "no tensor of it is a factor"),
    ("several-files", "error", "file", "a folder with several adapters and no main one"),
    ("half-pair", "error", "file", "a module has A without B, or B without A"),
    ("factor-shapes", "error", "file", "the factors of a module do not multiply"),
    ("factor-type", "error", "file", "factors of a type that is none of numbers: integers, codes"),
    ("unknown-tensor", "error", "file", "a tensor of an adapted module is of no known kind"),
    ("several-adapters", "error", "file", "one file holds tensors of several adapters"),
    ("named-twice", "error", "file", "one module is named twice, in two spellings"),
    ("orphan-alpha", "error", "file", "an alpha without factors"),
    ("factors-and-diff", "error", "file", "a module has factors and a full delta; one is ignored"),
    ("experts", "error", "file", "experts in one tensor whose layout nothing decides"),
    ("not-a-delta", "note", "file", "healthy, but no low-rank delta: DoRA, OFT, PiSSA …"),
    ("mixed-dialects", "note", "file", "its modules are named in several dialects"),
    ("mixed-formats", "note", "file", "its factors are stored in several number formats"),
    ("doubled-prefix", "warning", "file", "a doubled prefix (lora_unet_unet_): loaders miss it"),
    ("missing-modules", "warning", "file", "a layer lacks what nearly all others have"),
    ("stray-tensor", "warning", "file", "a tensor that no loader of the dialect knows"),
    # scale
    ("no-scale", "error", "file", "nothing says the scale"),
    ("scales-disagree", "error", "file", "two places say different scales"),
    ("alpha-zero", "error", "file", "alpha 0: loaders differ on what it means"),
    ("rank-config", "error", "file", "the config's rank is not that of the tensors"),
    ("scale-extreme", "warning", "file", "a scale above 100 or below 0.001"),
    ("scale-assumed", "note", "file", "nothing says the scale; the dialect's convention is 1"),
    ("rslora", "note", "file", "scaled by √r (use_rslora), which some engines do not read"),
    ("mlx-alpha", "note", "file", "MLX: an alpha beside `scale`, without effect"),
    # numbers
    ("non-finite", "error", "file", "NaN or infinite values"),
    ("beyond-float16", "warning", "file", "values that become infinite in float16"),
    ("subnormal", "warning", "file", "most values of a tensor below its format's normal range"),
    ("zero-adapter", "warning", "file", "ΔW is zero in every module: it changes nothing"),
    ("zero-part", "warning", "file", "ΔW is zero in one whole component (text encoder, U-Net)"),
    ("dead-modules", "warning", "file", "ΔW of some modules is zero"),
    ("diverged", "warning", "file", "ΔW dwarfs any base weight"),
    ("outlier-modules", "warning", "file", "ΔW of a module far beyond the others'"),
    ("constant", "warning", "file", "all values of a factor are equal and not zero"),
    ("equal-columns", "warning", "file", "equal rows of A or columns of B: less rank than stored"),
    ("equal-modules", "warning", "file", "modules with the same factors, bit for bit"),
    # files beside the weights, the config against the tensors
    ("stale-twin", "warning", "file", "another adapter beside it under a similar name"),
    ("twin-copy", "note", "file", "a copy of the same tensors beside it"),
    ("renamed-weights", "warning", "file", "weights under a name that no loader opens"),
    ("config-missing", "warning", "file", "no adapter_config.json: base, task, heads unknown"),
    (
        "config-broken",
        "error",
        "file",
        "a config that is no JSON, or a field of a wrong type",
    ),
    ("config-shared", "note", "file", "the config beside it is taken to be its own"),
    ("config-key", "note", "file", "a key that PEFT does not know: dropped on load"),
    ("config-default", "warning", "file", "a key is missing whose default does not fit"),
    ("repeated-entry", "note", "file", "a list of the config names something twice"),
    ("empty-list", "note", "file", "[] where null is meant"),
    ("base-path", "warning", "file", "the base model is named by a path of somebody's machine"),
    ("unmatched-target", "warning", "file", "target_modules names what the file has not"),
    ("untargeted", "warning", "file", "modules that target_modules leaves out: ignored on load"),
    ("unmatched-pattern", "warning", "file", "a rank or alpha pattern that matches nothing"),
    ("pattern-conflict", "warning", "file", "two patterns give one module different values"),
    ("layer-unlisted", "warning", "file", "a module in a layer that layers_to_transform excludes"),
    ("layer-empty", "warning", "file", "layers_to_transform lists layers without modules"),
    ("fan-in-fan-out", "warning", "file", "contradicts how the base stores its weights"),
    ("head-unlisted", "warning", "file", "a saved head that the config does not name"),
    ("head-missing", "warning", "file", "the config promises a head that is not there"),
    ("bias-unlisted", "warning", "file", "biases that the config says were not trained"),
    ("bias-missing", "note", "file", "the config says biases were trained; there are none"),
    ("dora-incomplete", "error", "file", "DoRA whose magnitudes are missing"),
    ("dora-unlisted", "warning", "file", "magnitudes, and use_dora is not set: ignored on load"),
    ("token-rows", "error", "file", "trained token rows and their list differ in number"),
    ("added-tokens", "warning", "file", "tokens beyond the saved embedding"),
    # engines
    ("engine-reject", "error", "file", "the engine stops with an error"),
    ("engine-misread", "error", "file", "the engine serves something else without a word"),
    ("engine-note", "note", "file", "the engine serves it on a condition or at a cost"),
    # the base model (--base)
    ("base-module", "error", "set", "a module that the base has not"),
    ("base-shape", "error", "set", "a module whose shape is not that of the base's weight"),
    ("base-names", "error", "set", "no module's name occurs in the base"),
    ("base-place", "error", "set", "nothing says which weights of the base modules are"),
    ("base-fused", "warning", "set", "modules that the base has fused with others, or in pieces"),
    ("base-kernel", "warning", "set", "matrices as factors where the base has a convolution"),
    ("base-orientation", "warning", "set", "fan_in_fan_out contradicts the base's shapes"),
    ("base-square", "note", "set", "square weights whose orientation only the flag says"),
    ("base-tied", "warning", "set", "embedding and head are one weight in the base"),
    ("base-packed", "note", "set", "quantised weights whose shapes cannot be compared"),
    ("base-coverage", "note", "set", "what of the base the adapter leaves alone"),
    # provenance (--recompute)
    ("recompute-equal", "note", "set", "computed again: the same bytes"),
    ("recompute-close", "warning", "set", "computed again: equal to within storage rounding"),
    ("recompute-differs", "error", "set", "computed again: another adapter"),
    ("recompute-inputs", "error", "set", "inputs of its provenance were not found by their hash"),
    ("recompute-failed", "error", "set", "its provenance cannot be followed"),
    ("recompute-none", "note", "set", "no provenance of adapterops"),
    # between adapters
    ("duplicate", "warning", "set", "adapters that are the same in everything"),
    ("duplicate-tensors", "warning", "set", "the same tensors under other names or metadata"),
    ("duplicate-factors", "note", "set", "the same factors beside another head or scale"),
    ("base-conflict", "error", "set", "one base name, different shapes of one module"),
    ("base-aliases", "note", "set", "one set of shapes under several base names"),
    ("mixed-ranks", "warning", "set", "ranks that an engine serves together at the largest"),
)
_EXITS = {"unreadable": FileError.exit_code, "out-of-memory": 7, "unexpected": 1}

RULES: Mapping[str, Rule] = {
    code: Rule(
        code,
        severity,
        scope,
        meaning,
        _EXITS.get(code, _FILE if scope == "file" else _SET),
    )
    for code, severity, scope, meaning in _CODES
}


def of_error(code: str, error: AdapterOpsError) -> Finding:
    """What an error says, as a finding."""
    return finding(code, error.message, path=error.path, module=error.module, hint=error.hint)
