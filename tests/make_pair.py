"""Write two small kohya adapters, a.safetensors and b.safetensors, into a folder."""

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

folder = Path(sys.argv[1])
rng = np.random.default_rng(0)
for name in "ab":
    tensors = {}
    for index in range(3):
        stem = f"lora_unet_down_blocks_{index}_attn_to_q"
        tensors[f"{stem}.lora_down.weight"] = rng.standard_normal((4, 64)).astype(np.float16)
        tensors[f"{stem}.lora_up.weight"] = rng.standard_normal((64, 4)).astype(np.float16)
        tensors[f"{stem}.alpha"] = np.array(2.0, np.float16)
    save_file(tensors, folder / f"{name}.safetensors")
