"""What baking does to a language model's predictions, beside what its number format does anyway.

The reference has the weights W + D, computed in float64 and rounded once to float32, and runs in
float32: the adapter on the fly, to 2⁻²⁴. Against it, by the mean Kullback-Leibler divergence
KL(reference ‖ other) in nats and the share of positions with the same first choice:

    baked     the baked weights, run in float32: what rounding the weights costs, and nothing else
    in_dtype  the baked weights, run in the base's type, as they are served
    floor     W as it is, D beside it (y = W·x + D·x), run in the base's type: serving unmerged

transformers loads the weights of each by its own rules. One model at a time is in memory, with its
weights as they were read beside it while it is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from adapterops.basemodel import BaseModel
from adapterops.casts import FORMATS
from adapterops.certificate import plain
from adapterops.changes.entries import merged
from adapterops.changes.targets import Changes
from adapterops.errors import IncompatibleError
from adapterops.judging import models
from adapterops.judging.texts import random_tokens, text_tokens
from adapterops.rounding.grid import TORCH
from adapterops.rounding.precision import exact_arithmetic

_FACTOR = 2.0  # of the floor, beyond which baking costs more than the format does


@dataclass(frozen=True, slots=True)
class Agreement:
    """With the reference: mean and largest KL of a position in nats, share of equal first choices.

    All None where the other's logits are not finite.
    """

    kl: float | None
    largest: float | None
    top1: float | None


@dataclass(frozen=True, slots=True)
class Compared:
    """Three models against the reference over `positions` next tokens."""

    positions: int
    baked: Agreement
    in_dtype: Agreement
    floor: Agreement


@dataclass(frozen=True, slots=True)
class LogitsReport:
    """Predictions after random tokens and, where the model has a tokenizer, after plain text.

    `dtype` is the base's type; `notes` say where baking costs more than twice the floor, and what
    could not be done.
    """

    dtype: str
    random: Compared
    text: Compared | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        result: dict[str, Any] = plain(self)
        return result


def compare_logits(
    base: BaseModel,
    changes: Changes,
    baked: BaseModel,
    model: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
) -> LogitsReport:
    """The predictions of a baked model against those of its base with the adapters on the fly.

    `model` is a folder with the base's config.json and perhaps its tokenizer, by default the
    base's own. Raises UsageError without transformers or a config, UnsupportedError for what is no
    causal language model and quantised weights, IncompatibleError for weights that do not make up
    the model.
    """
    folder = models.folder_of(base.path if model is None else model)
    loader = models.Loader()
    base.check_not_quantised()
    baked.check_not_quantised()
    config = merged(models.config_in(folder), changes.config.get("", {}))
    theirs = baked.config or config
    kind = models.main_type(base)
    notes: list[str] = []
    with loader.quiet(), _arithmetic(), torch.no_grad():
        made = loader.config(config).get_text_config()
        longest = getattr(made, "max_position_embeddings", None)
        tokens = random_tokens(made.vocab_size, longest, seed)
        texts, problem = text_tokens(folder, made.vocab_size, longest)
        notes += [problem] if problem else []
        everything = [*tokens, *texts]
        reference = _logits(
            loader.load(config, models.summed(base, changes), torch.float32), everything
        )
        others: dict[str, Callable[[], Any]] = {
            "baked": lambda: loader.load(theirs, models.read(baked), torch.float32),
            "in_dtype": lambda: loader.load(theirs, models.read(baked), TORCH[kind]),
            "floor": lambda: models.beside(loader, config, base, changes, TORCH[kind], notes),
        }
        found = {name: _agreements(reference, make(), everything) for name, make in others.items()}
    count = len(tokens)
    random = _compared(tokens, {name: each[:count] for name, each in found.items()})
    text = None
    if texts:
        text = _compared(texts, {name: each[count:] for name, each in found.items()})
    notes += _judged(kind, text or random)
    return LogitsReport(FORMATS[kind].name, random, text, tuple(notes))


def _judged(kind: str, found: Compared) -> list[str]:
    mine, floor = found.in_dtype.kl, found.floor.kl
    if mine is None or floor is None:
        return [f"logits in {FORMATS[kind].name} are not finite"]
    if kind in ("F32", "F64") or mine <= _FACTOR * floor:
        return []
    return [
        f"the baked model is {mine / floor:.3g} times as far from the adapter on the fly "
        f"(KL {mine:.3g}) as serving unmerged in {FORMATS[kind].name} is (KL {floor:.3g})"
    ]


def _logits(model: Any, tokens: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [model(ids[None]).logits[0].float() for ids in tokens]


def _agreements(
    reference: Sequence[torch.Tensor], model: Any, tokens: Sequence[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(KL, equal first choice) of every position, a pair for each sequence."""
    result = []
    for expected, ids in zip(reference, tokens, strict=True):
        found = _logits(model, [ids])[0]
        if found.shape != expected.shape:
            raise IncompatibleError(
                f"the baked model predicts {found.shape[-1]} tokens, its base with the adapters "
                f"{expected.shape[-1]}"
            )
        p, q = (values.double().log_softmax(-1) for values in (expected, found))
        result.append(((p.exp() * (p - q)).sum(-1), expected.argmax(-1) == found.argmax(-1)))
    return result


def _compared(
    tokens: Sequence[torch.Tensor],
    found: Mapping[str, Sequence[tuple[torch.Tensor, torch.Tensor]]],
) -> Compared:
    made = {name: _agreement(each) for name, each in found.items()}
    return Compared(sum(map(len, tokens)), **made)


def _agreement(found: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Agreement:
    divergence = torch.cat([kl for kl, _ in found]).clamp(min=0.0)
    if not bool(torch.isfinite(divergence).all()):
        return Agreement(None, None, None)
    same = torch.cat([equal for _, equal in found]).double()
    return Agreement(float(divergence.mean()), float(divergence.max()), float(same.mean()))


@contextmanager
def _arithmetic() -> Iterator[None]:
    """Float32 as IEEE 754 has it, with all of torch's threads: nothing here runs beside it."""
    threads = torch.get_num_threads()
    with exact_arithmetic():
        torch.set_num_threads(threads)
        yield
