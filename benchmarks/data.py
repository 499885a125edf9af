"""Synthetic adapters for the benchmarks, written once into benchmarks/data.

Values are seeded noise in which column j of B shrinks like 0.8^j, as trained adapters' spectra do;
like 0.95^j in the sets of rank 64, as image adapters' do, of which half of the rank loses a third.
The 1,000 adapters are cut from a shared pool of noise and have four directions in common. The
checkpoints are layers of Llama-7B in bfloat16 and the same after a change of rank 64 (0.85^j).
`python benchmarks/data.py NAME…` writes the sets named, or all.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

DATA = Path(__file__).resolve().parent / "data"
LLAMA_7B = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
LLAMA_3B = {"self_attn.q_proj": (3072, 3072), "self_attn.v_proj": (1024, 3072)}
LLAMA_1B = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.v_proj": (512, 2048),
    "self_attn.o_proj": (2048, 2048),
}
LLAMA_SMALL = {name: (m // 8, n // 8) for name, (m, n) in LLAMA_7B.items()}
_MEDIUM = {"self_attn.q_proj": (1024, 1024)}
_SQUARE = {"self_attn.q_proj": (4096, 4096)}
FLEET = 1000
_VOCABULARY = 64
_SHARED = 4
_EIGHT = "abcdefgh"
Shapes = dict[str, tuple[int, int]]
Tensors = dict[str, np.ndarray]


def layers(count: int, shapes: Shapes) -> Shapes:
    """Module paths and shapes of a decoder of so many equal layers."""
    return {
        f"model.layers.{i}.{name}": shape for i in range(count) for name, shape in shapes.items()
    }


def sdxl() -> Shapes:
    """The 722 linear modules of the SDXL UNet that LoRA trainers adapt, by their flat names."""
    shapes: Shapes = {}
    for block, attentions, depth, width in (
        ("down_blocks_1", 2, 2, 640),
        ("down_blocks_2", 2, 10, 1280),
        ("mid_block", 1, 10, 1280),
        ("up_blocks_0", 3, 10, 1280),
        ("up_blocks_1", 3, 2, 640),
    ):
        for attention in range(attentions):
            stem = f"lora_unet_{block}_attentions_{attention}"
            shapes |= {f"{stem}_proj_in": (width, width), f"{stem}_proj_out": (width, width)}
            for index in range(depth):
                shapes |= _transformer_block(f"{stem}_transformer_blocks_{index}", width)
    return shapes


def _sdxl_narrow() -> Shapes:
    """Its 640-wide blocks going down, 44 modules: small SVDs."""
    return {stem: shape for stem, shape in sdxl().items() if "_down_blocks_1_" in stem}


def _transformer_block(stem: str, width: int) -> Shapes:
    shapes = {f"{stem}_attn{i}_to_{x}": (width, width) for i in (1, 2) for x in ("q", "out_0")}
    shapes |= {f"{stem}_attn1_to_{x}": (width, width) for x in "kv"}
    shapes |= {f"{stem}_attn2_to_{x}": (width, 2048) for x in "kv"}
    return shapes | {
        f"{stem}_ff_net_0_proj": (8 * width, width),
        f"{stem}_ff_net_2": (width, 4 * width),
    }


def noise(
    rng: np.random.Generator, shape: tuple[int, int], rank: int, decay: float = 0.8
) -> tuple[np.ndarray, ...]:
    """B (m, r) and A (r, n) in float16; column j of B shrinks like decay^j."""
    m, n = shape
    sizes = np.float32(0.05) * np.float32(decay) ** np.arange(rank, dtype=np.float32)
    B = rng.standard_normal((m, rank), np.float32) * sizes
    A = rng.standard_normal((rank, n), np.float32) / np.float32(n**0.5)
    return B.astype(np.float16), A.astype(np.float16)


def write_peft(folder: Path, tensors: Tensors, rank: int) -> None:
    """A PEFT directory: the tensors and a config with alpha = 2·rank."""
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "synthetic",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


def _peft_tensors(stem: str, B: np.ndarray, A: np.ndarray) -> Tensors:
    name = f"base_model.model.{stem}"
    return {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}


def _peft(folder: Path, shapes: Shapes, rank: int, names: str = "ab", decay: float = 0.8) -> None:
    for name in names:
        rng = np.random.default_rng(ord(name))
        tensors: Tensors = {}
        for stem, shape in shapes.items():
            tensors |= _peft_tensors(stem, *noise(rng, shape, rank, decay))
        write_peft(folder / name, tensors, rank)


def _kohya(folder: Path, shapes: Shapes, rank: int, names: str = "ab", decay: float = 0.8) -> None:
    folder.mkdir(parents=True)
    for name in names:
        rng = np.random.default_rng(ord(name))
        tensors: Tensors = {}
        for stem, shape in shapes.items():
            B, A = noise(rng, shape, rank, decay)
            tensors |= {f"{stem}.lora_up.weight": B, f"{stem}.lora_down.weight": A}
            tensors[f"{stem}.alpha"] = np.array(rank / 2, np.float16)
        save_file(tensors, folder / f"{name}.safetensors")


def _fleet(folder: Path) -> None:
    """One layer of Llama-7B, rank 16, 1,000 times: the first four columns resemble each other."""
    rank, rng = 16, np.random.default_rng(1000)
    shapes = layers(1, LLAMA_7B)
    pool_b = noise(rng, (1 << 21, 1), rank)[0]
    pool_a = (rng.standard_normal(1 << 25, np.float32) / 64).astype(np.float16)
    common = {stem: noise(rng, shape, rank) for stem, shape in shapes.items()}
    for index in range(FLEET):
        tensors: Tensors = {}
        for stem, (m, n) in shapes.items():
            start_b = int(rng.integers(len(pool_b) - m))
            start_a = int(rng.integers(len(pool_a) - rank * n))
            B = pool_b[start_b : start_b + m].copy()
            A = pool_a[start_a : start_a + rank * n].reshape(rank, n).copy()
            B[:, :_SHARED] = common[stem][0][:, :_SHARED]
            A[:_SHARED] = common[stem][1][:_SHARED]
            tensors |= _peft_tensors(stem, B, A)
        write_peft(folder / f"tenant{index:04d}", tensors, rank)


def _checkpoints(folder: Path, count: int, shapes: Shapes) -> None:
    """base and tuned: every matrix moved by a planted change and rounded to bfloat16 again."""
    import torch
    from safetensors.torch import save_file as save_torch

    hidden = shapes["self_attn.q_proj"][1]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": shapes["mlp.up_proj"][0],
        "num_attention_heads": hidden // 128,
        "num_hidden_layers": count,
        "vocab_size": _VOCABULARY,
        "torch_dtype": "bfloat16",
    }
    rng = np.random.default_rng(7)
    untouched = {
        "model.embed_tokens.weight": (_VOCABULARY, hidden),
        "lm_head.weight": (_VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
    }
    for index in range(count):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            untouched[f"model.layers.{index}.{norm}.weight"] = (hidden,)
    base, tuned = {}, {}
    for name, shape in untouched.items():
        base[name] = torch.from_numpy(rng.standard_normal(shape, np.float32)).bfloat16()
        tuned[name] = base[name]
    for stem, shape in layers(count, shapes).items():
        W = np.float32(0.02) * rng.standard_normal(shape, np.float32)
        B, A = (factor.astype(np.float32) for factor in noise(rng, shape, 64, 0.85))
        base[f"{stem}.weight"] = torch.from_numpy(W).bfloat16()
        moved = base[f"{stem}.weight"].float() + torch.from_numpy(B @ A)
        tuned[f"{stem}.weight"] = moved.bfloat16()
    for name, state in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        save_torch(state, folder / name / "model.safetensors", {"format": "pt"})


SETS: dict[str, Callable[[Path], None]] = {
    "small": lambda folder: _peft(folder, layers(1, {"self_attn.q_proj": (256, 256)}), 16),
    "medium": lambda folder: _peft(folder, layers(1, _MEDIUM), 16),
    "square": lambda folder: _peft(folder, layers(1, _SQUARE), 16),
    "10mb": lambda folder: _peft(folder, layers(28, LLAMA_3B), 16),
    "7b": lambda folder: _peft(folder, layers(32, LLAMA_7B), 16),
    "7bx8": lambda folder: _peft(folder, layers(32, LLAMA_7B), 16, _EIGHT),
    "7bx8-quick": lambda folder: _peft(folder, layers(2, LLAMA_SMALL), 16, _EIGHT),
    "squarex8": lambda folder: _peft(folder, layers(1, _SQUARE), 16, _EIGHT),
    "mediumx8": lambda folder: _peft(folder, layers(1, _MEDIUM), 16, _EIGHT),
    "layers10": lambda folder: _peft(folder, layers(10, LLAMA_7B), 16),
    "layers100": lambda folder: _peft(folder, layers(100, LLAMA_7B), 16),
    "sdxl": lambda folder: _kohya(folder, sdxl(), 32),
    "sdxl64": lambda folder: _kohya(folder, sdxl(), 64, "a", 0.95),
    "sdxl64-quick": lambda folder: _kohya(folder, _sdxl_narrow(), 64, "a", 0.95),
    "7b64": lambda folder: _peft(folder, layers(32, LLAMA_7B), 64, "a", 0.95),
    "layers4-64": lambda folder: _peft(folder, layers(4, LLAMA_7B), 64, "a", 0.95),
    "checkpoints": lambda folder: _checkpoints(folder, 2, LLAMA_7B),
    "checkpoints-quick": lambda folder: _checkpoints(folder, 2, LLAMA_SMALL),
    "fleet": _fleet,
}


def get(name: str) -> Path:
    """The folder of a set, written first if it is not there."""
    folder = DATA / name
    if not folder.exists():
        unfinished = DATA / f".{name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        SETS[name](unfinished)
        unfinished.rename(folder)
    return folder


def pair(name: str) -> list[str]:
    """Paths of the two adapters of a set."""
    return [str(path) for path in sorted(get(name).iterdir())]


def weights(adapter: str) -> Path:
    """The weights file of a PEFT adapter."""
    return Path(adapter) / "adapter_model.safetensors"


def tensors(adapter: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(stem, B, A) of a PEFT adapter in float64, its scale in B; read by another library."""
    from safetensors import safe_open

    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    with safe_open(weights(adapter), "numpy") as file:
        names = [name for name in file.keys() if name.endswith(".lora_A.weight")]  # noqa: SIM118
        for name in names:
            A = file.get_tensor(name).astype(np.float64)
            B = file.get_tensor(name.replace(".lora_A.", ".lora_B.")).astype(np.float64)
            yield name.removesuffix(".lora_A.weight"), B * scale, A


if __name__ == "__main__":
    for chosen in sys.argv[1:] or SETS:
        print(get(chosen).name)
