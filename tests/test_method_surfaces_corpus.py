"""Every method on every family of real adapters, the same tensor bytes from every surface.

What cannot be merged is refused by all of them with one exit code and one message.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import adapterops as ao
from adapterops.activations import write_activations
from adapterops.rules.registry import METHODS
from tests import kinds
from tests.conftest import CORPUS
from tests.method_surfaces import SPACES, WEIGHTS, Case, assert_one, every_surface, options
from tests.support import write_peft

pytestmark = pytest.mark.long

EXAMPLES = Path(__file__).parent.parent / "examples"
AGNEWS = "AguLeon__LoRA_RoBERTa_AGNews/checkpoint-"
PORTUGUESE = "paulohenriquecrs__RoBERTa_SEQ_CLS_LoRA_Portuguese/checkpoint-"
ATTENTION = "catundchat__stable-diffusion-v1.5-lora/pytorch_lora_weights"
SIMO = "cloneofsimo__lora/"
BLOOM = "wujindou__BLOOM-LORA"
MLX = "wyek1n__MLX-CLI/0000"


@dataclass(frozen=True)
class Family:
    """Adapters that go together; `few` are the modules whose entries are compared."""

    name: str
    make: Callable[[Path], Sequence[Path]]
    few: str = ".*"
    modules: str = ".*"


def copies(*names: str, root: Path = CORPUS) -> Callable[[Path], Sequence[Path]]:
    """These of the corpus, each in a folder of its own: `run OUT` finds them there."""

    def make(folder: Path) -> Sequence[Path]:
        found = []
        for number, name in enumerate(names):
            source, target = root / name, folder / str(number) / Path(name).name
            target.parent.mkdir()
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
            found.append(target)
        return found

    return make


def moved(name: str, inside: str = "") -> Callable[[Path], Sequence[Path]]:
    """A pickle of the corpus, and the same with all its tensors moved by half of their size."""

    def make(folder: Path) -> Sequence[Path]:
        one, two = copies(name, name)(folder)
        file = two / inside if inside else two
        state = torch.load(file, map_location="cpu", weights_only=True)
        generator = torch.Generator().manual_seed(7)

        def other(value: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(value.shape, generator=generator).to(value.dtype)
            return value + 0.5 * value.float().square().mean().sqrt().to(value.dtype) * noise

        changed = (
            [other(value) for value in state]
            if isinstance(state, list)
            else {key: other(value) for key, value in state.items()}
        )
        torch.save(changed, file)
        return one, two

    return make


def as_kohya(folder: Path) -> Sequence[Path]:
    """The attention adapter in kohya's names, moved a little, beside LoCon of convolutions."""
    [source] = copies(f"{ATTENTION}.safetensors")(folder)
    ao.convert(source, to="kohya", out=folder / "plain.safetensors")
    plain, found = load_file(folder / "plain.safetensors"), []
    for seed, name in enumerate(("one", "two")):
        rng = np.random.default_rng(seed)
        tensors = {
            key: value * rng.uniform(0.5, 1.5, value.shape).astype(value.dtype)
            if "lora_up" in key
            else value
            for key, value in plain.items()
        }
        for block, number in ((0, 1), (0, 2), (1, 1)):
            stem = f"lora_unet_down_blocks_{block}_resnets_0_conv{number}"
            up, down = rng.standard_normal((320, 2, 1, 1)), rng.standard_normal((2, 320, 3, 3))
            tensors[f"{stem}.lora_up.weight"] = (0.01 * up).astype(np.float32)
            tensors[f"{stem}.lora_down.weight"] = down.astype(np.float32)
            tensors[f"{stem}.alpha"] = np.array(1, np.float32)
        save_file(tensors, folder / f"{name}.safetensors")
        found.append(folder / f"{name}.safetensors")
    return found


def all_kinds(folder: Path) -> Sequence[Path]:
    """A module of every kind and kernel that kohya's files hold."""
    found = []
    for seed in range(2):
        modules = {f"lora_unet_m{i}": k.draw(seed, 2) for i, k in enumerate(kinds.KINDS)}
        alphas = {name: np.float32(1 + seed) for name in modules}
        found.append(kinds.write(folder / f"kinds-{seed}.safetensors", modules, alphas))
    return found


REAL = (
    Family("agnews", copies(*(f"{AGNEWS}{n}" for n in (500, 1000, 1200))), ".*[.]1[.].*"),
    Family("portuguese", copies(*(f"{PORTUGUESE}{n}" for n in (500, 8610))), ".*[.]1[.].*"),
    Family("neighbours", copies(*(f"{PORTUGUESE}{n}" for n in (8500, 8610))), ".*[.]1[.].*"),
    Family(
        "one-run", copies(*(f"{PORTUGUESE}{n}" for n in (500, 2000, 5000, 8500))), ".*[.]1[.].*"
    ),
    Family("two-owners", copies(f"{AGNEWS}500", f"{PORTUGUESE}500"), ".*[.]1[.].*"),
    Family("attention", copies(f"{ATTENTION}.bin", f"{ATTENTION}.safetensors"), ".*up.*3.*to_k"),
    Family("kohya", as_kohya, ".*_0_resnets_.*|.*up_blocks_3.*to_k"),
    Family(
        "cloneofsimo",
        copies(f"{SIMO}analog_svd_rank4.safetensors", f"{SIMO}lora_disney_inpainting.safetensors"),
        "unet:[0-7]|text_encoder:[01]",
    ),
    Family("list", moved(f"{SIMO}lora_pop.pt"), "list:[0-7]"),
    Family("merged-linear", moved(BLOOM, "adapter_model.bin"), ".*[.][01][.].*"),
    Family("mlx", copies(f"{MLX}100", f"{MLX}200")),
)
_DOMAINS = ("code-seed0", "code-seed1", "docs-seed0", "docs-seed1")
_FLEET = (("algebra-a", "algebra-a-fork"), ("arrays-a", "docs-b"), ("code-a", "code-b", "docs-a"))
FAMILIES = (*REAL, Family("kinds", all_kinds))
FAMILIES += tuple(
    Family(
        "+".join(names), copies(*names, root=EXAMPLES / root), ".*[.]7[.].*v_proj", ".*[.]7[.].*"
    )
    for root, sets in (
        ("adapters", itertools.combinations(_DOMAINS, 2)),
        ("fleet/adapters", _FLEET),
    )
    for names in sets
)
UNEQUAL = ("two-owners", "cloneofsimo")  # ranks differ, which peft_linear refuses


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request, tmp_path_factory):
    """A family, its adapters on disk and inputs of their modules."""
    found: Family = request.param
    if found in REAL:
        request.getfixturevalue("corpus")
    folder = tmp_path_factory.mktemp("family")
    adapters = tuple(found.make(folder))
    rng = np.random.default_rng(3)
    sites: dict[str, int] = {}
    for path in adapters:
        opened = ao.open_adapter(path, allow_pickle=True)
        sites |= {name: opened[name].shape[1] for name in opened}
    samples = {name: ("samples", rng.standard_normal((6, n))) for name, n in sites.items()}
    moments = folder / "moments" / "inputs.safetensors"
    moments.parent.mkdir()
    write_activations(moments, samples, tokens=6, model="any")
    yield found, adapters, moments
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_on_every_family(name, family, tmp_path):
    kind, adapters, moments = family
    method = METHODS[name]
    place = FAMILIES.index(kind)
    most = method.most or len(adapters)
    for turn, space in enumerate(method.spaces or SPACES[:1], start=place):
        fields = options(method, turn)
        general = {key: value for key, value in fields["general"].items() if key != "space"}
        general |= {"space": space} if space != "dense" else {}
        modules = kind.few if method.spaces else kind.modules
        saved = {**fields["saved"], "extras": "first", "allow_pickle": True}
        case = Case(
            name,
            adapters[:most],
            (*WEIGHTS[turn % 4], 0.4)[: min(most, len(adapters))],
            activations=(moments,) if "activations" in method.needs else (),
            **{**fields, "general": general, "saved": {**saved, "modules": modules}},
        )
        first = assert_one(every_surface(case, tmp_path))
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        refused = not case.is_valid or (name == "peft_linear" and kind.name in UNEQUAL)
        assert (first.code != 0) == refused, (case, first)


def dora(folder: Path) -> Sequence[Path]:
    """A real adapter with the magnitudes of a DoRA, and the adapter."""
    one, two = copies(f"{PORTUGUESE}500", f"{PORTUGUESE}2000")(folder)
    opened = ao.open_adapter(one)
    factors = {
        name: (opened[name].B.astype(np.float32), opened[name].A.astype(np.float32))
        for name in opened
    }
    magnitudes = {
        f"base_model.model.{name}.lora_magnitude_vector": np.ones(len(B), np.float32)
        for name, (B, _) in factors.items()
    }
    return write_peft(folder / "dora", factors, extras=magnitudes, use_dora=True), two


def pissa(folder: Path) -> Sequence[Path]:
    """An adapter whose config says that its base is another."""
    one, two = copies(f"{PORTUGUESE}500", f"{PORTUGUESE}2000")(folder)
    config = json.loads((one / "adapter_config.json").read_text())
    (one / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    return one, two


def truncated(folder: Path) -> Sequence[Path]:
    one, two = copies(f"{MLX}100", f"{MLX}200")(folder)
    file = two / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    return one, two


def missing(folder: Path) -> Sequence[Path]:
    [one] = copies(f"{MLX}100")(folder)
    return one, folder / "nowhere"


def without_scale(folder: Path) -> Sequence[Path]:
    one, two = copies(f"{PORTUGUESE}500", f"{PORTUGUESE}2000")(folder)
    config = json.loads((two / "adapter_config.json").read_text())
    del config["lora_alpha"]
    (two / "adapter_config.json").write_text(json.dumps(config))
    return one, two


# What cannot be merged, the exit code, and whether it takes more than `extras: error` to say so.
REFUSED: dict[str, tuple[Callable[[Path], Sequence[Path]], int, str]] = {
    "strangers": (copies(f"{MLX}100", f"{PORTUGUESE}500"), 4, "first"),
    "dialects": (copies(f"{ATTENTION}.safetensors", f"{MLX}100"), 4, "first"),
    "heads": (copies(f"{PORTUGUESE}500", f"{PORTUGUESE}2000"), 4, "error"),
    "dora": (dora, 4, "first"),
    "pissa": (pissa, 4, "first"),
    "no-scale": (without_scale, 4, "first"),
    "truncated": (truncated, 3, "first"),
    "missing": (missing, 6, "first"),
    "pickle": (copies(f"{ATTENTION}.bin", f"{ATTENTION}.safetensors"), 3, "first"),
}


@pytest.fixture(scope="module", params=REFUSED)
def refused(request, tmp_path_factory, corpus):
    """Adapters that do not go together, and the exit code."""
    make, code, extras = REFUSED[request.param]
    folder = tmp_path_factory.mktemp("refused")
    yield tuple(make(folder)), code, extras
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_what_is_refused_is_refused_by_every_surface(name, refused, tmp_path):
    adapters, code, extras = refused
    method, moments = METHODS[name], tmp_path / "m.safetensors"
    rng = np.random.default_rng(0)
    inputs = {"any": ("samples", rng.standard_normal((3, 8)))}
    write_activations(moments, inputs, tokens=3, model="any")
    needed = {each.name: 3 for each in method.parameters if each.default is None}
    case = Case(
        name,
        adapters,
        (0.5, 0.25),
        needed,
        activations=(moments,) if "activations" in method.needs else (),
        saved={"extras": extras},
    )
    first = assert_one(every_surface(case, tmp_path))
    assert first.code == code
