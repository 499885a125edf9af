"""Language models whose logits are compared: their weights with a change, loaded by transformers.

Weights are named as in the checkpoint; where they belong in the model is left to transformers.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from adapterops.baking.bands import bands
from adapterops.baking.delta import Delta
from adapterops.baking.kernel import read_rows
from adapterops.basemodel import BaseModel
from adapterops.changes.given import given_rows
from adapterops.changes.targets import Changes, Target, Values, as_matrix
from adapterops.errors import IncompatibleError, UnsupportedError, UsageError
from adapterops.formats.locate import read_text
from adapterops.formats.model import Ref
from adapterops.formats.peft import read_config
from adapterops.rounding.grid import TORCH

_BLOCK = 1 << 20  # elements of a block of rows

Tensors = dict[str, torch.Tensor]


class Loader:
    """transformers, if it is installed; UsageError if not."""

    def __init__(self) -> None:
        try:
            import transformers
        except ImportError:
            raise UsageError(
                "--logits runs the models, which takes transformers, and it is not installed",
                hint="pip install 'adapterops[models]'",
            ) from None
        self._transformers: Any = transformers

    def config(self, config: Mapping[str, Any]) -> Any:
        """A config.json as transformers has it.

        Raises UnsupportedError for what is no causal language model that transformers knows.
        """
        known = self._transformers
        kind = config.get("model_type")
        names = config.get("architectures") or ["ForCausalLM"]
        causal = str(names[0]).endswith(("ForCausalLM", "LMHeadModel"))
        made = None
        if kind in known.CONFIG_MAPPING:
            made = known.CONFIG_MAPPING[kind].from_dict(dict(config))
        if made is None or type(made) not in known.MODEL_FOR_CAUSAL_LM_MAPPING or not causal:
            raise UnsupportedError(
                f"is a model of type {kind!r} ({names[0]}), and only the predictions of causal "
                "language models that transformers knows are compared",
                hint="leave --logits out",
            )
        return made

    def load(self, config: Mapping[str, Any], tensors: Tensors, dtype: torch.dtype) -> Any:
        """A model of these weights. Raises IncompatibleError where they are not all there."""
        made = self.config(config)
        model = self._transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(made)]
        options = {"dtype" if hasattr(made, "dtype") else "torch_dtype": dtype}
        loaded, said = model.from_pretrained(
            None,
            config=made,
            state_dict=tensors,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            **options,
        )
        wrong = sorted(map(str, [*said["missing_keys"], *said["mismatched_keys"]]))
        if wrong:
            raise IncompatibleError(
                f"{len(wrong)} tensors of a {made.model_type} model are missing or of another "
                f"shape, {wrong[0]} among them",
                hint="--logits MODEL names the folder with the base's own config.json",
            )
        return loaded.eval()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """No progress bars and no reports on loading: what is wrong is raised."""
        logging = self._transformers.utils.logging
        bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity(logging.CRITICAL)
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()


def read(model: BaseModel) -> Tensors:
    """The numbers of a checkpoint, each in its own type; masks and counters are left out."""
    return {name: _whole(ref) for name, ref in model.tensors.items() if ref.dtype in TORCH}


def summed(base: BaseModel, changes: Changes) -> Tensors:
    """The base with the adapters: W + D rounded once to float32, other tensors as they are."""
    return _unmerged(base, changes) | {
        name: _with(target, keep=1.0) for name, target in changes.targets.items()
    }


def _unmerged(base: BaseModel, changes: Changes) -> Tensors:
    """The base with new values where they are given, without any D."""
    result = read(base) | {name: _whole(ref) for name, ref in changes.copies.items()}
    for name, target in changes.targets.items():
        result[name] = _whole(target.ref)
    return result | {name: _given(values) for name, values in changes.values.items()}


def _with(target: Target, keep: float) -> torch.Tensor:
    """keep·W + D in float32."""
    rows, columns = target.matrix
    result = torch.empty(rows, columns)
    step = max(1, _BLOCK // max(1, columns))
    for band in bands(target):
        delta = Delta(target, band)
        for start in range(band.start, band.stop, step):
            stop = min(start + step, band.stop)
            W = read_rows(target.ref, target.matrix, start, stop).double()
            result[start:stop] = keep * W + delta.double(start, stop)
    return result.view(target.ref.shape)


def _given(values: Values) -> torch.Tensor:
    rows = given_rows(values, 0, as_matrix(values.shape)[0])
    return torch.from_numpy(rows).float().view(values.shape)


def _whole(ref: Ref) -> torch.Tensor:
    return read_rows(ref, (1, math.prod(ref.shape)), 0, 1).view(ref.shape)


def beside(
    loader: Loader,
    config: Mapping[str, Any],
    base: BaseModel,
    changes: Changes,
    dtype: torch.dtype,
    notes: list[str],
) -> Any:
    """The base with D beside it: every changed layer adds what a twin with the weight D gives.

    All of it is of `dtype`. Changes of other layers are rounded in, which `notes` then says.
    """
    tensors = _unmerged(base, changes)
    zeros = {name: torch.zeros(()).expand(value.shape) for name, value in tensors.items()}
    model = loader.load(config, tensors, dtype)
    twins = {name: _with(target, keep=0.0) for name, target in changes.targets.items()}
    change = loader.load(config, zeros | twins, dtype)
    rounded = 0
    for name, module in model.named_modules():
        twin = change.get_submodule(name)
        own = dict(twin.named_parameters(recurse=False))
        if not any(bool(value.any()) for value in own.values()):
            continue
        if _is_linear(module):
            module.register_forward_hook(_adding(twin))
            continue
        for key, value in module.named_parameters(recurse=False):
            value.add_(own[key])
            rounded += bool(own[key].any())
    if rounded:
        notes.append(f"the floor has {rounded} changed parameters rounded in, not beside")
    return model


def _is_linear(module: Any) -> bool:
    """Whether a module's output is linear in its parameters: those that adapters change mostly."""
    from transformers.pytorch_utils import Conv1D

    nn = torch.nn
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
    return type(module) in kinds


def _adding(twin: Any) -> Callable[[Any, Any, torch.Tensor], torch.Tensor]:
    def hook(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = output + twin(*inputs)
        return added

    return hook


def folder_of(path: str | os.PathLike[str]) -> Path:
    """The folder of a model, or that a file of it is in."""
    given = Path(path)
    return given if given.is_dir() else given.parent


def config_in(folder: Path) -> Mapping[str, Any]:
    """A folder's config.json. Raises UsageError where there is none."""
    file = folder / "config.json"
    if not file.is_file():
        raise UsageError(
            "holds no config.json, and weights alone do not say how to run a model",
            path=folder,
            hint="--logits MODEL names the folder with the base's config and tokenizer",
        )
    return read_config(read_text(os.fspath(file)), os.fspath(file))


def main_type(base: BaseModel) -> str:
    """The type that most of the base's numbers have."""
    sizes: Counter[str] = Counter()
    for ref in base.tensors.values():
        if ref.dtype in TORCH:
            sizes[ref.dtype] += math.prod(ref.shape)
    if not sizes:
        raise UnsupportedError("has no weights in 16, 32 or 64 bits", path=base.path)
    return sizes.most_common(1)[0][0]
