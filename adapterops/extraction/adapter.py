"""The difference of two checkpoints as an adapter, none of which has been computed yet."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapterops.basemodel import BaseModel, renamed, same_bytes
from adapterops.errors import IncompatibleError, UnsupportedError, UsageError
from adapterops.extraction.pairing import Pair, pairs
from adapterops.extraction.policies import Fate, Kind, check_policies, decide
from adapterops.extraction.rounding import coarsest
from adapterops.files.source import Source
from adapterops.formats import diffusers, peft
from adapterops.formats.model import AdapterFile, Layer, Ref, Site
from adapterops.operators import Difference, check_finite
from adapterops.stream import Compute, Job, run

Progress = Callable[[str, int, int], None]
_COMPARED = 8 << 20  # bytes that comparing two tensors needs
_HEAD = "lm_head"  # what a model that ties its head calls it
_LAYERS: Mapping[Kind, Layer] = {"conv": "conv", "embedding": "embedding"}


@dataclass(frozen=True, slots=True)
class Extraction:
    """What an extraction writes, and what of it a user should know.

    `dtype` is the storage type that most of the tuned model's changed matrices have, `rounded` the
    one whose rounding the difference is judged against. `dropped` are tensors that differ and are
    left out by policy; `unchanged` modules are equal bit by bit, and --modules leaves `outside` of
    them out unseen.
    """

    file: AdapterFile
    dropped: tuple[str, ...]
    unchanged: int
    rounded: str
    dtype: str
    outside: int


def difference(
    base: BaseModel,
    tuned: BaseModel,
    *,
    modules: str | None,
    vectors: str,
    embeddings: str,
    to: str | None = None,
    on: Compute,
    progress: Progress | None = None,
) -> Extraction:
    """tuned − base, tensor by tensor; reads no more than it takes to see which are equal.

    With `to` "peft" a part of a pipeline is a model of its own, whose names PEFT knows.

    Raises IncompatibleError where the models do not go together or nothing differs,
    UnsupportedError for what an adapter cannot hold.
    """
    check_policies(vectors, embeddings)
    wanted = _wanted(modules)
    every = pairs(base, tuned, wanted)
    changed = _changed(every, on, progress)
    if not every:
        raise UsageError(
            f"--modules {modules!r} matches none of the modules as a whole",
            hint=f"the first is {_owners(tuned)[0]!r}",
        )
    if not changed:
        raise IncompatibleError(
            f"nothing differs: {len(every)} tensors are the same in {base.path}",
            path=tuned.path,
            hint="is it the checkpoint after training?" if modules is None else None,
        )
    part = "" if to == "peft" else _component(tuned) or _component(base)
    dialect = "diffusers" if tuned.is_pipeline or part else "peft"
    named = [replace(pair, name=f"{part}.{pair.name}") for pair in changed] if part else changed
    fate = decide(named, every, tuned, dialect, vectors, embeddings)
    sites, extras = _sites(fate, dialect), _extras(fate, every)
    for ref in extras.values():
        check_finite(ref, ref.shape[0] if ref.shape else 1, ref.name.rpartition(".")[0])
    known = {pair.module for pair in every if len(pair.tuned.shape) > 1}
    differ = {pair.module for pair in changed}
    file = AdapterFile(
        path=f"{_last(tuned.name)} − {_last(base.name)}",
        source=changed[0].tuned.source,
        dialect=dialect,
        sites=sites,
        extras=extras,
        tensors={pair.tuned.name: pair.tuned for pair, _ in fate.factors},
        config=_config(fate, sites, every, base) if dialect == "peft" else {},
        notes=_warnings(fate, base, tuned, dialect),
        base=_called(base),
        identity=hashlib.sha256(f"{tuned.identity} {base.identity}".encode()).hexdigest(),
        files=tuple(dict.fromkeys((*tuned.files, *base.files))),
    )
    return Extraction(
        file=file,
        dropped=tuple(fate.dropped),
        unchanged=len(known - differ),
        dtype=_commonest(fate),
        rounded=coarsest([pair for pair, _ in fate.factors]),
        outside=sum(not wanted(owner) for owner in _owners(tuned)),
    )


def _wanted(pattern: str | None) -> Callable[[str], bool]:
    if pattern is None:
        return lambda module: True
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--modules {pattern!r} is no regular expression ({error})") from None
    return lambda module: compiled.fullmatch(module) is not None


def _owners(model: BaseModel) -> list[str]:
    """The modules that have parameters."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in model.tensors))


def _changed(every: Sequence[Pair], on: Compute, progress: Progress | None) -> list[Pair]:
    """The pairs whose values differ somewhere."""
    jobs = (Job(pair.name, differs, (pair,), _COMPARED) for pair in every)
    found = []
    for done, (pair, differ) in enumerate(zip(every, run(jobs, on), strict=True), start=1):
        if differ:
            found.append(pair)
        if progress:
            progress("comparing", done, len(every))
    return found


def differs(pair: Pair) -> bool:
    """Whether two tensors differ; reads up to the first difference."""
    one, other = pair.base, pair.tuned
    if one.shape != other.shape:
        return True
    if one.dtype == other.dtype:
        return not same_bytes(one, other)
    width = max(1, math.prod(one.shape[1:]))
    shape = (math.prod(one.shape) // width, width)
    site = _site(pair, "", "peft", "linear", shape, turned=False)
    operator = Difference(site)
    step = max(1, (1 << 18) // width)
    return any(
        bool((operator.rows(start, min(start + step, shape[0])) != 0).any())
        for start in range(0, shape[0], step)
    )


def _component(model: BaseModel) -> str:
    """The component of a pipeline that a single model is, "" for a language model."""
    if model.is_pipeline:
        return ""
    kind = str(model.config.get("_class_name") or "")
    if kind.startswith("UNet"):
        return "unet"
    if "Transformer" in kind:
        return "transformer"
    if kind:
        raise UnsupportedError(
            f"is a {kind}, for which there are no LoRA files",
            path=model.path,
            hint="a U-Net, a transformer or a text encoder can have one",
        )
    first = next(iter(model.tensors), "").rpartition(".")[0]
    return "unet" if diffusers.canonical(first).startswith("unet.") else ""


def _sites(fate: Fate, dialect: str) -> dict[str, Site]:
    """The modules that become factors; a head that is the embedding is one of its own too."""
    sites: dict[str, Site] = {}
    for pair, kind in fate.factors:
        shape = pair.tuned.shape
        matrix = (shape[0], math.prod(shape[1:]))
        turned = kind in ("conv1d", "embedding")
        size = matrix[::-1] if turned else matrix
        layer = _LAYERS.get(kind, "linear")
        sites[pair.module] = _site(
            pair, pair.module, dialect, layer, size, turned=turned, kernel=shape[2:]
        )
        if pair.tied:
            sites[_HEAD] = _site(pair, _HEAD, dialect, "linear", matrix, turned=False)
    return sites


def _site(
    pair: Pair,
    stem: str,
    dialect: str,
    layer: Layer,
    shape: tuple[int, int],
    *,
    turned: bool,
    kernel: tuple[int, ...] = (),
) -> Site:
    refs = {"tuned": pair.tuned, "base": pair.base}
    return Site(
        stem=stem,
        dialect=dialect,
        kind="difference",
        layer=layer,
        shape=shape,
        kernel=kernel,
        rank=min(shape),
        dim=min(shape),
        parts={role: replace(ref, shape=shape, transposed=turned) for role, ref in refs.items()},
        scale=1.0,
        scale_from="the weights themselves",
    )


def _extras(fate: Fate, every: Sequence[Pair]) -> dict[str, Ref]:
    """Whole modules and single biases under PEFT's names; a tied embedding is the head too."""
    saved = {pair.name: pair.tuned for pair in fate.biases}
    for pair in every:
        if pair.module in fate.modules:
            saved[pair.name] = pair.tuned
            if pair.tied:
                saved[f"{_HEAD}.weight"] = pair.tuned
    return {f"{peft.PREFIX}{name}": ref for name, ref in saved.items()}


def _config(
    fate: Fate, sites: Mapping[str, Site], every: Sequence[Pair], base: BaseModel
) -> dict[str, Any]:
    """What PEFT's loader must know: how weights lie, which modules are saved whole, the task."""
    owners = {path for pair in every for path in _ancestors(pair.module)}
    saved = [*fate.modules]
    if any(pair.tied and pair.module in fate.modules for pair in every):
        saved.append(_HEAD)
    return {
        "target_modules": _short(sites, owners, lambda path, name: f".{path}".endswith(f".{name}")),
        "modules_to_save": _short(saved, owners, str.endswith),
        "bias": "all" if fate.biases else "none",
        "fan_in_fan_out": any(kind == "conv1d" for _, kind in fate.factors),
        "task_type": _task(base),
    }


def _task(model: BaseModel) -> str | None:
    """The class of PEFT's that wraps the model, None for the plain one.

    PEFT's of sequences to sequences calls the model with input_ids: only an encoder that embeds
    tokens takes these, one of audio or images does not.
    """
    if model.is_causal:
        return "CAUSAL_LM"
    reads = any(
        f".{name}".endswith((".shared.weight", ".encoder.embed_tokens.weight"))
        for name in model.tensors
    )
    texts = reads and model.architecture.endswith("ForConditionalGeneration")
    return "SEQ_2_SEQ_LM" if texts else None


def _short(
    chosen: Collection[str], known: Collection[str], matches: Callable[[str, str], bool]
) -> list[str]:
    """Last words of paths where these name no other module too, else whole paths.

    A number in a list may be that of a module without parameters, which is not known here. PEFT
    compares modules_to_save with the ends of paths as text, target_modules from a dot on.
    """
    leaves = {path.rpartition(".")[2] for path in chosen}
    safe = {
        leaf
        for leaf in leaves
        if not leaf.isdigit() and all(path in chosen for path in known if matches(path, leaf))
    }
    return sorted({leaf if (leaf := path.rpartition(".")[2]) in safe else path for path in chosen})


def _ancestors(path: str) -> list[str]:
    """A module's path and those of the modules that it is in."""
    words = path.split(".")
    return [".".join(words[: count + 1]) for count in range(len(words))]


def _commonest(fate: Fate) -> str:
    counts: Counter[str] = Counter()
    for pair, _ in fate.factors:
        counts[pair.tuned.dtype] += math.prod(pair.tuned.shape)
    return max(counts, key=lambda name: (counts[name], name), default="F32")


def _warnings(fate: Fate, base: BaseModel, tuned: BaseModel, dialect: str) -> tuple[str, ...]:
    result = _names_warnings(fate, tuned) if dialect == "peft" else []
    if fate.resized:
        result.append(
            f"the vocabulary grew: call resize_token_embeddings({fate.resized}) on the base model "
            "before this adapter is loaded"
        )
    kinds = [model.architecture for model in (base, tuned)]
    if all(kinds) and kinds[0] != kinds[1]:
        result.append(f"{base.path} is a {kinds[0]}, {tuned.path} a {kinds[1]}")
    return tuple(result)


def _names_warnings(fate: Fate, model: BaseModel) -> list[str]:
    """Where loaders have other names for modules than the checkpoint, and an adapter its names."""
    kind = str(model.config.get("model_type"))
    prefix = renamed.PREFIXES.get(model.architecture)
    paths = [*(pair.module for pair, _ in fate.factors), *fate.modules]
    result = []
    if kind in renamed.RENAMED or (prefix and any(path.startswith(prefix) for path in paths)):
        result.append(
            f"transformers 5 has other names for modules of a {kind} than its files, and PEFT "
            "finds not all of the files', which this adapter has: load it once and see whether "
            "keys are missing; if so, rename its modules as model.named_modules() has them"
        )
    if kind == "whisper" and any(each == "conv" for _, each in fate.factors):
        result.append(
            "Whisper's encoder reads the stride of its convolutions, which PEFT's LoRA of one "
            "lacks: leave conv1 and conv2 out with --modules"
        )
    return result


def _called(model: BaseModel) -> str:
    """What loaders call the base: the name it was saved under, unless that is a path of its own."""
    named = str(model.config.get("_name_or_path") or "")
    return model.name if not named or named.startswith(("/", "~", ".")) or "\\" in named else named


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def sources(model: BaseModel) -> list[Source]:
    """The open files of a model."""
    return list({id(ref.source): ref.source for ref in model.tensors.values()}.values())
