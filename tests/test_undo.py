"""Undo files: the source of a baked file is restored bit for bit, or refused."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest
import torch

from adapterops import casts
from adapterops.baking.bands import bands
from adapterops.baking.delta import Delta
from adapterops.baking.kernel import Rounding, bake_rows
from adapterops.baking.shards import Copy, Shard
from adapterops.changes.targets import DenseTerm, Target, Term, Values
from adapterops.errors import FormatError, NumericsError
from adapterops.extras import Extra
from adapterops.files.header import encode_header, layout
from adapterops.files.source import LocalFile, read_header
from adapterops.formats import open_adapter_file
from adapterops.provenance import Origin, file_sha256
from adapterops.rounding.grid import TORCH
from adapterops.rounding.precision import exact_arithmetic
from adapterops.stream import Compute
from adapterops.undoing import saving
from adapterops.undoing.restore import restored, tensors_of
from adapterops.undoing.undo import FileId, Saved, UndoWriter, read_undo
from tests import support

ON = Compute(threads=2)
MODES = ("exact", "nearest", "stochastic", "compensated")


def write_file(path, tensors):
    """A safetensors file of (dtype, shape, bytes) by name."""
    entries = layout({name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()})
    data = b"".join(bytes(tensors[name][2]) for name in entries)
    path.write_bytes(encode_header(entries, {"format": "pt"}) + data)
    return path


def refs(path):
    return tensors_of(LocalFile(path))


def stored(values, dtype):
    return dtype, values.shape, casts.stored_bytes(casts.store(values, dtype))


def terms_of(folder, **layouts):
    """One term for each module of an adapter, by module."""
    file = open_adapter_file(folder)
    found = {}
    for stem, site in file.sites.items():
        m, n = site.shape
        rows, columns, turned = layouts.get(
            stem.rpartition(".")[2], (slice(0, m, 1), slice(0, n, 1), False)
        )
        found[stem] = Term(0, 0.7 * site.scale, site, rows, columns, turned)
    return found


def bake_file(path, base, targets, mode, dtype=None, given=None):
    """The baked file of a base file; `given` are tensors with new values."""
    out = {}
    with exact_arithmetic():
        for name, ref in base.items():
            kind = dtype or ref.dtype
            if name in (given or {}):
                out[name] = given[name]
            elif name in targets:
                parts = []
                for band in bands(targets[name]):
                    if band.is_changed:
                        delta = Delta(targets[name], band)
                        how = Rounding(mode, kind, seed=3)
                        parts.append(bake_rows(delta, band.start, band.stop, how)[1])
                    else:
                        wide = ref.read().reshape(targets[name].matrix)[band.start : band.stop]
                        parts.append(torch.from_numpy(wide).to(TORCH[kind]))
                out[name] = (kind, ref.shape, casts.stored_bytes(torch.cat(parts)))
            elif kind != ref.dtype and ref.dtype in casts.FORMATS:
                out[name] = stored(np.asarray(ref.read()), kind)
            else:
                out[name] = (ref.dtype, ref.shape, ref.raw().data)
    for name, value in (given or {}).items():
        out.setdefault(name, value)
    return write_file(path, out)


def saved_for(base, targets, baked, given=(), dtype=None):
    """What `saving.saved` makes of the plan of a file."""
    header = read_header(LocalFile(baked))
    pieces = []
    for name, entry in header.tensors.items():
        ref = base.get(name)
        if name in targets:
            pieces.append(targets[name])
        elif name in given:
            extra = Extra(name, entry.dtype, entry.shape, (), ())
            pieces.append(Values(name, entry.dtype, entry.shape, extra, ref=ref))
        elif dtype and ref.dtype in casts.FORMATS:
            pieces.append(Target(name, ref, (1, int(np.prod(ref.shape)))))
        else:
            pieces.append(Copy(ref, ref.offset, ref.offset + ref.nbytes))
    path = next(iter(base.values())).source.path
    shard = Shard("", path, b"", header.tensors, tuple(pieces), 0, False)
    return saving.saved(shard)


def identity(path):
    return FileId(os.path.basename(path), os.path.getsize(path), file_sha256(path))


def undo_of(tmp_path, base_file, baked, entries):
    """The undo file of a baked file, reopened."""
    path = tmp_path / "model.safetensors.undo"
    inputs = (Origin("adapter", "ab" * 32, 0.7),)
    ids = identity(base_file), identity(baked)
    saving.write_undo(path, base_file, baked, entries, inputs, ids, ON)
    return path


def check_restored(undo_path, base_file, baked):
    undo = read_undo(undo_path)
    data = b"".join(restored(undo, refs(baked), ON))
    assert data == base_file.read_bytes()
    assert hashlib.sha256(data).hexdigest() == undo.source.sha256
    return undo


SHAPES = {"model.q_proj": (96, 64), "model.k_proj": (32, 64), "model.c_fc": (64, 128)}


@pytest.fixture
def made(tmp_path):
    """A base file, the targets of an adapter on it and that adapter's folder."""

    def make(dtype="BF16", size=0.05, factor_dtype=np.float16):
        rng = np.random.default_rng(5)
        base = write_file(
            tmp_path / "model.safetensors",
            {
                "model.qk.weight": stored(0.02 * rng.standard_normal((160, 64)), dtype),
                "model.c_fc.weight": stored(0.02 * rng.standard_normal((128, 64)), dtype),
                "model.norm.weight": stored(np.ones(64), dtype),
                "ids": ("I64", (3,), np.arange(3).data.cast("B")),
                "empty": (dtype, (0, 4), b""),
            },
        )
        pairs = {
            name: (
                (size * 0.02 * rng.standard_normal((m, 4)) / 2).astype(factor_dtype),
                rng.standard_normal((4, n)).astype(factor_dtype),
            )
            for name, (m, n) in SHAPES.items()
        }
        folder = support.write_peft(tmp_path / "adapter", pairs, alpha=4)
        terms = terms_of(
            folder,
            q_proj=(slice(0, 96, 1), slice(0, 64, 1), False),
            k_proj=(slice(128, 160, 1), slice(0, 64, 1), False),  # rows 96 to 128 stay
            c_fc=(slice(0, 128, 1), slice(0, 64, 1), True),
        )
        found = refs(base)
        qk = (terms["model.q_proj"], terms["model.k_proj"])
        targets = {
            "model.qk.weight": Target("model.qk.weight", found["model.qk.weight"], (160, 64), qk),
            "model.c_fc.weight": Target(
                "model.c_fc.weight",
                found["model.c_fc.weight"],
                (128, 64),
                (terms["model.c_fc"],),
                inputs="rows",
            ),
        }
        return base, targets, folder

    return make


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_every_rounding_is_undone(made, tmp_path, dtype, mode):
    base, targets, folder = made(dtype)
    baked = bake_file(tmp_path / "baked.safetensors", refs(base), targets, mode)
    assert baked.read_bytes() != base.read_bytes()
    entries = saved_for(refs(base), targets, baked)
    assert {entry.name: entry.how for entry in entries} == dict.fromkeys(targets, "rounding")
    path = undo_of(tmp_path, base, baked, entries)
    for file in folder.iterdir():  # nothing but the baked file is needed
        file.unlink()
    undo = check_restored(path, base, baked)
    assert undo.inputs == (Origin("adapter", "ab" * 32, 0.7),)
    assert undo.baked == identity(baked)


@pytest.mark.parametrize("wide,narrow", [("F32", "BF16"), ("BF16", "F32"), ("F16", "BF16")])
def test_another_type_is_undone(made, tmp_path, wide, narrow):
    base, targets, _ = made(wide)
    baked = bake_file(tmp_path / "baked.safetensors", refs(base), targets, "exact", narrow)
    entries = saved_for(refs(base), targets, baked, dtype=narrow)
    assert {e.how for e in entries} == {"rounding"}
    assert {e.name for e in entries} == {*targets, "model.norm.weight"}
    check_restored(undo_of(tmp_path, base, baked, entries), base, baked)


def test_float64_is_saved_as_differences(made, tmp_path):
    base, targets, _ = made("F64")
    baked = bake_file(tmp_path / "baked.safetensors", refs(base), targets, "exact")
    entries = saved_for(refs(base), targets, baked)
    assert {entry.how for entry in entries} == {"difference"}
    check_restored(undo_of(tmp_path, base, baked, entries), base, baked)


def test_parts_of_a_fused_projection_are_undone(tmp_path):
    rng = np.random.default_rng(8)
    shapes = {"q.weight": (48, 32), "k.weight": (16, 32)}
    base = write_file(
        tmp_path / "model.safetensors",
        {name: stored(0.02 * rng.standard_normal(shape), "BF16") for name, shape in shapes.items()},
    )
    factors = {"qk": (rng.standard_normal((64, 2)) / 99, rng.standard_normal((2, 32)))}
    whole = terms_of(support.write_peft(tmp_path / "adapter", factors))["qk"]
    targets = {}
    for name, (rows, columns) in shapes.items():
        first = 0 if name == "q.weight" else 48
        term = Term(
            0,
            whole.coefficient,
            whole.site,
            slice(0, rows, 1),
            slice(0, columns, 1),
            outputs=slice(first, first + rows, 1),
        )
        targets[name] = Target(name, refs(base)[name], (rows, columns), (term,))
    baked = bake_file(tmp_path / "baked.safetensors", refs(base), targets, "exact")
    path = undo_of(tmp_path, base, baked, saved_for(refs(base), targets, baked))
    undo = check_restored(path, base, baked)
    assert undo.manifest.pairs == 1  # carried once, used twice


class Noise:
    """A dense change."""

    def rows(self, start, stop):
        return 1e-3 * np.random.default_rng(9).standard_normal((160, 64))[start:stop]


def test_a_dense_change_is_saved_as_differences(made, tmp_path):
    base, _, _ = made()
    dense = Target(
        "model.qk.weight",
        refs(base)["model.qk.weight"],
        (160, 64),
        (),
        (DenseTerm(0, 1.0, "model.qk", Noise),),
    )
    baked = bake_file(
        tmp_path / "baked.safetensors", refs(base), {"model.qk.weight": dense}, "exact"
    )
    entries = saved_for(refs(base), {"model.qk.weight": dense}, baked)
    assert entries == [Saved("model.qk.weight", "difference")]
    check_restored(undo_of(tmp_path, base, baked, entries), base, baked)


def test_replaced_grown_and_new_tensors(made, tmp_path):
    base, targets, _ = made()
    rng = np.random.default_rng(2)
    given = {
        "model.norm.weight": stored(rng.standard_normal(64), "BF16"),
        "model.c_fc.weight": stored(rng.standard_normal((132, 64)), "BF16"),  # grown
        "lm_head.weight": stored(rng.standard_normal((4, 4)), "BF16"),  # the base has none
    }
    kept = {"model.qk.weight": targets["model.qk.weight"]}
    baked = bake_file(tmp_path / "baked.safetensors", refs(base), kept, "exact", given=given)
    entries = saved_for(refs(base), kept, baked, given)
    assert {entry.name: entry.how for entry in entries} == {
        "model.qk.weight": "rounding",
        "model.norm.weight": "difference",
        "model.c_fc.weight": "whole",
    }
    check_restored(undo_of(tmp_path, base, baked, entries), base, baked)


def test_bits_that_are_no_numbers_are_restored_too(tmp_path):
    codes = np.array([0x0000, 0x8000, 0x7FC1, 0xFF80, 0x0001, 0x7F7F] * 4, "<u2").reshape(4, 6)
    base = write_file(
        tmp_path / "base.safetensors", {"head": ("BF16", (4, 6), codes.data.cast("B"))}
    )
    new = write_file(tmp_path / "new.safetensors", {"head": stored(np.ones((4, 6)), "BF16")})
    entries = [Saved("head", "difference")]
    check_restored(undo_of(tmp_path, base, new, entries), base, new)


@pytest.mark.parametrize(
    "mode,ratio,most",
    [
        ("exact", 5e-4, 0.002),
        ("exact", 5e-3, 0.005),
        ("exact", 5e-2, 0.02),
        ("nearest", 5e-2, 0.04),
        ("compensated", 5e-3, 0.10),
        ("compensated", 5e-2, 0.10),
    ],
)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_residuals_are_a_small_share_of_the_file(tmp_path, dtype, mode, ratio, most):
    rng = np.random.default_rng(1)
    m, n, rank = 512, 1024, 16
    base = write_file(
        tmp_path / "model.safetensors",
        {"w.weight": stored(0.02 * rng.standard_normal((m, n)), dtype)},
    )
    B = (ratio * 0.02 / rank**0.5 * rng.standard_normal((m, rank))).astype(np.float32)
    A = rng.standard_normal((rank, n)).astype(np.float32)
    folder = support.write_peft(tmp_path / "adapter", {"w": (B, A)}, alpha=rank / 0.7)
    target = Target("w.weight", refs(base)["w.weight"], (m, n), (terms_of(folder)["w"],))
    baked = bake_file(tmp_path / "baked.safetensors", refs(base), {"w.weight": target}, mode)
    path = undo_of(tmp_path, base, baked, [Saved("w.weight", "rounding", target)])
    undo = check_restored(path, base, baked)
    share = undo.header.tensors["rest.w.weight"].nbytes / target.ref.nbytes
    assert 0 < share <= most


def test_factors_are_kept_in_the_narrowest_type_that_holds_them(made, tmp_path):
    base, targets, _ = made("BF16", factor_dtype=np.float32)
    baked = bake_file(tmp_path / "baked.safetensors", refs(base), targets, "exact")
    path = undo_of(tmp_path, base, baked, saved_for(refs(base), targets, baked))
    kept = {n: e.dtype for n, e in read_undo(path).header.tensors.items() if n[:7] == "factors"}
    assert set(kept.values()) == {"F32"}
    assert len(kept) == 2 * 3


def test_a_baked_file_that_changed_is_not_restored_from(made, tmp_path):
    base, targets, _ = made()
    baked = bake_file(tmp_path / "baked.safetensors", refs(base), targets, "exact")
    path = undo_of(tmp_path, base, baked, saved_for(refs(base), targets, baked))
    raw = bytearray(baked.read_bytes())
    raw[-1] ^= 1
    baked.write_bytes(raw)
    with pytest.raises(NumericsError, match=r"not the file that was baked.*baked\.safetensors"):
        list(restored(read_undo(path), refs(baked), ON))
    raw[-1] ^= 1
    raw[-64:] = bytes(64)
    baked.write_bytes(raw)
    with pytest.raises((NumericsError, FormatError)):
        list(restored(read_undo(path), refs(baked), ON))


@pytest.mark.parametrize("spoil", ["missing", "type", "shape"])
def test_another_models_file_is_refused(made, tmp_path, spoil):
    base, targets, _ = made()
    baked = bake_file(tmp_path / "baked.safetensors", refs(base), targets, "exact")
    path = undo_of(tmp_path, base, baked, saved_for(refs(base), targets, baked))
    tensors = {n: (r.dtype, r.shape, r.raw().data) for n, r in refs(baked).items()}
    if spoil == "missing":
        del tensors["model.norm.weight"]
    elif spoil == "type":
        tensors["model.norm.weight"] = stored(np.ones(64), "F32")
    else:
        tensors["model.qk.weight"] = stored(np.ones((160, 32)), "BF16")
    other = write_file(tmp_path / "other.safetensors", tensors)
    with pytest.raises(FormatError, match="cannot be restored"):
        list(restored(read_undo(path), refs(other), ON))


def rewritten(path, change):
    """An undo file with another manifest."""
    header = read_header(LocalFile(path))
    data = path.read_bytes()[header.data_start :]
    manifest = json.loads(header.metadata["adapterops"])
    change(manifest)
    path.write_bytes(encode_header(header.tensors, {"adapterops": json.dumps(manifest)}) + data)


def first_term(manifest):
    return manifest["tensors"]["model.qk.weight"]["target"]["terms"][0]


def terms(manifest):
    return manifest["tensors"]["model.c_fc.weight"]["target"]["terms"]


def small_terms(manifest):
    """Terms of one element each, all apart, by the first factors."""
    term = {"factors": 0, "input": 0, "coefficient": 1.0, "outputs": [0, 1, 1], "inputs": [0, 1, 1]}
    places = (divmod(k, 64) for k in range(5000))
    small = [term | {"rows": [i, i + 1, 1], "columns": [j, j + 1, 1]} for i, j in places]
    terms(manifest)[:] = small


def said(manifest, how):
    manifest["tensors"]["model.c_fc.weight"]["how"] = how


HOSTILE = {
    "another schema": (lambda m: m.update(schema="adapterops.undo/9"), "no undo file"),
    "an unknown field": (lambda m: m.update(extra=1), "no undo file"),
    "a tensor of no file": (lambda m: m["tensors"].update(x={"how": "whole"}), "does not have"),
    "factors of no file": (lambda m: first_term(m).update(factors=99), "needs factors 99 of 3"),
    "negative factors": (lambda m: first_term(m).update(factors=-1), "needs factors -1"),
    "rows outside": (lambda m: first_term(m).update(rows=[0, 1000, 1]), "do not fit"),
    "a step of none": (lambda m: first_term(m).update(rows=[0, 96, 0]), "do not fit"),
    "other rows": (lambda m: first_term(m).update(rows=[0, 90, 1]), "for 90 x 64"),
    "outputs outside": (lambda m: first_term(m).update(outputs=[0, 97, 1]), "do not fit"),
    "pairs that are not there": (lambda m: m.update(pairs=4), "no usable tensor"),
    "no target": (lambda m: m["tensors"].update({"model.qk.weight": {"how": "rounding"}}), "say"),
    "terms again and again": (lambda m: terms(m).extend(99 * terms(m)), "twice at one place"),
    "terms of one place each": (small_terms, "of rank"),
    "a rounding said to be whole": (lambda m: said(m, "whole"), "and this is none"),
    "a rounding said to be a difference": (lambda m: said(m, "difference"), "and this is none"),
    "another size": (lambda m: m["source"].update(size=12345), "truncated|follow"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_manifests_are_refused(made, tmp_path, how):
    base, targets, _ = made()
    baked = bake_file(tmp_path / "baked.safetensors", refs(base), targets, "exact")
    path = undo_of(tmp_path, base, baked, saved_for(refs(base), targets, baked))
    change, message = HOSTILE[how]
    rewritten(path, change)
    with pytest.raises(FormatError, match=message):
        list(restored(read_undo(path), refs(baked), ON))


def test_a_model_is_no_undo_file(made):
    base, _, _ = made()
    with pytest.raises(FormatError, match="no undo file"):
        read_undo(base)


def test_tensors_are_written_one_after_the_other(made, tmp_path):
    base, _, _ = made()
    entries = [Saved("model.norm.weight", "whole"), Saved("ids", "whole")]
    head = base.read_bytes()[: read_header(LocalFile(base)).data_start]
    writer = UndoWriter(tmp_path / "x.undo", head, entries, ())
    try:
        writer.extend("model.norm.weight", b"one")
        writer.extend("model.norm.weight", b"two")
        writer.extend("ids", b"three")
        with pytest.raises(ValueError, match="not the last"):
            writer.extend("model.norm.weight", b"four")
    finally:
        writer.close()
