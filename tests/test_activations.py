"""Activation files: written and read, matched to an adapter's modules, refused by what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapterops import metric, open_adapter
from adapterops.activations import base_note, for_modules, open_activations, write_activations
from adapterops.errors import (
    FileError,
    FormatError,
    IncompatibleError,
    NumericsError,
    OutputExistsError,
    UnsafeFileError,
    UnsupportedError,
)
from tests.hostile import CASES
from tests.support import pairs, write_kohya, write_peft

METADATA = {"tokens": "1000", "model": "tiny/base"}


def gram(n: int, seed: int = 0) -> np.ndarray:
    X = np.random.default_rng(seed).standard_normal((2 * n, n)).astype(np.float32)
    return X.T @ X / len(X)


def save(path: Path, tensors: dict[str, np.ndarray], **metadata: Any) -> Path:
    """A file as anybody would write it, with the safetensors package."""
    given = {key: value for key, value in {**METADATA, **metadata}.items() if value is not None}
    save_file(tensors, path, metadata=given)
    return path


def sites(folder: Path):
    return open_adapter(folder).terms[0][1].sites


def test_round_trip(tmp_path):
    """What is written is read back by us and, values and all, by the safetensors package."""
    values = {"a.q": ("gram", gram(6)), "a.up": ("samples", np.arange(15.0).reshape(3, 5))}
    out = tmp_path / "x.safetensors"
    write_activations(out, values, tokens=77, model="tiny/base", shared={"a.k": "a.q"})
    found = open_activations(out)
    assert (found.tokens, found.model, found.path) == (77, "tiny/base", str(out))
    assert {name: (one.kind, one.width) for name, one in found.modules.items()} == {
        "a.q": ("gram", 6), "a.k": ("gram", 6), "a.up": ("samples", 5),
    }  # fmt: skip
    assert found.modules["a.k"].ref is found.modules["a.q"].ref
    back = load_file(out)
    assert back.keys() == {"a.q.gram", "a.up.samples"}
    assert all(array.dtype == np.float32 for array in back.values())
    for name, (kind, array) in values.items():
        assert np.array_equal(back[f"{name}.{kind}"], array.astype(np.float32))
        assert np.array_equal(found.modules[name].ref.read(), array.astype(np.float32))
    with pytest.raises(OutputExistsError):
        write_activations(out, values, tokens=77, model="tiny/base")
    write_activations(out, values, tokens=78, model="tiny/base", overwrite=True)
    assert open_activations(out).tokens == 78


def test_the_digest_tells_files_apart(tmp_path):
    first = save(tmp_path / "a.safetensors", {"q.gram": gram(6)})
    again = save(tmp_path / "b.safetensors", {"q.gram": gram(6)})
    values = save(tmp_path / "c.safetensors", {"q.gram": gram(6, seed=1)})
    tokens = save(tmp_path / "d.safetensors", {"q.gram": gram(6)}, tokens="1001")
    digests = [open_activations(path).digest for path in (first, again, values, tokens)]
    assert digests[0] == digests[1] and len(set(digests)) == 3 and len(digests[0]) == 64


@pytest.mark.parametrize("kind", ["gram", "samples"])
@pytest.mark.parametrize("start", [1, 40], ids=["after the first row", "after the fortieth"])
def test_the_digest_looks_beyond_the_first_row(start, kind, tmp_path):
    """A row of 1,100 numbers is more than 4 KiB: files of one module often begin alike."""
    n = 1100
    one = gram(n) if kind == "gram" else np.ones((64, n), dtype=np.float32)
    other = one.copy()
    other[start:] *= 2
    digests = [
        open_activations(save(tmp_path / f"{name}.safetensors", {f"q.{kind}": values})).digest
        for name, values in (("a", one), ("b", other), ("c", one.copy()))
    ]
    assert digests[0] == digests[2] != digests[1]


EYE = np.eye(4, dtype=np.float32)
MALFORMED = {
    "no tokens": ({"q.gram": EYE}, {"tokens": None}, "tokens None"),
    "no number": ({"q.gram": EYE}, {"tokens": "many"}, "tokens 'many'"),
    "no tokens seen": ({"q.gram": EYE}, {"tokens": "0"}, "above 0"),
    "digits of another script": ({"q.gram": EYE}, {"tokens": "٣"}, "above 0"),
    "no model": ({"q.gram": EYE}, {"model": None}, "does not name the model"),
    "blank model": ({"q.gram": EYE}, {"model": " "}, "does not name the model"),
    "empty": ({}, {}, "no tensors"),
    "another tensor": ({"q.weight": EYE}, {}, "'q.weight' is neither"),
    "no module": ({"gram": EYE}, {}, "'gram' is neither"),
    "half": ({"q.gram": EYE.astype(np.float16)}, {}, "float16, expected float32"),
    "integers": ({"q.gram": EYE.astype(np.int32)}, {}, "I32, expected float32"),
    "not square": ({"q.gram": EYE[:3]}, {}, r"\[3, 4\], expected a square matrix"),
    "a vector": ({"q.samples": EYE[0]}, {}, "a sample in each row"),
    "no samples": ({"q.samples": EYE[:0]}, {}, "a sample in each row"),
    "both": ({"q.gram": EYE, "q.samples": EYE}, {}, "both a gram and samples"),
    "shared is no object": ({"q.gram": EYE}, {"shared": "[1]"}, "no JSON object"),
    "shared is no JSON": ({"q.gram": EYE}, {"shared": "{"}, "no JSON object"),
    "shared with numbers": ({"q.gram": EYE}, {"shared": '{"k": 1}'}, "no JSON object"),
    "shared twice": ({"q.gram": EYE}, {"shared": '{"k": "q", "k": "q"}'}, "twice"),
    "shared with nothing": ({"q.gram": EYE}, {"shared": '{"k": "v"}'}, "which has no tensor"),
    "shared and stored": (
        {"q.gram": EYE, "k.gram": EYE}, {"shared": '{"k": "q"}'}, "both have tensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case, tmp_path):
    tensors, metadata, words = MALFORMED[case]
    path = save(tmp_path / "x.safetensors", tensors, **metadata)
    with pytest.raises(FormatError, match=words) as caught:
        open_activations(path)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("name", CASES)
def test_hostile_headers(name, tmp_path):
    data, error, words = CASES[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(error) as caught:
        open_activations(path)
    assert all(word in str(caught.value) for word in words)


def test_not_there(tmp_path):
    with pytest.raises(FileError, match="no such file"):
        open_activations(tmp_path / "x.safetensors")
    with pytest.raises(FileError, match="not a regular file"):
        open_activations(tmp_path)


@pytest.mark.parametrize("name", ["../evil", "/etc/x"])
def test_a_module_named_like_a_path(name, tmp_path):
    path = save(tmp_path / "x.safetensors", {f"{name}.gram": EYE})
    with pytest.raises(UnsafeFileError):
        open_activations(path)


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.", "a.b."])
@pytest.mark.parametrize("longer", ["adapter", "file"])
def test_names_differ_by_one_prefix(prefix, longer, tmp_path):
    stems = ["layers.0.q_proj", "layers.1.q_proj", "layers.1.up"]
    mine = [prefix * (longer == "adapter") + stem for stem in stems]
    names = [prefix * (longer == "file") + stem for stem in stems]
    folder = write_peft(tmp_path / "a", pairs(0, dict.fromkeys(mine, (3, 4)), 2))
    values = {f"{name}.gram": (i + 1) * EYE for i, name in enumerate(names)}
    values[f"{names[0]}.inner.gram"] = EYE  # more modules than the adapter has do no harm
    found = for_modules(open_activations(save(tmp_path / "x.st", values)), sites(folder))
    assert {stem: one.ref.name for stem, one in found.items()} == {
        stem: f"{name}.gram" for stem, name in zip(mine, names, strict=True)
    }


def test_the_same_name_wins_over_a_longer_one(tmp_path):
    folder = write_peft(tmp_path / "a", pairs(0, {"layers.0.q": (3, 4)}, 2))
    values = {"layers.0.q.gram": EYE, "draft.layers.0.q.gram": EYE}
    found = for_modules(open_activations(save(tmp_path / "x.st", values)), sites(folder))
    assert found["layers.0.q"].ref.name == "layers.0.q.gram"


def test_names_that_fit_in_two_ways(tmp_path):
    folder = write_peft(tmp_path / "a", pairs(0, {"layers.0.q": (3, 4)}, 2))
    values = {"text.layers.0.q.gram": EYE, "vision.layers.0.q.gram": EYE}
    with pytest.raises(IncompatibleError, match=r"'text\.' or 'vision\.'"):
        for_modules(open_activations(save(tmp_path / "x.st", values)), sites(folder))


def test_flat_stems(tmp_path):
    modules = ["down_blocks.0.attentions.1.to_q", "mid_block.attentions.0.to_out.0"]
    flat = ["lora_unet_" + name.replace(".", "_") for name in modules]
    file = write_kohya(
        tmp_path / "a.safetensors", pairs(0, dict.fromkeys(flat, (3, 4)), 2), alpha=2
    )
    opened = open_activations(save(tmp_path / "x.st", {f"{name}.gram": EYE for name in modules}))
    found = for_modules(opened, sites(file))
    assert [found[stem].ref.name for stem in flat] == [f"{name}.gram" for name in modules]


def test_another_model(tmp_path):
    """Module, both sizes and both models are named."""
    stems = {"layers.0.q": (3, 4), "layers.0.up": (3, 5)}
    folder = write_peft(tmp_path / "a", pairs(0, stems, 2))
    values = {"layers.0.q.gram": EYE, "layers.0.up.samples": EYE}
    opened = open_activations(save(tmp_path / "x.st", values, model="other/large"))
    with pytest.raises(IncompatibleError) as caught:
        for_modules(opened, sites(folder), base="tiny/base")
    message = str(caught.value)
    assert caught.value.module == "layers.0.up" and caught.value.exit_code == 4
    assert all(word in message for word in ("5 numbers", "4 in", "tiny/base", "other/large"))
    assert base_note(opened, None) is None and base_note(opened, "other/large") is None
    assert "tiny/base" in (base_note(opened, "tiny/base") or "")


def test_modules_it_lacks(tmp_path):
    stems = {f"layers.{i}.q": (3, 4) for i in range(7)}
    folder = write_peft(tmp_path / "a", pairs(0, stems, 2))
    opened = open_activations(save(tmp_path / "x.st", {"model.layers.2.q.gram": EYE}))
    with pytest.raises(IncompatibleError) as caught:
        for_modules(opened, sites(folder))
    message = str(caught.value)
    assert "lacks 6 of the adapter's 7 modules: layers.0.q, layers.1.q, layers.3.q and 3" in message
    assert "--modules" in message
    opened = open_activations(save(tmp_path / "x.st", {"unet.conv.gram": EYE}))
    with pytest.raises(IncompatibleError, match=r"lacks 7 .* it holds unet.conv"):
        for_modules(opened, sites(folder))


def test_convolutions_take_patches(tmp_path):
    """channels x kernel numbers; an activation file of channels alone is refused by name."""
    rng = np.random.default_rng(0)
    factors = {"lora_unet_conv_in": (rng.random((3, 2, 1, 1)), rng.random((2, 4, 3, 3)))}
    file = write_kohya(tmp_path / "a.safetensors", factors, alpha=2)
    patches = open_activations(save(tmp_path / "x.st", {"conv_in.gram": gram(36)}))
    assert for_modules(patches, sites(file))["lora_unet_conv_in"].width == 36
    channels = open_activations(save(tmp_path / "y.st", {"conv_in.gram": gram(4)}))
    with pytest.raises(
        IncompatibleError, match=r"36 numbers \(channels x kernel \[3, 3\]\).* 4 in"
    ):
        for_modules(channels, sites(file))


def test_embeddings_have_no_activations(tmp_path):
    folder = tmp_path / "a"
    write_peft(folder, pairs(0, {"layers.0.q": (3, 4)}, 2))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.embed.lora_embedding_A"] = np.ones((2, 4), np.float32)
    tensors["base_model.model.embed.lora_embedding_B"] = np.ones((3, 2), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"layers.0.q.gram": EYE, "embed.gram": EYE}
    opened = open_activations(save(tmp_path / "x.st", values))
    with pytest.raises(UnsupportedError, match="token numbers") as caught:
        for_modules(opened, sites(folder))
    assert caught.value.module == "embed" and "--modules" in str(caught.value)


BAD = {
    "nan": ({"q": ("gram", EYE * np.nan)}, {}, NumericsError, "NaN"),
    "too large": ({"q": ("gram", 1e39 * np.eye(4))}, {}, NumericsError, "float32"),
    "not square": ({"q": ("gram", EYE[:2])}, {}, FormatError, "square"),
    "no tokens": ({"q": ("gram", EYE)}, {"tokens": 0}, FormatError, "above 0"),
    "no model": ({"q": ("gram", EYE)}, {"model": ""}, FormatError, "name the model"),
    "nothing": ({}, {}, ValueError, "no modules"),
    "shared": ({"q": ("gram", EYE)}, {"shared": {"k": "v"}}, ValueError, "'k'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_written(case, tmp_path):
    values, options, error, words = BAD[case]
    values = {name: (kind, array.astype(np.float64)) for name, (kind, array) in values.items()}
    with pytest.raises(error, match=words):
        write_activations(
            tmp_path / "x", values, **{"tokens": 5, "model": "m", "shared": None, **options}
        )
    assert not list(tmp_path.iterdir())


def test_the_file_and_the_metric_agree(tmp_path):
    """From the file to a norm: E‖ΔWx‖² over the very samples, by gram and by samples."""
    X = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    folder = write_peft(tmp_path / "a", pairs(0, {"q": (3, 4)}, 2))
    adapter = open_adapter(folder)
    expected = np.sqrt(np.mean(np.sum((X @ adapter["q"].dense().T) ** 2, axis=1)))
    double = X.astype(np.float64)
    for kind, values in (("gram", double.T @ double / 50), ("samples", X)):
        out = tmp_path / kind
        write_activations(out, {"model.q": (kind, values)}, tokens=50, model="tiny/base")
        inputs = for_modules(open_activations(out), sites(folder))["q"]
        got = metric.norm(adapter["q"].B, adapter["q"].A, inputs)[0]
        assert got == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def collecting():
    """The example script that collects activation files."""
    folder = Path(__file__).parent.parent / "examples"
    sys.path.insert(0, str(folder))
    try:
        import collect_activations
    finally:
        sys.path.remove(str(folder))
    return collect_activations


@pytest.mark.filterwarnings("ignore")  # transformers' and torch's own
@pytest.mark.parametrize("samples", [0, 5])
def test_the_example_collects_what_modules_are_given(samples, collecting, tmp_path):
    """Of a tiny Llama, padding left out, against inputs recorded row by row."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    rows = [list(range(1, 12)), list(range(20, 27)), list(range(30, 45))]
    words = [" ".join(map(str, row)) for row in rows]
    batches = collecting.to_batches(
        words, lambda text: {"input_ids": [int(word) for word in text.split()]}, 15, 2, 1000
    )
    assert [tuple(ids.shape) for ids, _ in batches] == [(2, 11), (1, 15)]
    pattern = r".*\.(q_proj|k_proj|o_proj|down_proj)|lm_head"
    modules = collecting.chosen_modules(model, None, pattern)
    out = tmp_path / "x.safetensors"
    collecting.save(out, model, modules, batches, name="tiny", samples=samples, seed=3)

    seen: dict[str, list[np.ndarray]] = {path: [] for path in modules}
    for path, module in modules.items():
        module.register_forward_pre_hook(
            lambda _, given, path=path: seen[path].append(given[0][0].numpy().astype(float))
        )
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    found = open_activations(out)
    assert found.tokens == sum(map(len, rows)) and found.modules.keys() == modules.keys()
    for layer in ("model.layers.0.self_attn", "model.layers.1.self_attn"):
        shared = found.modules[f"{layer}.k_proj"], found.modules[f"{layer}.q_proj"]
        assert shared[0].ref is shared[1].ref
    for path, given in seen.items():
        X = np.concatenate(given)
        stored = found.modules[path].ref.read()
        if samples:
            assert stored.shape == (samples, X.shape[1])
            distances = np.abs(stored[:, None] - X[None]).max(axis=2)
            assert distances.min(axis=1).max() < 1e-5
            assert len(set(distances.argmin(axis=1))) == samples
        else:
            assert np.abs(stored - X.T @ X / len(X)).max() < 1e-5 * np.abs(stored).max()


def test_the_example_says_what_there_is_not(collecting):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Embedding(5, 6))
    with pytest.raises(SystemExit, match="no linear module matches nothing; there is 0"):
        collecting.chosen_modules(model, None, "nothing")
    assert list(collecting.chosen_modules(model, None, ".*")) == ["0"]
