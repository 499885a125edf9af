"""Tensors that adapters carry whole: heads, biases, norms, token rows, resized vocabularies.

They are values, not changes: they replace what the base has, whatever the adapter's weight.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapterops import casts
from adapterops.basemodel import BaseModel
from adapterops.changes.sameness import same_numbers
from adapterops.changes.targets import Values
from adapterops.changes.untying import head_name, is_shared
from adapterops.changes.vocabulary import is_tokens
from adapterops.errors import FormatError, IncompatibleError
from adapterops.extras import Extra, Policy, plan_extras
from adapterops.formats import peft
from adapterops.formats.model import AdapterFile, Ref

# PEFT 0.21.2 saves the rows of `trainable_token_indices` below the module (`utils/other.py`,
# TrainableTokensWrapper); dumps of live models have more of it.
_ROWS = re.compile(r"(?P<owner>.+?)(\.token_adapter)?\.trainable_tokens_delta(\.default)?")
_OWN_COPY = re.compile(r".*\.(original_module|trainable_tokens_original)\b.*")
_LIVE = re.compile(r"\.(modules_to_save(\.default)?|token_adapter)(?=\.)")
_BENEATH = ".base_layer."
_TASK_HEADS = ("score", "classifier", "qa_outputs")
_TOKEN_ROWS = " (token rows)"

TensorOf = Callable[[AdapterFile, str], str | None]


@dataclass(frozen=True)
class Valued:
    """The tensors of the result that get values, by name; names of extras left out; notes."""

    values: Mapping[str, Values]
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def values(
    base: BaseModel,
    inputs: Sequence[AdapterFile],
    weights: Sequence[float],
    policy: Policy,
    tensor_of: TensorOf,
) -> Valued:
    """What the inputs' extras give the result's tensors, by the `policy` where several do.

    `tensor_of` gives the base's name for a parameter's path as an adapter spells it (without
    PEFT's prefix), None where the base has none: a head is then added. The type is that of the
    tensor replaced, of a new one the base's commonest. Raises IncompatibleError for extras that do
    not fit the base, FormatError for token rows that contradict their config.
    """
    counted = [file for file, weight in zip(inputs, weights, strict=True) if weight]
    if policy == "drop":
        return Valued({}, tuple(sorted({name for file in counted for name in file.extras})))
    weights = [weight for weight in weights if weight]
    files = [replace(file, extras=_placed(base, file, tensor_of)) for file in counted]
    owners = {id(ref): file for file in files for ref in file.extras.values()}
    extras, _ = plan_extras(files, weights, policy, lambda name: name)
    whole = {extra.name: extra for extra in extras if not extra.name.endswith(_TOKEN_ROWS)}
    found = {name: _whole(base, extra) for name, extra in whole.items()}
    for extra in extras:
        if extra.name not in whole:
            name = extra.name.removesuffix(_TOKEN_ROWS)
            found[name] = _rows(base, name, extra, owners[id(extra.refs[0])], found.get(name))
    notes = _weighted(files, weights) if extras else []
    return Valued(found, (), (*notes, *_described(base, found)))


def started(base: BaseModel, found: Mapping[str, Values]) -> BaseModel:
    """The base with what adapters saved beneath their own factors (a resized embedding) in place.

    Factors of such a module have the shape of the tensor saved, not of the base's.
    """
    own = {
        name: value.extra.refs[0]
        for name, value in found.items()
        if value.rows is None and _BENEATH in value.extra.refs[0].name
    }
    return replace(base, tensors={**base.tensors, **own}) if own else base


def _placed(base: BaseModel, file: AdapterFile, tensor_of: TensorOf) -> dict[str, Ref]:
    """An adapter's extras by the result's names; without copies of what the base has."""
    placed: dict[str, Ref] = {}
    for saved, ref in file.extras.items():
        if _OWN_COPY.fullmatch(saved):
            continue
        name = _place(base, file, saved, ref, tensor_of)
        if name is None:
            continue
        if name in placed and not same_numbers(placed[name], ref):
            raise FormatError(
                f"has {placed[name].name!r} and {saved!r}, which are both {name!r} and differ",
                path=file.path,
            )
        placed[name] = ref
    return placed


def _place(
    base: BaseModel, file: AdapterFile, saved: str, ref: Ref, tensor_of: TensorOf
) -> str | None:
    """The result's name of one extra; None for a copy of the base's weight beneath factors."""
    path = saved.removeprefix(peft.PREFIX)
    rows = _ROWS.fullmatch(path)
    path = f"{rows['owner']}.weight" if rows else _LIVE.sub("", path)
    path = path.replace(_BENEATH, ".")
    name = tensor_of(file, path)
    start = base.tensors[name] if name is not None else None
    if name is None:
        is_head = base.is_head(path) and is_shared(base)
        if not is_head and not _is_new_head(file, path):
            raise IncompatibleError(
                f"carries {saved!r}, for which {base.path} has no tensor",
                path=file.path,
                hint="is it an adapter of this model? --extras drop leaves such tensors out",
            )
        name = head_name(base) if is_head else path
        start = base.tensors[base.embedding or ""] if is_head else None
    if rows:
        return name + _TOKEN_ROWS
    if _BENEATH in saved and saved.endswith(".weight") and start is not None:
        if same_numbers(ref, start):
            return None
        if not is_tokens(base, name):
            raise IncompatibleError(
                f"carries {saved!r}, the weight that it was trained on, and {base.path} has other "
                "numbers there",
                path=file.path,
                hint="give the base that it was trained on",
            )
    return name


def _is_new_head(file: AdapterFile, path: str) -> bool:
    """Whether a parameter is of a task's head, or a module that the config says is saved whole."""
    heads = {str(name) for name in peft.listed(file.config, "modules_to_save")}
    heads |= set(_TASK_HEADS) if file.config else set()
    return any(f".{head}." in f".{path}" for head in heads)


def _whole(base: BaseModel, extra: Extra) -> Values:
    """A tensor given all its values."""
    name, old = extra.name, base.tensors.get(extra.name)
    if old is None:
        shared = is_shared(base) and base.is_head(name)
        old = base.tensors[base.embedding or ""] if shared else None
    if old is None:
        _check_width(base, extra)
        number = extra.dtype in casts.FORMATS
        return Values(name, _commonest(base, name) if number else extra.dtype, extra.shape, extra)
    resized = is_tokens(base, name) and len(extra.shape) == len(old.shape) and extra.shape[0] > 0
    if extra.shape != old.shape and not (resized and extra.shape[1:] == old.shape[1:]):
        raise IncompatibleError(
            f"{name!r} has shape {list(old.shape)} in the base, {extra.refs[0].source.path} "
            f"carries it as {list(extra.shape)}",
            path=base.path,
            hint="are both of the same model? --extras drop leaves the base's",
        )
    if extra.dtype != old.dtype and not {extra.dtype, old.dtype} <= casts.FORMATS.keys():
        raise IncompatibleError(
            f"{name!r} is {old.dtype} in the base, {extra.refs[0].source.path} carries it as "
            f"{extra.dtype}",
            path=base.path,
            hint="--extras drop leaves the base's",
        )
    return Values(name, old.dtype, extra.shape, extra, None, old)


def _rows(
    base: BaseModel, name: str, extra: Extra, owner: AdapterFile, whole: Values | None
) -> Values:
    """A tensor given some of its rows, over the base's or over one that is carried whole too."""
    if whole is not None and len(whole.extra.refs) > 1:
        raise IncompatibleError(
            f"{name!r} is averaged, and {owner.path} trained some of its rows",
            hint="choose --extras first or drop",
        )
    start = whole.extra.refs[0] if whole else base.tensors.get(name)
    start = start or base.tensors[base.embedding or ""]
    tokens = tuple(_tokens(owner, extra.refs[0].name))
    if len(extra.shape) != 2 or len(start.shape) != 2 or extra.shape[1] != start.shape[1]:
        raise IncompatibleError(
            f"{extra.refs[0].name!r} has shape {list(extra.shape)}, {name!r} of the base "
            f"{list(start.shape)}",
            path=owner.path,
            hint="are both of the same model?",
        )
    if extra.shape[0] != len(tokens):
        raise FormatError(
            f"{extra.refs[0].name!r} has {extra.shape[0]} rows, trainable_token_indices lists "
            f"{len(tokens)} tokens",
            path=owner.path,
        )
    if tokens and max(tokens) >= start.shape[0]:
        raise IncompatibleError(
            f"trainable_token_indices has token {max(tokens)}, {name!r} of the base has "
            f"{start.shape[0]} rows",
            path=owner.path,
            hint="resize the base's vocabulary as in training, or give the base that was resized",
        )
    dtype = whole.dtype if whole else start.dtype
    return Values(name, dtype, start.shape, extra, tokens, start)


def _tokens(file: AdapterFile, saved: str) -> list[int]:
    """The tokens whose rows a tensor holds, in its order.

    The config lists them, for the embedding or by module (the end of its path). Raises FormatError
    for what is no list of different tokens: PEFT leaves open which of two equal ones counts.
    """
    given = file.config.get("trainable_token_indices")
    if isinstance(given, Mapping):
        match = _ROWS.fullmatch(saved)
        owner = match["owner"] if match else saved
        ends = [str(key) for key in given if f".{owner}".endswith(f".{key}")]
        given = given[max(ends, key=len)] if ends else None
    if given is None:
        raise FormatError(
            f"holds rows of an embedding ({saved!r}), and no trainable_token_indices of its "
            "config says of which tokens",
            path=file.path,
        )
    if not isinstance(given, list) or not all(_is_token(token) for token in given):
        raise FormatError(
            f"trainable_token_indices is {_short(given)}, no list of token numbers", path=file.path
        )
    twice = [token for token, count in Counter(given).items() if count > 1]
    if twice:
        raise FormatError(
            f"trainable_token_indices lists token {twice[0]} twice, and which of its rows counts "
            "is not defined",
            path=file.path,
        )
    return given


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}…"


def _check_width(base: BaseModel, extra: Extra) -> None:
    """Raise IncompatibleError for a new head on hidden states of another size."""
    hidden = base.configs.get(base.part(extra.name), {}).get("hidden_size")
    module = extra.name.removesuffix(".weight")
    reads_hidden = module.rpartition(".")[2] in _TASK_HEADS and module != extra.name
    if reads_hidden and isinstance(hidden, int) and extra.shape[1:] != (hidden,):
        raise IncompatibleError(
            f"{extra.name!r} has shape {list(extra.shape)}, the base's hidden size is {hidden}",
            path=extra.refs[0].source.path,
            hint="are both of the same model?",
        )


def _commonest(base: BaseModel, name: str) -> str:
    """The type that most of the base's numbers are in."""
    part = base.part(name)
    sizes: Counter[str] = Counter()
    for other, ref in base.tensors.items():
        if ref.dtype in casts.FORMATS and base.part(other) == part:
            sizes[ref.dtype] += ref.nbytes
    return sizes.most_common(1)[0][0] if sizes else "F32"


def _weighted(files: Sequence[AdapterFile], weights: Sequence[float]) -> list[str]:
    return [
        f"{file.path}: weight {weight:g} does not apply to the {len(file.extras)} tensors that it "
        "carries whole"
        for file, weight in zip(files, weights, strict=True)
        if file.extras and weight != 1.0
    ]


def _described(base: BaseModel, found: Mapping[str, Values]) -> Iterator[str]:
    """Notes on tensors that are new, resized or rounded."""
    new = [v for n, v in found.items() if n not in base.tensors and v.ref is None]
    for value in new:
        yield f"{value.name!r} of shape {list(value.shape)} is new: the base has no such tensor"
    for name, value in found.items():
        old = base.tensors.get(name)
        if old is not None and value.shape != old.shape:
            yield (
                f"{name!r} grows from {old.shape[0]} to {value.shape[0]} rows"
                if (value.shape[0] > old.shape[0])
                else f"{name!r} shrinks from {old.shape[0]} to {value.shape[0]} rows"
            )
    bits = {name: casts.FORMATS[name].bits for name in casts.FORMATS}
    rounded = [
        value
        for value in found.values()
        if bits.get(value.extra.dtype, 0) > bits.get(value.dtype, 64)
    ]
    if rounded:
        yield (
            f"{len(rounded)} tensors carried whole are rounded from "
            f"{casts.format_name(rounded[0].extra.dtype)} to "
            f"{casts.format_name(rounded[0].dtype)} ({rounded[0].name!r}, …)"
        )
