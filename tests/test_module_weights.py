"""Weights by layer, group and name: the grammar, what wins, and the sums that come of it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterops.errors import AdapterOpsError, UnsupportedError, UsageError
from adapterops.formats import open_adapter_file
from adapterops.moduleweights.apply import apply
from adapterops.moduleweights.grammar import parse
from adapterops.moduleweights.paths import group, layer
from adapterops.save import save_sum
from tests.support import (
    dense,
    distance,
    load_file,
    pairs,
    read_kohya,
    read_peft,
    write_kohya,
    write_peft,
)

PLACES = {
    # path -> (layer, group), by hand
    "model.layers.11.self_attn.q_proj": (11, "attn"),
    "model.layers.0.self_attn.qkv_proj": (0, "attn"),
    "model.layers.3.mlp.gate_up_proj": (3, "mlp"),
    "model.layers.3.mlp.experts.7.down_proj": (3, "mlp"),
    "model.layers.3.mlp.experts.gate_up_proj[12]": (3, "mlp"),
    "model.layers.2.block_sparse_moe.experts.0.w1": (2, "mlp"),
    "model.layers.2.mlp.shared_expert.up_proj": (2, "mlp"),
    "model.layers.5.feed_forward.w2": (5, "mlp"),
    "model.layers.5.attention.wqkv": (5, "attn"),
    "model.layers.5.mamba.in_proj": (5, None),
    "model.layers.5.linear_attn.in_proj_qkvz": (5, "attn"),
    "transformer.h.10.self_attention.query_key_value": (10, "attn"),
    "transformer.h.10.self_attention.dense": (10, "attn"),
    "transformer.h.10.mlp.dense_4h_to_h": (10, "mlp"),
    "transformer.h.1.attn.c_attn": (1, "attn"),
    "transformer.h.1.mlp.c_proj": (1, "mlp"),
    "transformer.blocks.4.attn.Wqkv": (4, "attn"),
    "transformer.blocks.4.ffn.down_proj": (4, "mlp"),
    "transformer.encoder.layers.27.mlp.dense_h_to_4h": (27, "mlp"),
    "gpt_neox.layers.6.attention.query_key_value": (6, "attn"),
    "model.decoder.layers.9.encoder_attn.v_proj": (9, "attn"),
    "model.decoder.layers.9.fc1": (9, "mlp"),
    "roberta.encoder.layer.9.attention.self.value": (9, "attn"),
    "roberta.encoder.layer.9.attention.output.dense": (9, "attn"),
    "roberta.encoder.layer.9.intermediate.dense": (9, "mlp"),
    "roberta.encoder.layer.9.output.dense": (9, "mlp"),
    "distilbert.transformer.layer.2.attention.q_lin": (2, "attn"),
    "distilbert.transformer.layer.2.ffn.lin1": (2, "mlp"),
    "encoder.block.3.layer.0.SelfAttention.q": (3, "attn"),
    "decoder.block.3.layer.1.EncDecAttention.k": (3, "attn"),
    "decoder.block.3.layer.2.DenseReluDense.wi_0": (3, "mlp"),
    "backbone.layers.8.mixer.up_proj": (8, "mlp"),
    "backbone.layers.8.mixer.q_proj": (8, "attn"),
    "backbone.layers.8.mixer.in_proj": (8, None),
    "lora_unet_blocks_12_self_attn_q": (12, "attn"),
    "lora_unet_blocks_12_ffn_0": (12, "mlp"),
    "transformer.transformer_blocks.7.attn.add_q_proj": (7, "attn"),
    "model.layers.12345678901.q_proj": (None, "attn"),
    "lm_head": (None, None),
    "model.embed_tokens": (None, None),
    "classifier.0": (None, None),
    "bert.pooler.dense": (None, None),
    "multi_modal_projector.linear_1": (None, None),
}


@pytest.mark.parametrize("path", PLACES)
def test_place_of_a_module(path):
    assert (layer(path), group(path)) == PLACES[path]


MODULES = [
    f"model.layers.{n}.{part}" for n in range(12) for part in ("self_attn.q_proj", "mlp.up_proj")
] + ["lm_head"]
SHAPES = dict.fromkeys(MODULES, (12, 16))


def selected(text: str) -> set[str]:
    return {path for path in MODULES if parse(text, 1).matches(path)}


def of_layers(*numbers: int) -> set[str]:
    return {path for path in MODULES if any(f".{n}." in path for n in numbers)}


SELECTED = {
    "layers 3: 1": of_layers(3),
    "layers 0-7: 1": of_layers(*range(8)),
    "layers 9-: 1": of_layers(9, 10, 11),
    "layers 0-3+8-11: 1": of_layers(0, 1, 2, 3, 8, 9, 10, 11),
    "  layers  1 - 2 + 5 :  1 ": of_layers(1, 2, 5),
    "layers 10-99: 1": of_layers(10, 11),
    "layers2: 1": of_layers(2),
    "attn: 1": {path for path in MODULES if "self_attn" in path},
    "mlp : 1": {path for path in MODULES if "mlp" in path},
    "re:lm_head: 1": {"lm_head"},
    "re: .*q_proj : 1": {path for path in MODULES if "q_proj" in path},
    r"re:model\.layers\.(?:1|2)\..*: 1": of_layers(1, 2),
    "re:q_proj: 1": set(),
    "re:layers.1: 1": set(),
}


@pytest.mark.parametrize("text", SELECTED)
def test_what_a_rule_selects(text):
    assert selected(text) == SELECTED[text]


NUMBERS = {
    "attn: 0.7,0.3": (0.7, 0.3),
    "attn:-2,+1e-3": (-2.0, 1e-3),
    "attn: .5 , 1.": (0.5, 1.0),
    "re:a:b: 1,0": (1.0, 0.0),
}


@pytest.mark.parametrize("text", NUMBERS)
def test_weights_as_written(text):
    assert parse(text, 2).weights == NUMBERS[text]


MALFORMED = {
    "": "expected ':' and one weight per adapter at character 1, found nothing",
    "layers 0-7 1,0": "expected ':' and one weight per adapter at character 15, found nothing",
    "layers x: 1,0": "expected layers such as 3, 0-7 or 24- at character 8, found 'x: 1,0'",
    "layers: 1,0": "expected layers such as 3, 0-7 or 24- at character 7",
    "layers -3: 1,0": "at character 8, found '-3: 1,0'; layers are numbered from 0",
    "layers 7-0: 1,0": "the range '7-0' ends before it begins at character 8",
    "layers 0-3,8-11: 1,0": "expected layers such as .* at character 8",
    "layers 0-3+: 1,0": "expected layers such as .* at character 12",
    "layers 0-3: 1,x": "expected a number at character 15, found 'x'",
    "layers 0-3: 1,": "expected a number at character 15, found nothing",
    "layers 0-3: 1 0": "expected a number at character 13, found '1 0'",
    "attn: nan,1": "expected a number at character 7, found 'nan,1'",
    "attn: 1e999,1": "expected a number at character 7",
    "attn: 1_0,1": "expected a number at character 7",
    "attn: inf,1": "expected a number at character 7",
    "attn 3: 1,0": "expected 'layers 0-7: …'.* at character 1",
    "attn: 1": "gives 1 weight for 2 adapters; one per adapter, in their order",
    "attn: 1,2,3": "gives 3 weights for 2 adapters",
    "re:(a: 1,0": r"no regular expression \(missing \), unterminated subpattern\) at character 4",
    "re:: 1,0": "expected a regular expression at character 4",
    "re:a": "expected ':' and one weight per adapter at character 5",
    "layer 3: 1,0": "at character 1, found 'layer 3: 1,0'; did you mean layers?",
    "Attn: 1,0": "did you mean attn?",
    "q_proj: 1,0": "a pattern of names is re:REGEX: weights",
    "blocks=1,0": r"expected '\[NAME\]=': an adapter's name or number, or \* at character 7",
    "blocks[a=1,0": r"expected '\[NAME\]='.* at character 7",
    "blocks[]=ALL": "expected an adapter's name or number, .* at character 8",
    "blocks[a]ALL": "expected '=' and a block vector or the name of a preset at character 10",
    "blocks[a]=": "expected a number at character 11, found nothing",
    "blocks[a]=INAL": "the name of a preset at character 11, found 'INAL'; did you mean INALL",
    "blocks[a]=all": "did you mean ALL",
    "blocks[a]=zzz": "presets: NONE, ALL, INS",
    "blocks[a]=1,R,0": "expected a number at character 13, found 'R,0'",
    "blocks[a]=1,0,0": "no block vector has 3 values; known are 12 .SDXL LoRA., 17 .SD 1 and 2",
}


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_rules(text):
    with pytest.raises(UsageError, match=MALFORMED[text]) as caught:
        parse(text, 2)
    assert str(caught.value).startswith(f"--module-weights {text!r}: ")
    assert caught.value.exit_code == 2


def test_a_rule_that_is_no_text():
    with pytest.raises(UsageError, match="a rule is text, not dict"):
        parse({"layers": 3}, 2)


@given(st.text(alphabet="layersrebokt[]=:,-+0123456789. *()|\\ ", max_size=40))
def test_any_text_is_read_or_refused(text):
    try:
        rule = parse(text, 2)
    except UsageError:
        return
    assert len(getattr(rule, "weights", (0, 0))) == 2


def two(tmp_path, shapes=SHAPES):
    """Two adapters, and their ΔW."""
    one, other = pairs(1, shapes, 3), pairs(2, shapes, 2)
    files = [
        open_adapter_file(write_peft(tmp_path / name, made, alpha=5.0))
        for name, made in (("a", one), ("b", other))
    ]
    return files, (dense(one, 5 / 3), dense(other, 5 / 2))


def shares(files, weights, specs, paths=MODULES):
    """What every module's delta is multiplied by, for each adapter."""
    made, scales = apply(files, weights, specs)
    return {
        path: tuple(
            scale * file.sites[path].factor if scale and path in file.sites else 0.0
            for file, scale in zip(made, scales, strict=True)
        )
        for path in paths
    }


ALWAYS = (0.5, 0.25)


def wins(path: str) -> tuple[float, float]:
    if layer(path) == 5:
        return (4, 4)
    if "attn" in path:
        return (3, 0)
    return (2, 2) if (layer(path) or 0) > 3 else (1, 1)


def halves(path: str) -> tuple[float, float]:
    number = layer(path)
    if number is None:
        return ALWAYS
    return (1, 0) if number < 6 else (0, 1)


RULES = {
    "none": ([], lambda path: ALWAYS),
    "layers": (["layers 0-7: 1,0"], lambda path: (1, 0) if layer(path) in range(8) else ALWAYS),
    "group": (["mlp: 0.75,-2"], lambda path: (0.75, -2) if "mlp" in path else ALWAYS),
    "regex": (["re:lm_head: 3,4"], lambda path: (3, 4) if path == "lm_head" else ALWAYS),
    "later wins": (["re:.*: 1,1", "layers 4-: 2,2", "attn: 3,0", "layers 5: 4,4"], wins),
    "earlier loses": (["layers 5: 4,4", "re:.*: 1,1"], lambda path: (1, 1)),
    "halves of a model": (["layers 0-5: 1,0", "layers 6-: 0,1"], halves),
}


@pytest.mark.parametrize("case", RULES)
def test_what_wins(tmp_path, case):
    specs, wanted = RULES[case]
    files, _ = two(tmp_path)
    assert shares(files, [0.5, 0.25], specs) == {path: wanted(path) for path in MODULES}


@pytest.mark.parametrize("case", RULES)
def test_the_sum_is_the_dense_one(tmp_path, case):
    specs, wanted = RULES[case]
    files, deltas = two(tmp_path)
    made, weights = apply(files, [0.5, 0.25], specs)
    save_sum(made, weights, tmp_path / "out", dtype="float32")
    result = {
        path: sum(w * delta[path] for w, delta in zip(wanted(path), deltas, strict=True))
        for path in MODULES
    }
    assert distance(read_peft(tmp_path / "out"), result) < 1e-6


def test_factors_are_taken_out_and_put_in(tmp_path):
    files, _ = two(tmp_path)
    made, weights = apply(files, [0.5, 0.25], ["attn: 0,1", "mlp: 0.5,0.5"])
    assert weights == [0.5, 0.25]
    assert set(made[0].sites) == {path for path in MODULES if "attn" not in path}
    assert made[0].sites["model.layers.0.mlp.up_proj"].factor == 1.0
    assert {path: site.factor for path, site in made[1].sites.items()} == {
        path: 4.0 if "attn" in path else 2.0 if "mlp" in path else 1.0 for path in MODULES
    }
    assert all(site.factor == 1.0 for file in files for site in file.sites.values())
    twice, _ = apply(made, weights, ["mlp: 1,1"])
    assert twice[1].sites["model.layers.0.mlp.up_proj"].factor == 8.0
    assert made[1].extras is files[1].extras and made[1].path == files[1].path


def test_no_rules_change_nothing(tmp_path):
    files, _ = two(tmp_path)
    made, weights = apply(files, [0.5, 0.0], [])
    assert [id(file) for file in made] == [id(file) for file in files] and weights == [0.5, 0.0]
    assert shares(files, [2.0, 1.0], "attn: 1,1") == shares(files, [2.0, 1.0], ["attn: 1,1"])


def test_a_weight_of_zero_comes_alive_where_rules_give_values(tmp_path):
    files, _ = two(tmp_path)
    made, weights = apply(files, [1.0, 0.0], ["layers 0-3: 0.25,0.75"])
    assert weights == [1.0, 1.0]
    assert {path: site.factor for path, site in made[1].sites.items()} == dict.fromkeys(
        of_layers(0, 1, 2, 3), 0.75
    )
    assert apply(files, [1.0, 0.0], ["layers 0-3: 0.25,0"])[1] == [1.0, 0.0]


def test_an_adapter_that_nothing_is_left_of_has_no_weight(tmp_path):
    files, deltas = two(tmp_path)
    made, weights = apply(files, [0.5, 0.25], ["re:.*: 1,0"])
    assert weights == [0.5, 0.0] and made[1].sites.keys() == files[1].sites.keys()
    save_sum(made, weights, tmp_path / "out", dtype="float32")
    assert distance(read_peft(tmp_path / "out"), deltas[0]) < 1e-6


@given(
    st.lists(st.floats(-4, 4).filter(lambda x: not 0 < abs(x) < 1e-9), min_size=2, max_size=2),
    st.lists(st.floats(-4, 4).filter(lambda x: not 0 < abs(x) < 1e-9), min_size=2, max_size=2),
)
def test_weight_times_factor_is_the_rules_weight(tmp_path_factory, weights, wanted):
    files, _ = two(tmp_path_factory.mktemp("a"), {"model.layers.0.mlp.up_proj": (2, 2)})
    text = "mlp: " + ",".join(map(repr, wanted))
    (found,) = shares(files, weights, [text], ["model.layers.0.mlp.up_proj"]).values()
    assert np.allclose(found, wanted, rtol=2**-51, atol=0)


def test_unknown_names_are_shown_the_nearest(tmp_path):
    files, _ = two(tmp_path)
    for spec, says in (
        ("layers 12-: 1,0", r"matches none of the 25 modules; the layers are 0 to 11"),
        ("re:lm.head: 1,0", None),
        ("re:lm_heads: 1,0", "a module matches as a whole; the nearest is 'lm_head'"),
        (r"re:model\.layers\.3\.mlp: 1,0", r"nearest is 'model\.layers\.3\.mlp\.up_proj'"),
        ("blocks[1]=ALL", "is no name of a U-Net's"),
        ("blocks[c]=ALL", r"no adapter is called 'c'; they are a, b; \* is for all"),
        ("blocks[3]=ALL", "no adapter is called '3'"),
    ):
        if says is None:
            apply(files, [1.0, 1.0], [spec])
            continue
        with pytest.raises(AdapterOpsError, match=says):
            apply(files, [1.0, 1.0], [spec])


def test_groups_and_layers_that_a_model_lacks(tmp_path):
    files, _ = two(tmp_path, {"encoder.conv_1": (4, 4)})
    with pytest.raises(UsageError, match="no module has the number of a layer; the first is 'enc"):
        apply(files, [1.0, 1.0], ["layers 0: 1,0"])
    with pytest.raises(UsageError, match="matches none of the 1 modules; the first is 'encoder"):
        apply(files, [1.0, 1.0], ["mlp: 1,0"])


STEM = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
OTHER = "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
FULL = "lora_unet_up_blocks_1_resnets_0_conv1"
IMAGE = {STEM: (8, 768), OTHER: (8, 768), TEXT: (8, 768)}


def image(tmp_path, name, *, full=False, seed=5):
    """A kohya file, perhaps with a full delta, and its ΔW."""
    made = pairs(seed, IMAGE, 2)
    path = write_kohya(tmp_path / f"{name}.safetensors", made, alpha=2.0)
    deltas = dense(made)
    if full:
        from safetensors.numpy import save_file

        values = np.random.default_rng(seed).standard_normal((4, 6)).astype(np.float32)
        tensors = load_file(path) | {f"{FULL}.diff": values}
        save_file(tensors, path)
        deltas[FULL] = values.astype(np.float64)
    return open_adapter_file(path), deltas


@pytest.mark.parametrize("spec", ["layers 0-3: 1,1", "attn: 1,1", "mlp: 1,1"])
def test_layers_and_groups_are_refused_for_image_models(tmp_path, spec):
    files = [image(tmp_path, name)[0] for name in "ab"]
    with pytest.raises(UsageError, match=r"of an image model, and .*(blocks.NAME.=|re:REGEX)"):
        apply(files, [1.0, 1.0], [spec])


def test_blocks_multiply_what_rules_give(tmp_path):
    (one, d1), (other, d2) = image(tmp_path, "a"), image(tmp_path, "b", seed=6)
    out = ["0"] * 17
    out[POSITION["IN04"]], out[POSITION["OUT03"]] = "0.5", "2"
    vector = ",".join(out)
    specs = [f"re:{STEM}: 0.25,0.75", f"blocks[b.safetensors]={vector}"]
    wanted = {STEM: (0.25, 0.375), OTHER: (0.5, 1.0), TEXT: (0.5, 0.0)}
    assert shares([one, other], [0.5, 0.5], specs, IMAGE) == wanted
    made, weights = apply([one, other], [0.5, 0.5], specs)
    save_sum(made, weights, tmp_path / "out.safetensors", dtype="float32")
    result = {stem: a * d1[stem] + b * d2[stem] for stem, (a, b) in wanted.items()}
    assert distance(read_kohya(tmp_path / "out.safetensors"), result) < 1e-6


POSITION = {"BASE": 0, "IN04": 3, "OUT03": 8}


def test_the_last_vector_of_an_adapter_counts(tmp_path):
    files = [image(tmp_path, name)[0] for name in "ab"]
    specs = ["blocks[2]=NONE", "blocks[*]=ALL0.5", "blocks[1]=INALL"]
    found = shares(files, [1.0, 1.0], specs, IMAGE)
    assert found == {STEM: (1.0, 0.5), OTHER: (0.0, 0.5), TEXT: (1.0, 0.5)}
    for order in itertools.permutations(["blocks[1]=ALL0.5", "blocks[2]=OUTALL"]):
        found = shares(files, [1.0, 1.0], order, IMAGE)
        assert found == {STEM: (0.5, 0.0), OTHER: (0.5, 1.0), TEXT: (0.5, 1.0)}


def test_two_adapters_of_one_name(tmp_path):
    (tmp_path / "x").mkdir()
    files = [image(tmp_path, "a")[0], image(tmp_path / "x", "a")[0]]
    found = shares(files, [1.0, 1.0], ["blocks[a.safetensors#2]=OUTALL"], IMAGE)
    assert found == {STEM: (1.0, 0.0), OTHER: (1.0, 1.0), TEXT: (1.0, 1.0)}
    with pytest.raises(UsageError, match=r"no adapter is called 'a\.safetensor'; did you mean a"):
        apply(files, [1.0, 1.0], ["blocks[a.safetensor]=OUTALL"])


def test_a_file_is_called_with_or_without_its_ending(tmp_path):
    files = [image(tmp_path, name)[0] for name in ("a", "b", "b.v2")]
    for name in ("b", "b.safetensors", "2"):
        found = shares(files, [1.0] * 3, [f"blocks[{name}]=ALL0.5"], IMAGE)
        assert set(found.values()) == {(1.0, 0.5, 1.0)}
    found = shares(files, [1.0] * 3, ["blocks[b.v2]=ALL0.5"], IMAGE)
    assert set(found.values()) == {(1.0, 1.0, 0.5)}
    (tmp_path / "x").mkdir()
    twice = [*files, image(tmp_path / "x", "a")[0]]
    apply(twice, [1.0] * 4, ["blocks[a]=ALL0.5"])
    with pytest.raises(UsageError, match=r"no adapter is called 'c'; they are a\.safe"):
        apply(files, [1.0] * 3, ["blocks[c]=ALL0.5"])


def test_a_long_vector_is_cut_in_messages(tmp_path):
    files = [image(tmp_path, "a")[0]]
    with pytest.raises(UsageError, match="no block vector has 40 values") as failure:
        apply(files, [1.0], ["blocks[a]=" + ",".join(["0.5"] * 40)])
    assert "0.5,0…'" in str(failure.value) and len(str(failure.value)) < 300


def test_full_deltas(tmp_path):
    """They have the adapter's weight, or none."""
    file, deltas = image(tmp_path, "a", full=True)
    (made,), weights = apply([file], [0.5], [f"re:{STEM}|{FULL}: 0"])
    assert weights == [0.5] and not made.deltas and set(made.sites) == {OTHER, TEXT}
    (made,), _ = apply([file], [0.5], [f"re:{FULL}: 0.5", f"re:{STEM}: 2"])
    assert set(made.deltas) == {f"{FULL}.diff"} and made.sites[STEM].factor == 4.0
    save_sum([made], [0.5], tmp_path / "out.safetensors", dtype="float32")
    tensors = load_file(tmp_path / "out.safetensors")
    assert np.allclose(tensors[f"{FULL}.diff"], 0.5 * deltas[FULL], rtol=1e-6)
    for specs in ([f"re:{FULL}: 0.25"], ["blocks[1]=" + ",".join(["0.5"] * 26)]):
        with pytest.raises(UnsupportedError, match=f"module {FULL}.diff: is a full delta.* give 0"):
            apply([file], [0.5], specs)
    (made,), weights = apply([file], [0.0], [f"re:{STEM}: 2"])
    assert weights == [1.0] and not made.deltas and set(made.sites) == {STEM}


def test_real_adapters(corpus, tmp_path):
    """Roberta: every module is of attention; the sum has the weights of the layer it lies in."""
    folder = corpus / "paulohenriquecrs__RoBERTa_SEQ_CLS_LoRA_Portuguese"
    files = [open_adapter_file(folder / f"checkpoint-{n}") for n in (500, 2000)]
    specs = ["attn: 0.5,0.5", "layers 0-3+8: 1,0", "re:.*\\.query: 0.25,2"]
    made, weights = apply(files, [1.0, 1.0], specs)

    def wanted(path):
        if path.endswith(".query"):
            return (0.25, 2)
        return (1, 0) if layer(path) in (0, 1, 2, 3, 8) else (0.5, 0.5)

    save_sum(made, weights, tmp_path / "out", extras="first", dtype="float32")
    result = {}
    for path in files[0].sites:
        terms = zip(wanted(path), files, strict=True)
        scaled = ((w * file.sites[path].scale, file.sites[path].factors()) for w, file in terms)
        result[path] = sum(scale * (B @ A) for scale, (B, A) in scaled)
    assert len(result) >= 24
    assert distance(read_peft(tmp_path / "out"), result) < 1e-6


def test_real_names(corpus):
    bloom = open_adapter_file(corpus / "wujindou__BLOOM-LORA", allow_pickle=True)
    (made,), _ = apply([bloom], [1.0], ["attn: 0.5", "layers 20-: 0"])
    kept = {f"transformer.h.{n}.self_attention.query_key_value" for n in range(20)}
    assert {path: site.factor for path, site in made.sites.items()} == dict.fromkeys(kept, 0.5)
    mlx = open_adapter_file(corpus / "wyek1n__MLX-CLI" / "0000100")
    (made,), _ = apply([mlx], [1.0], ["layers 21+23: 3"])
    found = {path for path, site in made.sites.items() if site.factor == 3.0}
    assert {layer(path) for path in found} == {21, 23} and len(found) == 4
    numbers = open_adapter_file(corpus / "cloneofsimo__lora" / "analog_svd_rank4.safetensors")
    with pytest.raises(UnsupportedError, match="'text_encoder:0' is no name of a U-Net's"):
        apply([numbers], [1.0], ["blocks[1]=ALL"])


def test_parameters_that_peft_tells_apart_together(tmp_path):
    """target_parameters of one module: both stay or both go."""
    names = ("experts.gate_up_proj", "experts.down_proj")
    files, _ = two(tmp_path, dict.fromkeys(names, (12, 16)))
    nested = [
        replace(
            file,
            sites={
                stem: replace(site, owner="experts", owned=("gate_up_proj", "down_proj"))
                for stem, site in file.sites.items()
            },
        )
        for file in files
    ]
    says = "leaves experts.gate_up_proj and takes out experts.down_proj, two parameters of experts"
    with pytest.raises(UsageError, match=says):
        apply(nested, [1.0, 1.0], [f"re:{names[1]}: 0,0"])
    apply(files, [1.0, 1.0], [f"re:{names[1]}: 0,0"])
    apply(nested, [1.0, 1.0], [f"re:{names[1]}: 0,1"])  # one adapter still has it
    apply(nested, [1.0, 1.0], ["re:experts.*: 0,2"])
