"""Methods that look at all modules of an adapter together: against all its entries in one row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import adapterops as ao
from adapterops.combining import combine
from adapterops.derived.rule import Rule, entries
from adapterops.derived.whole import Whole
from adapterops.errors import NumericsError, UsageError
from adapterops.rules.registry import METHODS, SCOPE
from tests import rules_dense_elements as elements
from tests.inspecting import call
from tests.support import dense, load_file, pairs, write_peft

SHAPES = {"layers.0.q_proj": (34, 31), "layers.1.up_proj": (24, 36), "layers.2.down_proj": (20, 9)}
WEIGHTS = np.array([0.7, 0.5, -0.3])
SCOPED = [name for name, each in METHODS.items() if SCOPE in each.parameters]
GRAMS = [name for name in SCOPED if METHODS[name].signature == "gram"]
ELEMENTS = [name for name in SCOPED if METHODS[name].signature == "elements"]
WHOLE = {"scope": "adapter"}


def three(tmp_path: Path, lacking: bool = False) -> tuple[list[Path], list[dict[str, np.ndarray]]]:
    """Adapters with something in common, each module ten times the one before; the second may
    lack one.
    """
    folders, changes = [], []
    shared = pairs(9, SHAPES, 2)
    for i, rank in enumerate((3, 2, 4)):
        factors = {}
        for place, (stem, (B, A)) in enumerate(pairs(i, SHAPES, rank).items()):
            left, right = shared[stem]
            factors[stem] = np.hstack([B, left]) * 10.0**place, np.vstack([A, right])
        if lacking and i == 1:
            del factors["layers.1.up_proj"]
        folders.append(write_peft(tmp_path / f"a{i}", factors, alpha=2.0 * (rank + 2)))
        changes.append(dense(factors, 2.0))
    return folders, changes


def row(change: dict[str, np.ndarray]) -> np.ndarray:
    """All entries of an adapter, (N,)."""
    parts = (change.get(stem, np.zeros(shape)) for stem, shape in SHAPES.items())
    return np.concatenate([part.ravel() for part in parts])


def rows(changes: list[dict[str, np.ndarray]]) -> np.ndarray:
    """All entries of every adapter, (T, 1, N)."""
    return np.stack(list(map(row, changes)))[:, None, :]


def apart(entries: np.ndarray) -> dict[str, np.ndarray]:
    """The modules of a row of entries."""
    ends = np.cumsum([m * n for m, n in SHAPES.values()])[:-1]
    parts = np.split(entries.ravel(), ends)
    return {stem: part.reshape(SHAPES[stem]) for stem, part in zip(SHAPES, parts, strict=True)}


def made(adapter: ao.Adapter) -> dict[str, np.ndarray]:
    return {stem: adapter[stem].dense() for stem in SHAPES}


def close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for stem, matrix in expected.items():
        assert np.abs(found[stem] - matrix).max() <= 1e-6 * (np.abs(matrix).max() or 1.0), stem


def test_the_methods_of_this_scope_are_those_that_look_at_whole_matrices():
    assert GRAMS == ["slerp", "nuslerp", "karcher", "model_stock"]
    assert ELEMENTS == ["magnitude_prune", "ties"]


@pytest.mark.parametrize("lacking", [False, True], ids=["all", "lacking"])
@pytest.mark.parametrize("name", GRAMS)
def test_a_gram_method_takes_the_inner_products_of_whole_adapters(name, lacking, tmp_path):
    count = METHODS[name].most or 3
    folders, changes = three(tmp_path, lacking)
    method, w = METHODS[name], np.abs(WEIGHTS[:count])
    D = rows(changes[:count])
    G = np.einsum("imn,jmn->ij", D, D)
    shares = method.function(G, w, **method.arguments(method.values({})))
    found = made(combine(name, folders[:count], w, parameters=WHOLE))
    close(found, apart(np.tensordot(shares, D, 1)))
    alone = made(combine(name, folders[:count], w))
    assert any(np.abs(found[stem] - alone[stem]).max() > 1e-3 for stem in SHAPES)


@pytest.mark.parametrize("lacking", [False, True], ids=["all", "lacking"])
@pytest.mark.parametrize("name", ELEMENTS)
def test_an_elementwise_method_trims_whole_adapters(name, lacking, tmp_path):
    folders, changes = three(tmp_path, lacking)
    D = rows(changes).astype(np.float32).astype(float)
    expected = getattr(elements, name)(D, WEIGHTS, None, density=0.3)
    found = combine(name, folders, WEIGHTS, parameters={"density": 0.3, **WHOLE})
    close(made(found), apart(expected))
    assert lacking or not expected[:, : 34 * 31].any()  # the smallest module goes whole


@pytest.mark.parametrize("space", ["core", "knots"])
def test_in_a_shared_space_the_limit_is_that_of_all_cores(space, tmp_path):
    folders, _ = three(tmp_path, lacking=True)
    rule = Rule(METHODS["ties"], METHODS["ties"].values({"density": 0.3}), space=space)
    opened = [ao.open_adapter(folder) for folder in folders]
    bases, blocks = {}, {}
    for stem in SHAPES:
        own = [i for i, adapter in enumerate(opened) if stem in adapter]
        left, right, M = entries(rule, [opened[i][stem] for i in own])
        bases[stem], blocks[stem] = (left, right), np.zeros((3, *M.shape[1:]))
        blocks[stem][own] = M
    D = np.concatenate([each.reshape(3, 1, -1) for each in blocks.values()], axis=-1)
    merged, start, expected = elements.ties(D, WEIGHTS, None, density=0.3).ravel(), 0, {}
    for stem, each in blocks.items():
        core = merged[start : start + each[0].size].reshape(each.shape[1:])
        start += each[0].size
        left, right = bases[stem]
        expected[stem] = left @ core if right is None else left @ core @ right.T
    given = {"density": 0.3, **WHOLE}
    close(made(combine("ties", folders, WEIGHTS, parameters=given, space=space)), expected)


def test_every_surface_and_any_number_of_jobs_write_the_same_bytes(tmp_path, monkeypatch):
    folders, _ = three(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = [folder.name for folder in folders]
    ao.merge(names, [1, 1, 1], out="python", method="ties", parameters=WHOLE, rank=6, jobs=1)
    line = ["merge", *names, "-w", "1,1,1", "-m", "ties", "--param", "scope=adapter", "--rank", "6"]
    call(*line, "-o", "cli", "-j", "2", cwd=tmp_path)
    text = 'ties(a, b, c, scope="adapter")'
    ao.calc(text, dict(zip("abc", names, strict=True)), out="calc", rank=6, jobs=2)
    ao.run("python", out="again")
    found = [
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("python", "cli", "calc", "again")
    ]
    for other in found[1:]:
        assert all(np.array_equal(other[name], tensor) for name, tensor in found[0].items())
    options = json.loads(Path("python/adapterops.json").read_text())["provenance"]["options"]
    assert options["parameters"]["scope"] == "adapter"


def test_only_the_chosen_modules_count(tmp_path):
    folders, changes = three(tmp_path)
    D = rows(changes)[:2, :, : 34 * 31]
    c = METHODS["nuslerp"].function(np.einsum("imn,jmn->ij", D, D), np.ones(2))
    found = combine("nuslerp", folders[:2], parameters=WHOLE, modules=r"layers\.0.*")
    expected = np.tensordot(c, D, 1).reshape(34, 31)
    assert np.abs(found["layers.0.q_proj"].dense() - expected).max() <= 1e-9
    assert list(found) == ["layers.0.q_proj"]


def test_entries_beside_the_limit_are_counted_once(tmp_path):
    B, A = np.ones((30, 1)), np.ones((1, 40))
    factors = {"a": (B, A), "b": (B, 2 * A)}
    folder = write_peft(tmp_path / "even", factors, alpha=1.0)
    report = ao.merge(
        [folder], out=tmp_path / "o", method="ties", parameters={"density": 0.5, **WHOLE}, rank=1
    )
    near = [method.near for module in report.modules.values() for method in module.methods]
    assert sorted(near, key=str) == [1199, None]


def test_weights_by_module_are_refused(tmp_path):
    folders, _ = three(tmp_path)
    with pytest.raises(UsageError, match="one weight for each adapter"):
        combine("ties", folders, parameters=WHOLE, module_weights=["layers 0-1: 1,0.5,0.25"])


def test_opposite_adapters_are_refused_and_nothing_is_written(tmp_path):
    [folder, *_], _ = three(tmp_path)
    with pytest.raises(NumericsError, match="opposite"):
        ao.merge([folder, folder], [1, -1], out=tmp_path / "o", method="slerp", parameters=WHOLE)
    assert not (tmp_path / "o").exists()


def test_match_norm_stays_by_module(tmp_path):
    folders, changes = three(tmp_path)
    found = made(combine("ties", folders, parameters=WHOLE, match_norm="mean"))
    for stem in ("layers.1.up_proj", "layers.2.down_proj"):
        wanted = np.mean([np.linalg.norm(each[stem]) for each in changes])
        assert np.linalg.norm(found[stem]) == pytest.approx(wanted, rel=1e-5)


def test_an_adapter_of_zeros_changes_nothing(tmp_path):
    folders, _ = three(tmp_path)
    nothing = {stem: (np.zeros((m, 2)), np.zeros((2, n))) for stem, (m, n) in SHAPES.items()}
    zero = write_peft(tmp_path / "zero", nothing, alpha=2.0)
    for name in SCOPED:
        if METHODS[name].most is None:
            close(
                made(combine(name, [*folders, zero], [*WEIGHTS, 1.0], parameters=WHOLE)),
                made(combine(name, folders, WEIGHTS, parameters=WHOLE)),
            )


@pytest.mark.parametrize("calibrate", [None, "pico"])
@pytest.mark.parametrize(
    ("name", "space"),
    [(name, space) for name in SCOPED for space in (METHODS[name].spaces or ("dense",))],
)
def test_of_a_single_module_both_scopes_are_one(name, space, calibrate, tmp_path):
    folders, _ = three(tmp_path)
    count = METHODS[name].most or 3
    found = [
        combine(
            name,
            folders[:count],
            parameters={"scope": scope},
            space=space,
            calibrate=calibrate,
            modules=r"layers\.1.*",
        )["layers.1.up_proj"].dense()
        for scope in ("module", "adapter")
    ]
    assert np.abs(found[0] - found[1]).max() <= 1e-6 * np.abs(found[0]).max()


@pytest.mark.parametrize("space", ["dense", "core", "knots"])
def test_where_nobody_has_an_entry_all_is_zero(space, tmp_path):
    nothing = {stem: (np.zeros((m, 2)), np.zeros((2, n))) for stem, (m, n) in SHAPES.items()}
    folders = [write_peft(tmp_path / f"z{i}", nothing, alpha=2.0) for i in range(2)]
    found = combine("ties", folders, parameters=WHOLE, space=space)
    assert not any(matrix.any() for matrix in made(found).values())


def test_what_cannot_be_known_is_looked_for_once(tmp_path, monkeypatch):
    [folder, *_], _ = three(tmp_path)
    found = combine("slerp", [folder, folder], [1, -1], parameters=WHOLE)
    passes, real = [], Whole._shares

    def counted(self):
        passes.append(self)
        return real(self)

    monkeypatch.setattr(Whole, "_shares", counted)
    for stem in SHAPES:
        with pytest.raises(NumericsError, match="opposite"):
            found[stem].dense()
    assert len(passes) == 1
