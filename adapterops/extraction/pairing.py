"""The tensors of two checkpoints side by side, under the module paths that a loader knows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from adapterops.basemodel import BaseModel, renamed
from adapterops.casts import READABLE
from adapterops.errors import IncompatibleError, UnsupportedError
from adapterops.extraction.readers import ties
from adapterops.formats import diffusers
from adapterops.formats.model import Ref

# Buffers that some versions of a library save and others do not.
_BUFFER = re.compile(
    r"(.*\.)?(position_ids|token_type_ids|inv_freq|num_batches_tracked|masked_bias|causal_mask)$"
    r"|(.*\.)?h\.\d+\.(attn|attention|crossattention)\.bias$"
)
_OLD_NORM = {"gamma": "weight", "beta": "bias"}  # TensorFlow's names, in checkpoints of BERT
_ROOTS = {"gpt2": "transformer", "bloom": "transformer", "bert": "bert", "roberta": "roberta"}
_SGM = ("model.diffusion_model.", "first_stage_model.", "conditioner.", "cond_stage_model.")
_BFL = ("double_blocks.", "single_blocks.")
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Pair:
    """One tensor of both models, by its path; `tied` if it is the head too, stored once.

    `grown` is how many rows of a larger vocabulary the tuned model added.
    """

    name: str
    base: Ref
    tuned: Ref
    tied: bool = False
    grown: int = 0

    @property
    def module(self) -> str:
        """The path of the module that it is a parameter of."""
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """The parameter's own name: weight, bias, …"""
        return self.name.rpartition(".")[2]


def pairs(base: BaseModel, tuned: BaseModel, wanted: Callable[[str], bool]) -> list[Pair]:
    """Every tensor that both have, in the tuned model's order; `wanted` chooses by module path.

    A buffer that one side lacks is left out, a head that one side ties is compared with the
    embedding. Raises IncompatibleError, naming the first few, where tensors or shapes differ, and
    UnsupportedError for quantised weights and single files with SGM's or Black Forest Labs' names.
    """
    for model in (base, tuned):
        model.check_not_quantised()
        _check_names(model)
    if base.is_pipeline != tuned.is_pipeline:
        one, other = (base, tuned) if base.is_pipeline else (tuned, base)
        raise IncompatibleError(
            f"{one.path} is a pipeline of several models, {other.path} a single model",
            hint="name the folder of the one component in both",
        )
    heads = (renamed.HEADS.get(model.architecture) for model in (base, tuned))
    head = next(filter(None, heads), ("", ""))
    names_b, names_t = _same_root(_names(base, *head), _names(tuned, *head))
    mine, theirs = _with_heads(base, names_b, names_t), _with_heads(tuned, names_t, names_b)
    common = _parts(base, tuned)
    chosen = {
        name
        for name in {*mine, *theirs}
        if wanted(name.rpartition(".")[0]) and (common is None or name.partition(".")[0] in common)
    }
    _check_same(base, tuned, chosen & mine.keys(), chosen & theirs.keys())
    tied = _tied(base, tuned, theirs)
    return [
        Pair(name, mine[name], ref, name == tied, _grown(base, tuned, name, mine[name], ref))
        for name, ref in theirs.items()
        if name in chosen
    ]


def _check_names(model: BaseModel) -> None:
    single = [name for name in model.tensors if name.startswith(_SGM + _BFL)]
    if single:
        who = "Black Forest Labs'" if single[0].startswith(_BFL) else "SGM's"
        raise UnsupportedError(
            f"is a single file with {who} names ({single[0]!r}), which adapters do not use",
            path=model.path,
            hint="convert both to diffusers folders (from_single_file, save_pretrained)",
        )


def _names(model: BaseModel, stored: str, known: str) -> dict[str, Ref]:
    """Tensors by a loader's names, without buffers; one that starts as `stored` is `known`.

    Norms have their present names; a model of a class with a head has the word that its body goes
    by, which checkpoints saved from the body alone lack.
    """
    result = {}
    root = _ROOTS.get(str(model.config.get("model_type")), "")
    bare = not any(name.startswith(f"{root}.") for name in model.tensors)
    lacking = root and bare and (model.is_causal or "For" in model.architecture)
    for name, ref in model.tensors.items():
        if _BUFFER.match(name) or ref.dtype in ("I64", "BOOL"):
            continue
        if lacking and not model.is_head(name):
            name = f"{root}.{name}"
        if stored and name.startswith(stored):
            name = known + name.removeprefix(stored)
        head, dot, leaf = name.rpartition(".")
        result[f"{head}{dot}{_OLD_NORM.get(leaf, leaf)}"] = ref
    return result


def _same_root(
    one: Mapping[str, Ref], other: Mapping[str, Ref]
) -> tuple[dict[str, Ref], dict[str, Ref]]:
    """Both under the longer names, where one model was saved without its task's head.

    Such a checkpoint lacks a leading word (`transformer.`, `bert.`) that a loader puts there.
    """
    if 2 * len(one.keys() & other.keys()) >= min(len(one), len(other)):
        return dict(one), dict(other)
    turned = len(max(one, key=len, default="")) > len(max(other, key=len, default=""))
    short, long = (other, one) if turned else (one, other)
    roots = {name.partition(".")[0] for name in long}
    best = max(roots, key=lambda root: sum(f"{root}.{n}" in long for n in short), default="")
    longer = {(f"{best}.{n}" if f"{best}.{n}" in long else n): ref for n, ref in short.items()}
    return (dict(one), longer) if turned else (longer, dict(other))


def _with_heads(
    model: BaseModel, names: Mapping[str, Ref], others: Mapping[str, Ref]
) -> dict[str, Ref]:
    """The names with a head that only the other model stores: here it is the embedding."""
    result = dict(names)
    heads = [name for name in others if model.is_head(name) and name not in names]
    if heads and model.embedding and (model.is_tied or not model.config):
        result[heads[0]] = model.tensors[model.embedding]
    return result


def _tied(base: BaseModel, tuned: BaseModel, theirs: Mapping[str, Ref]) -> str | None:
    """The embedding that is the head of both models and stored once, None where it is none."""
    if not (ties(base) and ties(tuned)) or any(tuned.is_head(name) for name in theirs):
        return None
    ref = tuned.tensors[tuned.embedding or ""]
    return next(name for name, other in theirs.items() if other is ref)


def _parts(base: BaseModel, tuned: BaseModel) -> set[str] | None:
    """The models of two pipelines that are compared: those that both have.

    A model that an adapter could change must be in both.
    """
    if not base.is_pipeline:
        return None
    lacking = (base.configs.keys() ^ tuned.configs.keys()) & set(diffusers.COMPONENTS)
    if lacking:
        has = base if min(lacking) in base.configs else tuned
        raise IncompatibleError(
            f"only {has.path} has the model {min(lacking)!r}",
            path=(tuned if has is base else base).path,
            hint="fetch it, or name the folder of the one component in both",
        )
    return set(base.configs) & set(tuned.configs)


def _check_same(base: BaseModel, tuned: BaseModel, mine: set[str], theirs: set[str]) -> None:
    if not mine and not theirs:
        return
    if not mine & theirs:
        first, second = min(mine, default="none"), min(theirs, default="none")
        raise IncompatibleError(
            f"no tensor of {tuned.path} is in {base.path}: {second!r} here, {first!r} there",
            hint="are they checkpoints of the same model, before and after training?",
        )
    for one, other, only in ((tuned, base, theirs - mine), (base, tuned, mine - theirs)):
        if only:
            shown = ", ".join(repr(name) for name in sorted(only)[:_SHOWN])
            more = f" and {len(only) - _SHOWN} more" if len(only) > _SHOWN else ""
            raise IncompatibleError(
                f"{one.path} has {shown}{more}, {other.path} lacks them",
                hint="are they checkpoints of the same model? --modules chooses those to compare",
            )


def _grown(base: BaseModel, tuned: BaseModel, name: str, one: Ref, other: Ref) -> int:
    """How many rows were added to a vocabulary; raises where shapes differ otherwise."""
    for ref, model in ((one, base), (other, tuned)):
        if ref.dtype not in READABLE:
            raise UnsupportedError(
                f"{name!r} is of type {ref.dtype}, which is no floating-point weight",
                path=model.path,
            )
    if one.shape == other.shape:
        return 0
    counted = tuned.is_head(name) or tuned.is_tokens(other.name)
    rows = counted and one.shape[1:] == other.shape[1:]
    if rows and other.shape[0] > one.shape[0]:
        return other.shape[0] - one.shape[0]
    shrunk = "; the vocabulary shrank" if rows else ""
    raise IncompatibleError(
        f"{base.path} has {_size(one.shape)}, {tuned.path} has {_size(other.shape)}{shrunk}; are "
        "they checkpoints of the same model, before and after training?",
        module=name,
    )


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
