"""Image models, in one file or in a pipeline's folder: by which names adapters know their weights.

An adapter may be named after the checkpoint it was trained on or after another form of the same
model: LDM's blocks or diffusers' (`unet`), BFL's fused projections or diffusers' split ones
(`flux`), open_clip's text encoder or transformers' (`clip`). kohya's stems are such paths with
underscores for dots, which cannot be undone: every path is flattened instead and looked up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from adapterops.basemodel import clip, flux, unet
from adapterops.basemodel.parts import Modules, Part, Parts, Shapes

# Where one-file checkpoints and pipelines keep the denoiser.
_DENOISERS = ("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", "")
# Where they keep text encoders, and diffusers' names for them.
_TEXT = (
    ("cond_stage_model.transformer.", "text_encoder"),  # SD 1
    ("cond_stage_model.model.", "text_encoder"),  # SD 2
    ("conditioner.embedders.0.transformer.", "text_encoder"),  # SDXL
    ("conditioner.embedders.1.model.", "text_encoder_2"),
    ("conditioner.embedders.0.model.", "text_encoder_2"),  # SDXL's refiner, which has no first
    ("text_encoders.clip_l.transformer.", "text_encoder"),  # Flux
    ("text_encoders.t5xxl.transformer.", "text_encoder_2"),
    ("text_encoder.", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
)
_FLAT = {  # before flat stems; sd-scripts numbers Flux' T5 3, OneTrainer 2
    "unet": ("lora_unet_",),
    "transformer": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_", "lora_te3_"),
}
_FLAT_DENOISER = re.compile(r"^(lora_unet_+|lora_transformer_|lycoris_)(unet_)?")
_TEXT_MODEL = "text_model."


def paths(shapes: Shapes) -> dict[str, Parts] | None:
    """Every name of a weight that an adapter may use -> where its ΔW lies; None for other models.

    `shapes` are a checkpoint's, by tensor. Dotted names have diffusers' component in front, the
    checkpoint's own prefix, or nothing where that is unambiguous; flat ones have kohya's prefix.
    Names that two weights have are left out. Look stems up by `find`.

    Raises FormatError where blocks are missing that others are counted by.
    """
    found = _denoiser(shapes)
    if found is None:
        return None
    component, places = found
    table: dict[str, Parts] = {}
    twice: set[str] = set()
    for path, parts in places.items():
        wrapped = (f"diffusion_model.{path}", f"model.diffusion_model.{path}")
        _enter(table, twice, [*_names(component, path), *wrapped], parts)
    for prefix, component in _TEXT:
        for path, parts in _text(_modules(shapes, prefix), shapes).items():
            _enter(table, twice, [*_names(component, path), prefix + path], parts)
    return {name: parts for name, parts in table.items() if name not in twice}


def find(stem: str, table: Mapping[str, Parts]) -> Parts | None:
    """Where the ΔW of an adapter's module lies, by the names that `paths` gave; None if nowhere."""
    return table.get(_FLAT_DENOISER.sub("lora_unet_", stem, count=1))


def _denoiser(shapes: Shapes) -> tuple[str, dict[str, Parts]] | None:
    """The denoiser's component and, below it, every name of a module; None where there is none."""
    for prefix in _DENOISERS:
        modules = _modules(shapes, prefix)
        if unet.is_ldm(modules):
            return "unet", _own(modules) | dict(unet.from_ldm(modules))
        if unet.is_diffusers(modules):
            return "unet", _own(modules) | dict(unet.from_diffusers(modules))
        if flux.is_bfl(modules):
            return "transformer", _own(modules) | dict(flux.from_bfl(modules, shapes))
        if flux.is_diffusers(modules):
            return "transformer", _own(modules) | dict(flux.from_diffusers(modules, shapes))
    return None


def _text(modules: Modules, shapes: Shapes) -> dict[str, Parts]:
    """Every name of a text encoder's modules; transformers 5 leaves out a level of CLIP's."""
    own = _own(modules)
    if clip.is_open_clip(modules):
        return own | dict(clip.from_open_clip(modules, shapes))
    if "encoder.layers.0.self_attn.q_proj" in modules:
        inner = {path: parts for path, parts in own.items() if path != "text_projection"}
        return own | {_TEXT_MODEL + path: parts for path, parts in inner.items()}
    return own


def _modules(shapes: Shapes, prefix: str) -> dict[str, str]:
    """The modules below a prefix: path -> the name of its weight, a norm's scale included."""
    modules = {}
    for name in shapes:
        if name.startswith(prefix):
            path = name.removeprefix(prefix)
            owner, _, leaf = path.rpartition(".")
            if owner and leaf in ("weight", "scale"):
                modules[owner] = name
            elif path.endswith(clip.PARAMETERS):
                modules[path] = name
    return modules


def _own(modules: Modules) -> dict[str, Parts]:
    """The names that modules are stored under."""
    return {path: (Part(tensor),) for path, tensor in modules.items()}


def _names(component: str, path: str) -> list[str]:
    """A module's name bare, below its component, and flat; CLIP's with and without a level."""
    inner = dict.fromkeys((path, path.removeprefix(_TEXT_MODEL)))
    dotted = [f"{component}.{name}" for name in inner]
    flat = [prefix + name.replace(".", "_") for prefix in _FLAT[component] for name in inner]
    return [path, *dotted, *flat]


def _enter(table: dict[str, Parts], twice: set[str], names: list[str], parts: Parts) -> None:
    for name in names:
        if table.setdefault(name, parts) != parts:
            twice.add(name)
