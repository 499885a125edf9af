"""Token sequences to compare models on: the same on every machine, a few hundred positions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

_SEQUENCES, _LENGTH = 4, 48  # of random tokens
_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
    "tokenizer_config.json",
)

SENTENCES = (
    "The committee met on Tuesday to discuss the budget, and after three hours of debate it "
    "agreed to postpone the decision until the new figures were available.",
    "Water boils at a lower temperature on a mountain, because the pressure of the air above it "
    "is smaller; an egg therefore takes longer to cook there than it does at the sea.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n",
    "Question: A train leaves at 9:40 and arrives at 12:15. How long is the journey?\n"
    "Answer: From 9:40 to 12:00 are 2 hours and 20 minutes, and 15 more make 2 hours 35 minutes.",
    "Le chat dort sur le canapé pendant que la pluie tombe doucement sur le toit de la maison.",
    "She opened the letter slowly, read it twice, folded it again, and put it back in the drawer "
    "where it had lain, unanswered, for almost eleven years.",
    "Let f be a continuous function on a closed interval; then f is bounded and attains its "
    "maximum and its minimum at some points of that interval.",
    "Dear customer, thank you for your message. We are sorry to hear that your order has not "
    "arrived yet. Could you please send us the number on your receipt?",
)


def random_tokens(vocabulary: int, longest: int | None, seed: int = 0) -> list[torch.Tensor]:
    """Sequences of uniformly random tokens, from raw Philox bits, no longer than `longest`."""
    length = min(_LENGTH, longest or _LENGTH)
    raw = np.random.Philox(key=seed).random_raw(_SEQUENCES * length) % np.uint64(vocabulary)
    return list(torch.from_numpy(raw.astype(np.int64).reshape(_SEQUENCES, length)))


def text_tokens(
    folder: Path, vocabulary: int, longest: int | None
) -> tuple[list[torch.Tensor], str]:
    """SENTENCES by the folder's tokenizer, and why there are none if it has one that fails.

    Cut at `longest`; a tokenizer with tokens that the model lacks is not the model's.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _FILES):
        return [], ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        found = [tokenizer(sentence)["input_ids"][:longest] for sentence in SENTENCES]
    except Exception as error:  # whatever the code of some tokenizer raises
        reason = str(error).partition("\n")[0]
        return [], f"the tokenizer of {folder} cannot be used: {reason}"
    if max(map(max, filter(None, found)), default=vocabulary) >= vocabulary:
        return [], f"the tokenizer of {folder} is of another model: it has more tokens"
    return [torch.tensor(ids) for ids in found if ids], ""
