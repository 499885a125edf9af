"""What is read, merged and written, as the cases the tests run on; prints tests/dialects.md.

The tests of each dialect are parametrised by these rows, so the table cannot promise more than
they check: `python -m tests.dialects > tests/dialects.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapterops.errors import (
    AdapterOpsError,
    FormatError,
    IncompatibleError,
    UnsupportedError,
)


@dataclass(frozen=True)
class Peft:
    """Two adapters that PEFT writes, by their LoraConfig; r and lora_alpha differ by default."""

    kind: str
    a: Mapping[str, Any]
    b: Mapping[str, Any]
    model: str = "tiny"
    forward: bool = True  # PEFT applies an MHA's out_proj delta twice: compare weights only


def _same(kind: str, *targets: str, forward: bool = True, **config: Any) -> Peft:
    both = {"target_modules": [*targets], **config}
    return Peft(kind, both, both, forward=forward)


_LLAMA = ["q_proj", "v_proj", "down_proj"]
PEFT = (
    _same("Linear", "linear", "head"),
    _same("transformers Conv1D", "wide"),
    _same("transformers Conv1D, square", "square"),
    _same("Embedding", "embed"),
    _same("Conv1d", "conv1"),
    _same("Conv2d", "conv2"),
    _same("Conv2d, 1 x 1", "point"),
    _same("Conv3d", "conv3"),
    _same("MultiheadAttention", "mha", forward=False),
    _same(
        "MultiheadAttention with patterns",
        "mha",
        "linear",
        forward=False,
        rank_pattern={"mha": 4},
        alpha_pattern={"mha": 7},
    ),
    _same("all of these", "linear", "wide", "square", "embed", "conv1", "conv2", "point", "conv3"),
    _same("lora_bias", "linear", "conv2", "conv1", lora_bias=True),
    Peft(
        "lora_bias in one input",
        {"target_modules": ["linear"], "lora_bias": True},
        {"target_modules": ["linear", "conv2", "head"]},
    ),
    Peft(
        "rank_pattern and alpha_pattern",
        {
            "target_modules": _LLAMA,
            "rank_pattern": {r"layers\.0\..*q_proj": 5, "down_proj": 1},
            "alpha_pattern": {"v_proj": 9},
        },
        {"target_modules": _LLAMA, "alpha_pattern": {r"^model\.layers\.1\..*": 0.5}},
        "llama",
    ),
    Peft(
        "rsLoRA",
        {"target_modules": _LLAMA, "use_rslora": True, "rank_pattern": {"v_proj": 5}},
        {"target_modules": _LLAMA},
        "llama",
    ),
    Peft(
        "different target_modules",
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": r".*\.(q_proj|gate_proj)", "layers_to_transform": None},
        "llama",
    ),
    Peft(
        "layers_to_transform, exclude_modules",
        {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["model.layers.1.mlp"]},
        "llama",
    ),
    Peft("all-linear", *([{"target_modules": "all-linear"}] * 2), "llama"),
)

# What PEFT trains beside the factors, by the LoraConfig that asks for it.
EXTRAS: Mapping[str, Mapping[str, Any]] = {
    "heads (modules_to_save)": {"modules_to_save": ["head", "wide"]},
    "biases of adapted layers (bias: lora_only)": {"bias": "lora_only"},
    "all biases (bias: all)": {"bias": "all"},
    "token rows (trainable_token_indices)": {"trainable_token_indices": {"embed": [5, 2]}},
}


@dataclass(frozen=True)
class Kohya:
    """Two kohya files over these sites (stem -> shapes of up and down), read back by `reader`."""

    kind: str
    sites: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    ranks: tuple[int, int] = (4, 3)
    alpha: Sequence[float | None] = (2.0, 6.0)
    alpha_shape: tuple[int, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    scales: tuple[float, float] = (0.5, 2.0)
    dtype: str = "float32"
    reader: str = "dense"


UNET_ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_"
TEXT_LAYER = "lora_te_text_model_encoder_layers_0_"
_LINEAR = {"lora_unet_double_blocks_0_img_attn_qkv": ((48,), (16,))}
_CONV = {"lora_unet_input_blocks_1_0_in_layers_2": ((12,), (8, 3, 3))}
_POINT = {"lora_unet_input_blocks_1_1_proj_in": ((24,), (16, 1, 1))}
KOHYA = (
    Kohya("linear, alpha 0-d", _LINEAR),
    Kohya("linear, alpha of shape [1]", _LINEAR, alpha_shape=(1,)),
    Kohya("linear, no alpha (assumed = rank)", _LINEAR, alpha=(None, None), scales=(1.0, 1.0)),
    Kohya(
        "linear and 1 x 1, alpha from ss_network_alpha / ss_network_dim",
        {**_LINEAR, **_POINT},
        ranks=(4, 4),
        alpha=(None, None),
        metadata={"ss_network_dim": "4", "ss_network_alpha": "1.0"},
        scales=(0.25, 0.25),
    ),
    Kohya("LoCon 3 x 3", _CONV),
    Kohya("LoCon 1 x 1", _POINT),
    Kohya("linear, float16", _LINEAR, dtype="float16"),
    Kohya("linear, bfloat16", _LINEAR, dtype="bfloat16"),
    Kohya(
        "unknown architecture, by stem",
        {"lora_unet__blocks_7_self_attn_q": ((20,), (20,)), "lycoris_x_y": ((24,), (16,))},
    ),
    Kohya(
        "SD 1.x UNet: attention, 1 x 1, 3 x 3",
        {
            f"{UNET_ATTENTION}to_q": ((32,), (32,)),
            f"{UNET_ATTENTION}to_out_0": ((32,), (32,)),
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj": (
                (256,),
                (32,),
            ),
            "lora_unet_down_blocks_0_attentions_0_proj_in": ((32,), (32, 1, 1)),
            "lora_unet_down_blocks_0_resnets_0_conv1": ((32,), (32, 3, 3)),
        },
        reader="diffusers",
    ),
    Kohya(
        "SD 1.x text encoder",
        {
            f"{TEXT_LAYER}self_attn_q_proj": ((16,), (16,)),
            f"{TEXT_LAYER}self_attn_out_proj": ((16,), (16,)),
            f"{TEXT_LAYER}mlp_fc1": ((24,), (16,)),
        },
        reader="diffusers",
    ),
)


@dataclass(frozen=True)
class Diffusers:
    """Two files of one component over these modules (path -> ΔW shape), in one spelling.

    `modules` are full names without the component; spelling: processor, lora, peft. `bare` leaves
    the component out of the names; `alpha` goes into `lora_adapter_metadata` (None: no alpha).
    """

    kind: str
    component: str
    spelling: str
    modules: Mapping[str, tuple[int, int]]
    ranks: tuple[int, int] = (4, 3)
    alpha: tuple[float | None, float | None] = (None, None)
    bare: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)


_ATTN = "down_blocks.0.attentions.0.transformer_blocks.0."
UNET = {
    f"{_ATTN}attn1.to_q": (32, 32),
    f"{_ATTN}attn1.to_out.0": (32, 32),
    f"{_ATTN}attn2.to_k": (32, 16),
}
TEXT = {
    "text_model.encoder.layers.0.self_attn.q_proj": (16, 16),
    "text_model.encoder.layers.1.self_attn.out_proj": (16, 16),
}
FLUX = {
    "transformer_blocks.0.attn.to_q": (16, 16),
    "transformer_blocks.0.attn.add_k_proj": (16, 16),
    "single_transformer_blocks.0.proj_mlp": (64, 16),
}
DIFFUSERS = (
    Diffusers("attention processors", "unet", "processor", UNET),
    Diffusers("attention processors without `unet.`", "unet", "processor", UNET, bare=True),
    Diffusers("lora.down / lora.up", "unet", "lora", UNET),
    Diffusers("lora_linear_layer", "text_encoder", "lora", TEXT),
    Diffusers("lora_A / lora_B, no alpha", "unet", "peft", UNET),
    Diffusers("lora_A / lora_B, no alpha", "text_encoder", "peft", TEXT),
    Diffusers("lora_A / lora_B, no alpha", "transformer", "peft", FLUX),
    Diffusers("lora_adapter_metadata", "unet", "peft", UNET, alpha=(2.0, 6.0)),
    Diffusers("lora_adapter_metadata", "text_encoder", "peft", TEXT, alpha=(2.0, 6.0)),
    Diffusers("lora_adapter_metadata", "transformer", "peft", FLUX, alpha=(2.0, 6.0)),
    Diffusers(
        "lora_adapter_metadata, rsLoRA and patterns",
        "transformer",
        "peft",
        FLUX,
        alpha=(2.0, 6.0),
        config={"use_rslora": True, "alpha_pattern": {"proj_mlp": 5.0}},
    ),
    Diffusers(
        "lora_A / lora_B with lora_B.bias", "transformer", "peft", FLUX, config={"lora_bias": True}
    ),
)


@dataclass(frozen=True)
class Refusal:
    """An adapter that is refused: tensors beside or instead of a plain pair, or its config."""

    dialect: str
    kind: str
    error: type[AdapterOpsError]
    says: str
    config: Mapping[str, Any] | None = field(default_factory=dict)
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    pair: bool = True  # whether a plain pair of factors is there too
    fill: float = 1.0  # every number of `tensors`


def _config(kind: str, says: str, **config: Any) -> Refusal:
    return Refusal("peft", kind, UnsupportedError, says, config)


def _named(dialect: str, kind: str, says: str, *names: str) -> Refusal:
    return Refusal(
        dialect, kind, UnsupportedError, says, tensors=dict.fromkeys(names, (4, 4)), pair=False
    )


_M = "base_model.model.q_proj"
_U = "lora_unet_mid_q"
REFUSED = (
    _config("DoRA (use_dora)", "this is DoRA", use_dora=True),
    Refusal(
        "peft",
        "DoRA (lora_magnitude_vector)",
        UnsupportedError,
        "this is DoRA",
        tensors={f"{_M}.lora_magnitude_vector": (8,)},
    ),
    Refusal(
        "peft",
        "DoRA (lora_magnitude_vector.weight)",
        UnsupportedError,
        "this is DoRA",
        tensors={f"{_M}.lora_magnitude_vector.weight": (8,)},
    ),
    _config("PiSSA", "relative to a base", init_lora_weights="pissa"),
    _config("PiSSA, randomised", "relative to a base", init_lora_weights="pissa_niter_16"),
    _config("OLoRA", "relative to a base", init_lora_weights="olora"),
    _config("CorDA", "relative to a base", init_lora_weights="corda"),
    _config("LoRA-GA", "relative to a base", init_lora_weights="lora_ga"),
    _config("LoftQ", "relative to a base", init_lora_weights="loftq"),
    _config("aLoRA", "this is aLoRA", alora_invocation_tokens=[1, 2]),
    _config("BD-LoRA", "this is BD-LoRA", use_bdlora={"nblocks": 2}),
    _config("QA-LoRA", "this is QA-LoRA", use_qalora=True),
    _config("KaSA", "this is KaSA", kasa_config={"beta": 1.0}),
    _config("Arrow", "this is Arrow", arrow_config={"top_k": 2}),
    _config("MonteCLoRA", "this is MonteCLoRA", monteclora_config={"n": 2}),
    _config("VeLoRA", "this is VeLoRA", velora_config={"n": 2}),
    _config("layer replication", "layer replication", layer_replication=[[0, 2], [1, 3]]),
    Refusal(
        "peft",
        "target_parameters whose r does not divide the rows",
        IncompatibleError,
        "ambiguous",
        {"r": 3, "target_parameters": ["q_proj.weight"]},
    ),
    Refusal(
        "peft",
        "target_parameters, two on one module, without config",
        UnsupportedError,
        "target_parameters",
        None,
        {f"{_M}.base_layer.lora_A.weight": (4, 8), f"{_M}.base_layer.lora_B.weight": (8, 4)},
    ),
    Refusal(
        "peft",
        "MergedLinear without enable_lora",
        UnsupportedError,
        "enable_lora",
        tensors={f"{_M}.lora_A.weight": (8, 6), f"{_M}.lora_B.weight": (16, 4, 1)},
        pair=False,
    ),
    *(
        _config(kind, f"this is a {kind} adapter", peft_type=kind)
        for kind in ("PREFIX_TUNING", "PROMPT_TUNING", "IA3", "OFT", "HRA", "VERA")
    ),
    Refusal("peft", "AdaLoRA without lora_E", FormatError, "lora_E", {"peft_type": "ADALORA"}),
    _named("peft", "prompt tuning by name", "prompt tuning", "prompt_embeddings"),
    _named("peft", "(IA)³ by name", "(IA)³", f"{_M}.ia3_l"),
    _named("peft", "unknown suffix", "unknown LoRA variant", f"{_M}.lora_C.weight"),
    Refusal(
        "peft",
        "unknown suffix below a factor",
        UnsupportedError,
        "unknown LoRA variant",
        tensors={f"{_M}.lora_A.default.extra.weight": (4, 4)},
    ),
    Refusal("peft", "no scale", IncompatibleError, "--alpha X", None),
    Refusal("peft", "config rank is not the tensors'", IncompatibleError, "rank 4", {"r": 16}),
    Refusal(
        "peft",
        "two scales that disagree",
        IncompatibleError,
        "two scales disagree",
        {"lora_alpha": 32},
        {f"{_M}.alpha": ()},
    ),
    Refusal(
        "peft",
        "A without B",
        FormatError,
        "no B factor",
        tensors={f"{_M}.lora_A.weight": (4, 6)},
        pair=False,
    ),
    Refusal(
        "peft",
        "A and B of different ranks",
        FormatError,
        "A has rank 4, B has rank 3",
        tensors={f"{_M}.lora_A.weight": (4, 6), f"{_M}.lora_B.weight": (8, 3)},
        pair=False,
    ),
    Refusal(
        "peft",
        "grouped convolution",
        UnsupportedError,
        "grouped convolution",
        tensors={f"{_M}.lora_A.weight": (4, 8, 3, 3), f"{_M}.lora_B.weight": (8, 2, 1, 1)},
        pair=False,
    ),
    Refusal(
        "peft",
        "no LoRA at all",
        FormatError,
        "is not a LoRA adapter",
        tensors={"model.layers.0.weight": (4, 4)},
        pair=False,
    ),
    Refusal(
        "kohya",
        "DoRA (dora_scale)",
        UnsupportedError,
        "this is DoRA",
        tensors={f"{_U}.dora_scale": (8, 1)},
    ),
    Refusal(
        "kohya",
        "half a LoHa",
        FormatError,
        "no adapter of a known kind",
        tensors={f"{_U}.hada_w1_a": (4, 4), f"{_U}.hada_w1_b": (4, 4)},
        pair=False,
    ),
    _named("kohya", "OFT", "OFT/BOFT", f"{_U}.oft_blocks"),
    _named("kohya", "GLoRA", "GLoRA", f"{_U}.a1.weight"),
    Refusal(
        "kohya",
        "factors and a full delta of one weight",
        FormatError,
        "apply only one",
        tensors={f"{_U}.diff": (8, 6)},
    ),
    Refusal(
        "kohya",
        "sparse bias",
        UnsupportedError,
        "sparse residual",
        tensors={f"{_U}.bias_values": (8,)},
    ),
    Refusal(
        "kohya",
        "unknown tensor of an adapted module",
        UnsupportedError,
        "no known kind",
        tensors={f"{_U}.surprise": (8,)},
    ),
    Refusal(
        "kohya",
        "alpha 0",
        IncompatibleError,
        "alpha is 0",
        tensors={f"{_U}.alpha": ()},
        fill=0.0,
    ),
    Refusal(
        "kohya",
        "alpha of no pair",
        FormatError,
        "belongs to no factors",
        tensors={"lora_unet_other.alpha": ()},
    ),
    Refusal(
        "diffusers",
        "pissa in lora_adapter_metadata",
        UnsupportedError,
        "relative to a base",
        {"unet.init_lora_weights": "pissa"},
    ),
)


# What a kind is called in the table, and which dialects' files can hold it at all.
KIND_NAMES = {
    "lora": "LoRA, LoCon",
    "tucker": "CP/Tucker LoCon (lora_mid)",
    "loha": "LoHa",
    "lokr": "LoKr",
    "adalora": "AdaLoRA",
    "merged_linear": "old MergedLinear",
    "experts": "experts (target_parameters, switch layers)",
    "full": "full deltas (.diff, .diff_b, .w_norm, .b_norm)",
    "dora": "DoRA",
    "pissa": "PiSSA",
    "olora": "OLoRA",
}
RELATIVE = ("dora", "pissa", "olora")  # refused without the base model
COLUMNS = ("peft", "kohya", "diffusers", "mlx", "xlabs", "cloneofsimo")


def wild_rows() -> list[tuple[str, str, str]]:
    """(dialect, case, kind) of the cases of the oracles, each a test's parameter."""
    from tests import (
        kinds,
        test_deltas,
        test_kinds_peft,
        test_mlx,
        test_moe,
        test_rebased,
        test_wild_dialects,
    )

    rows = [*kinds.rows(), *test_kinds_peft.rows()]
    rows += [(dialect, title, "experts") for dialect, title, _ in test_moe.rows()]
    for dialect, title, kind in test_mlx.rows():
        rows.append((dialect, title, "experts" if "switch" in title else kind))
    rows += test_wild_dialects.rows() + test_rebased.rows()
    rows += [("kohya", title, "full") for title in test_deltas.CASES]
    return rows


def matrix() -> list[str]:
    """Kind x dialect, from the cases."""
    found = {(kind, dialect) for dialect, _, kind in wild_rows()}
    found |= {("lora", dialect) for dialect in ("peft", "kohya", "diffusers", "xlabs")}
    lines = [f"| kind | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for kind, name in KIND_NAMES.items():
        cells = [
            "–" if (kind, dialect) not in found else "with its base" if kind in RELATIVE else "yes"
            for dialect in COLUMNS
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def table() -> str:
    """The Markdown of tests/dialects.md."""
    lines = [
        "# Dialects and kinds of adapter",
        "",
        "Written by `python -m tests.dialects > tests/dialects.md`; every row is a test's case.",
        "",
        "## Kind x dialect",
        "",
        *matrix(),
        "",
        "yes: read, merged, and written as LoRA in the same dialect (full deltas as such); with "
        "its base: refused without the base model, converted to LoRA beside it; –: no tool writes "
        "such a file. kohya stands for all names with kohya's or LyCORIS' suffixes: `lora_unet_`, "
        "`lora_te_`, `lora_transformer_`, `lycoris_`, `lora_unet__`, `diffusion_model.`; diffusers "
        "for all with `lora_A`/`lora_B` or `lora.down`, also bare.",
        "",
        "## Layers and features",
        "",
        "| dialect | layer or feature | read | merged | written | judged by |",
        "|---|---|---|---|---|---|",
    ]
    rows = [("peft", case.kind, "PEFT") for case in PEFT]
    rows += [("peft", kind, "PEFT") for kind in EXTRAS]
    rows += [("kohya", case.kind, case.reader) for case in KOHYA]
    rows += [("diffusers", f"{case.component}: {case.kind}", "diffusers") for case in DIFFUSERS]
    lines += [f"| {dialect} | {kind} | yes | yes | yes | {by} |" for dialect, kind, by in rows]
    lines += [
        "",
        "`dense` means: the file's own tensors and alphas, multiplied out in float64; PEFT and "
        "diffusers reload the result.",
        "",
        "## Kinds and wild names",
        "",
        "Judged by dense float64 and by the library that makes them: PEFT's `get_delta_weight`, "
        "LyCORIS' functional API and modules, diffusers' conversion functions.",
        "",
        "| dialect | case | kind |",
        "|---|---|---|",
    ]
    lines += [f"| {dialect} | {title} | {kind} |" for dialect, title, kind in wild_rows()]
    lines += [
        "",
        "## Refused by name",
        "",
        "| dialect | adapter | error | exit code |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {case.dialect} | {case.kind} | {case.error.__name__} | {case.error.exit_code} |"
        for case in REFUSED
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
