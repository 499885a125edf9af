"""An engine's data, a row of what it does with a file that does not fit, and an objection."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

# Stops with an error; serves something else than PEFT would; serves it on a condition, at a cost.
Severity = Literal["reject", "misread", "note"]
# The source was read only, or its function was also run: alone, on tiny tensors, no server.
Evidence = Literal["read", "run"]
# How an engine finds the scale of a module.
# "config": as PEFT does. "global": the config's one alpha / r. "tensor": the config's one alpha,
# each tensor's rank. "padded": one alpha / r, where r becomes the padded rank of the types before.
Scaling = Literal["config", "global", "tensor", "padded"]
# What GPU memory is paid for: slots of the largest rank, or the adapters that are loaded.
Memory = Literal["slots", "adapters", "unknown"]

_ANY = re.compile(r".+")


@dataclass(frozen=True, slots=True)
class Engine:
    """What one engine takes, at the version whose source was read.

    `dated` is the date of that version, `read` the day it was read. `weights` are the file names it
    opens (patterns), `required` the config keys without which it stops. `ranks` are the ranks that
    a file may have, `slots` those of the memory it reserves (empty: any), `default_rank` the limit
    without its `rank_flag`; `padding` is (least rank per GPU, multiple above it), `fastest_rank`
    the last one per GPU that its kernels take. `inits` are the names of init_lora_weights it takes,
    None if it never looks. `names` are the factor tensors it recognises (`named` says how),
    `modules` the last parts of module names (None: every linear layer of the model), `order` that
    in which it loads them. `siblings` are the modules that one cannot be without, `fill` the groups
    that a writer completes with zeros; `every_layer`: a kind of module must be in all layers.
    `vocabulary_layers` ("embedding", "lm-head") are those whose factors it serves, `heads` the
    extras. `slot_dtypes` hold the factors on the GPU.
    """

    name: str
    title: str
    version: str
    dated: str
    read: str
    weights: tuple[str, ...]
    required: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    default_rank: int | None = None
    rank_flag: str = ""
    padding: tuple[int, int] | None = None
    fastest_rank: int | None = None
    uniform_rank: bool = False
    prefix: bool = False
    scaling: Scaling = "config"
    reads_rslora: bool = True
    rounds_scale: bool = False
    inits: frozenset[str] | None = None
    names: re.Pattern[str] = _ANY
    named: str = ""
    modules: frozenset[str] | None = None
    order: tuple[str, ...] = ()
    siblings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fill: tuple[tuple[str, ...], ...] = ()
    every_layer: bool = False
    vocabulary_layers: frozenset[str] = frozenset()
    heads: re.Pattern[str] | None = None
    max_vocabulary: int | None = None
    slot_dtypes: tuple[str, ...] = ("BF16", "F16")
    memory: Memory = "unknown"

    @property
    def largest_rank(self) -> int | None:
        """The largest rank that a file may have, None where there is no limit but memory."""
        limited = self.ranks or self.slots
        return limited[-1] if limited else None

    def padded_rank(self, rank: int, tensor_parallel: int = 1) -> int:
        """The rank that factors of `rank` are padded to when they are loaded."""
        if self.padding is None:
            return rank
        least, multiple = self.padding
        least *= tensor_parallel
        return least if rank <= least else -(-rank // multiple) * multiple

    def slot_rank(self, rank: int, tensor_parallel: int = 1) -> int | None:
        """The rank that memory is paid for, None if the engine has no slot that large."""
        if not self.slots:
            return self.padded_rank(rank, tensor_parallel)
        return min((slot for slot in self.slots if slot >= rank), default=None)

    def legal_rank(self, rank: int, tensor_parallel: int = 1) -> int | None:
        """The smallest uniform rank from `rank` on that a file should have, None if there is none.

        Where an engine pads on load, only ranks that it leaves alone: it loses the scale otherwise.
        """
        least = self.padded_rank(max(rank, 1), tensor_parallel)
        legal = min((r for r in self.ranks or (least,) if r >= least), default=None)
        return None if legal is None or self.slot_rank(legal) is None else legal


@dataclass(frozen=True, slots=True)
class Row:
    """One engine's behaviour: `does` completes a sentence that begins with its name and version.

    `source` is file: function at `version`.
    """

    engine: str
    version: str
    rule: str
    severity: Severity
    does: str
    source: str
    evidence: Evidence = "read"


@dataclass(frozen=True, slots=True)
class Objection:
    """What an engine would do wrongly with one adapter, or only on a condition.

    `message` says what, where, both values and what to do; `modules` are the stems concerned.
    """

    rule: str
    severity: Severity
    engine: str
    message: str
    modules: tuple[str, ...]
    version: str
    source: str
    evidence: Evidence


def gpu_bytes(
    engine: Engine,
    shapes: Iterable[tuple[int, int]],
    *,
    adapters: int,
    rank: int,
    itemsize: int = 2,
) -> int | None:
    """GPU memory that factors take on one GPU without tensor parallelism.

    itemsize · adapters · rank · Σ(out + in). `shapes` are (out, in). With slots (vLLM's max_loras,
    SGLang's max_loras_per_batch) they are those of every module of the model that the engine
    prepares, whatever an adapter holds, and `rank` is the maximum; else those of one adapter, and
    `rank` its own. None where the formula is not known or no slot is that large. (vLLM
    `lora/layers/base_linear.py: create_lora_weights`; SGLang `lora/mem_pool.py: init_buffers`,
    whose fused buffers hold one A per projection, the same sum; LoRAX `adapters/lora.py`.)
    """
    slot = engine.slot_rank(rank)
    if engine.memory == "unknown" or slot is None:
        return None
    return itemsize * adapters * slot * sum(out + columns for out, columns in shapes)
