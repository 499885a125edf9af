"""A head that is the embedding's weight too, where adapters change one of the two alone.

What an adapter does beside such a base, unmerged, is what counts (peft 0.21.2): LoRA on one of the
two, or one of the two saved whole, leaves the other as it was; trained token rows are those of both
(`utils/other.py`, `should_apply_tying`); `ensure_weight_tying` gives both the same change. Merging
in memory folds it into both instead. Here both are written, and the configs untied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from adapterops.basemodel import BaseModel, outputs
from adapterops.basemodel.shapes import EMBEDDINGS
from adapterops.changes import entries, sameness, vocabulary
from adapterops.changes.targets import Target, Values
from adapterops.errors import IncompatibleError, UnsupportedError
from adapterops.extras import Extra
from adapterops.formats.model import AdapterFile, Ref

# Architectures (`model_type`) with a language model's head that is no `lm_head` beside the model:
# of transformers 5.23's causal and image-text classes, those whose `_tied_weights_keys` say so, and
# of which nobody has tried whether they can be untied (`outputs.APART`).
_OTHER_HEADS = frozenset(
    [
        *("rembert", "big_bird", "roc_bert", "xlm-roberta-xl", "xmod", "roberta-prelayernorm"),
        *("git", "blip", "rwkv", "prophetnet", "blt", "udop", "t5gemma2"),
    ]
)
_GENERATES = ("ForCausalLM", "LMHeadModel", "WithLMHead", "ForConditionalGeneration")
_MASKED = ("ForMaskedLM", "ForPreTraining")
_ROOTS = ("model", "transformer", "gpt_neox")  # what models with a head call the model below it
_HEADLESS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclass(frozen=True)
class Untied:
    """The changes with embedding and head apart where they must be; fields as in Changes.

    `config` has every entry that follows from the tensors: tied weights, vocabulary and labels.
    """

    targets: Mapping[str, Target]
    values: Mapping[str, Values]
    copies: Mapping[str, Ref] = field(default_factory=dict)
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def untie(
    base: BaseModel,
    targets: Mapping[str, Target],
    values: Mapping[str, Values],
    inputs: Sequence[AdapterFile] = (),
) -> Untied:
    """`targets` and `values` of a tied base so that the result does what the adapters do.

    A head that goes on following the embedding is dropped from them if the base does not store it.
    `inputs` say whether they keep the two tied (`ensure_weight_tying`), and whether their task has
    a language model's head. Raises UnsupportedError for a base that cannot be untied,
    IncompatibleError where embedding and head would have different numbers of tokens, or one
    adapter replaces what another changes.
    """
    targets, values = settled(targets, values)
    pair = _pair(base, [*targets, *values])
    found = Untied(targets, values)
    if pair is not None and not {*targets, *values}.isdisjoint(pair):
        found = _apart(base, pair, found, inputs)
    rows = {name: _rows(base, name, found) for name in pair or (base.embedding, base.head) if name}
    vocabulary.check(base, {name: count for name, count in rows.items() if count is not None})
    config = vocabulary.entries_of(base, found.values, found.targets)
    for part, given in found.config.items():
        config[part] = entries.merged(config.get(part, {}), given)
    return replace(found, config=config)


def settled(
    targets: Mapping[str, Target], values: Mapping[str, Values]
) -> tuple[dict[str, Target], dict[str, Values]]:
    """Targets that start from what an adapter saved beneath its own factors.

    Raises IncompatibleError for a tensor that is changed and replaced in any other way.
    """
    started = dict(targets)
    for name in targets.keys() & values.keys():
        ref = values[name].extra.refs[0]
        beneath = ".base_layer." in ref.name and len(values[name].extra.refs) == 1
        if not beneath or values[name].rows is not None or ref.nbytes == 0:
            raise IncompatibleError(
                f"{name!r} is changed by an adapter and replaced by values that {ref.source.path} "
                "carries",
                hint="bake one after the other, or choose --extras drop",
            )
        started[name] = replace(targets[name], ref=ref)
    return started, {name: value for name, value in values.items() if name not in targets}


def head_name(base: BaseModel) -> str:
    """What the tensor of the head is called, or would be if the base stored it."""
    if base.head is not None:
        return base.head
    named = outputs.head(base.config)
    if named:
        return f"{named}.weight"
    path = (base.embedding or "").split(".")
    above = next((path[:at] for at, part in enumerate(path) if part in _ROOTS), [])
    neox = str(base.config.get("model_type")).startswith("gpt_neox")
    return ".".join((*above, "embed_out" if neox else "lm_head", "weight"))


def is_shared(base: BaseModel) -> bool:
    """Whether the base has a head that is its embedding and is not stored by itself."""
    return base.head is None and _pair(base, ()) is not None


def _pair(base: BaseModel, names: Iterable[str]) -> tuple[str, str] | None:
    """Embedding and head of a base that ties them or may do so, as far as its files say."""
    if base.is_pipeline:
        return None
    said = entries.tied(base.config)
    if base.embedding is None:
        if said and base.head in set(names):
            raise UnsupportedError(
                f"stores its embedding as the head {base.head!r} only, which an adapter changes",
                path=base.path,
                hint="load it and save it again with transformers' save_pretrained",
            )
        return None
    if said is False:
        return None
    if base.head is not None:
        return base.embedding, base.head
    named = next((name for name in names if base.is_head(name)), None)
    masked = base.architecture.endswith(_MASKED)
    generates = said or masked or base.architecture.endswith(_GENERATES)
    unknown = not base.config and base.embedding.split(".")[-2] in EMBEDDINGS
    return (base.embedding, named or head_name(base)) if named or generates or unknown else None


def _apart(
    base: BaseModel, pair: tuple[str, str], found: Untied, inputs: Sequence[AdapterFile]
) -> Untied:
    """The two written apart, or as one where they stay equal."""
    embedding, head = pair
    stored = base.head is not None
    changed = [name for name in pair if name in found.targets or name in found.values]
    if len(changed) == 2 and sameness.equal(pair, found.targets, found.values):
        return found if stored else _without(found, head)
    notes: tuple[str, ...] = ()
    rows = found.values.get(embedding)
    if rows is not None and rows.rows is not None and head in found.targets:
        raise UnsupportedError(
            f"adapters train tokens of {embedding!r}, which {head!r} shares, and change the latter",
            hint="serve the adapters unmerged",
        )
    if changed == [embedding]:
        if rows is not None and rows.rows is not None:
            return _followed(base, found, rows, head) if stored else found
        if inputs and all(file.config.get("task_type") in _HEADLESS for file in inputs):
            return replace(found, notes=(_headless(pair),))
        if embedding in found.targets and _ensured(found.targets[embedding], inputs):
            if not stored:
                return found
            twin = replace(found.targets[embedding], name=head, ref=base.tensors[head])
            return replace(found, targets={**found.targets, head: twin})
    elif changed == [head] and head in found.targets and _ensured(found.targets[head], inputs):
        raise UnsupportedError(
            f"an adapter ties its changes of {embedding!r} and {head!r} (ensure_weight_tying), and "
            "holds the latter's only",
            hint="save it again with a current PEFT",
        )
    _check_can_be_untied(base, pair, changed)
    copies: dict[str, Ref] = {}
    values = dict(found.values)
    if head not in changed and not stored:
        start, own = _start(base, embedding, found), base.tensors[embedding]
        if start == own:
            copies[head] = own
        else:  # an adapter's copy, of another type perhaps
            extra = Extra(head, start.dtype, start.shape, (start,), (1.0,))
            values[head] = Values(head, own.dtype, start.shape, extra, None, own)
    which = "embedding and head differently" if len(changed) == 2 else f"{changed[0]!r} alone"
    notes += (
        f"{embedding!r} and {head!r} were one weight: the adapters change {which}, so both are "
        "written and tie_word_embeddings is false",
    )
    if "auto_map" in base.config:
        notes += (
            f"{base.architecture or 'the model'} is code of its own: load the result once to see "
            f"that it reads {head!r}",
        )
    config = {"": entries.untied(base.config)}
    return Untied(found.targets, values, copies, config, notes)


def _followed(base: BaseModel, found: Untied, rows: Values, head: str) -> Untied:
    """The changes with the embedding's token rows in the stored head too."""
    ref = base.tensors[head]
    if ref.shape != rows.shape:
        return found
    return replace(
        found, values={**found.values, head: replace(rows, name=head, dtype=ref.dtype, ref=ref)}
    )


def _start(base: BaseModel, embedding: str, found: Untied) -> Ref:
    """What the embedding was before its factors: an adapter's own copy, else the base's."""
    if embedding in found.targets:
        return found.targets[embedding].ref
    value = found.values.get(embedding)
    saved = value.extra.refs[0] if value is not None else base.tensors[embedding]
    return saved if ".base_layer." in saved.name else base.tensors[embedding]


def _without(found: Untied, name: str) -> Untied:
    """The changes without one tensor's."""
    return replace(
        found,
        targets={n: target for n, target in found.targets.items() if n != name},
        values={n: value for n, value in found.values.items() if n != name},
    )


def _headless(pair: tuple[str, str]) -> str:
    return (
        f"{pair[0]!r} is changed; the adapters' task has no language model's head, so none is "
        f"written apart from it: loaded as a causal model, the head would change too"
    )


def _ensured(target: Target, inputs: Sequence[AdapterFile]) -> bool:
    """Whether all that change a tensor keep the two tied."""
    changing = {t.input for t in target.terms} | {t.input for t in target.dense}
    return bool(inputs) and all(inputs[k].config.get("ensure_weight_tying") for k in changing)


def _check_can_be_untied(base: BaseModel, pair: tuple[str, str], changed: Sequence[str]) -> None:
    """Raise UnsupportedError where no config could say that the two are apart."""
    kind = base.config.get("model_type")
    if kind in outputs.APART and base.architecture.endswith((*_GENERATES, *_MASKED)):
        return
    what = f"its embedding {pair[0]!r} and its head are one weight, of which an adapter changes "
    what += "both differently" if len(changed) == 2 else f"{changed[0]!r} alone; "
    if not base.config:
        raise UnsupportedError(
            f"{what}no config.json beside it could say that they are apart",
            path=base.path,
            hint="name the model's folder",
        )
    own = outputs.head(base.config) is not None
    both = base.config.get("is_encoder_decoder") and not own
    if both or pair[0].split(".")[-2] == "shared":
        raise UnsupportedError(
            f"{what}encoder, decoder and head share it, and {kind} computes otherwise when untied",
            path=base.path,
            hint="serve the adapter unmerged",
        )
    if own or kind in _OTHER_HEADS or base.architecture.endswith(_MASKED):
        raise UnsupportedError(
            f"{what}whether {base.architecture or kind} reads a head of its own is not known here",
            path=base.path,
            hint="serve the adapter unmerged",
        )


def _rows(base: BaseModel, name: str, found: Untied) -> int | None:
    """The rows that a tensor is going to have, None if it is not written."""
    if name in found.values:
        return found.values[name].shape[0]
    if name in found.targets:
        return found.targets[name].matrix[0]
    ref = found.copies.get(name) or base.tensors.get(name)
    return ref.shape[0] if ref is not None else None
