"""The picture of a compression: its numbers against brute force, its grid, its files."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import adapterops as ao
from adapterops.certificate import Report
from adapterops.errors import OutputExistsError, UsageError
from adapterops.files.pictures import description
from adapterops.render import curves
from adapterops.render.compression_plot import compression_figure
from adapterops.render.curves import Compression
from adapterops.render.layers import arrange
from adapterops.render.plots import save_figure
from adapterops.verbs.compress import compress
from tests.support import pairs, write_peft

SHAPES = {"layers.0.q": (8, 6), "layers.0.v": (4, 6), "layers.1.q": (8, 6), "layers.1.v": (4, 6)}


def compression(
    spectra: dict[str, Any],
    ranks: dict[str, int],
    shapes: dict[str, tuple[int, int]] = SHAPES,
    **changes: Any,
) -> Compression:
    """A compression to these ranks with no storage error."""
    values = {stem: np.array(one, float) for stem, one in spectra.items()}
    norms = {stem: float(np.linalg.norm(one)) for stem, one in values.items()}
    lost = {stem: np.linalg.norm(one[ranks.get(stem, 0) :]) for stem, one in values.items()}
    norm = math.hypot(*norms.values())
    made = Compression(
        title="adapter → small",
        spectra=values,
        shapes={stem: shapes.get(stem, (8, 8)) for stem in values},
        ranks=ranks,
        errors={stem: float(lost[stem]) / norms[stem] if norms[stem] else None for stem in values},
        norm=norm,
        error=math.hypot(*lost.values()) / norm if norm else 0.0,
        storage=0.0,
        dtype="bfloat16",
        width=2,
    )
    return replace(made, **changes)


def random_spectra(seed: int, shapes: dict[str, tuple[int, int]], rank: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {stem: np.sort(rng.exponential(size=rank))[::-1] for stem in shapes}


def small(seed: int = 0) -> Compression:
    ranks = {"layers.0.q": 2, "layers.0.v": 0, "layers.1.q": 1, "layers.1.v": 3}
    return compression(random_spectra(seed, SHAPES, 3), ranks)


def sdxl(mark: str) -> list[str]:
    """722 modules of an SDXL U-Net, in kohya's flat names or with dots."""
    kinds = [f"attn{i}{mark}to_{x}" for i in (1, 2) for x in ("q", "k", "v", f"out{mark}0")]
    kinds += [f"ff{mark}net{mark}0{mark}proj", f"ff{mark}net{mark}2"]
    if mark == "_":
        depths = {4: 2, 5: 2, 7: 10, 8: 10}
        blocks = {f"lora_unet_input_blocks_{i}_1": depth for i, depth in depths.items()}
        blocks["lora_unet_middle_block_1"] = 10
        blocks |= {f"lora_unet_output_blocks_{i}_1": 10 if i < 3 else 2 for i in range(6)}
    else:
        blocks = {
            f"unet.down_blocks.{i}.attentions.{j}": (0, 2, 10)[i] for i in (1, 2) for j in (0, 1)
        }
        blocks["unet.mid_block.attentions.0"] = 10
        blocks |= {
            f"unet.up_blocks.{i}.attentions.{j}": (10, 2)[i] for i in (0, 1) for j in range(3)
        }
    stems = [f"{block}{mark}proj_{way}" for block in blocks for way in ("in", "out")]
    for block, depth in blocks.items():
        inner = [f"{block}{mark}transformer_blocks{mark}{i}{mark}" for i in range(depth)]
        stems += [begin + kind for begin in inner for kind in kinds]
    return stems


# The numbers.


def test_uniform_curve_is_the_dense_error() -> None:
    rng = np.random.default_rng(1)
    dense = {stem: rng.standard_normal(shape) for stem, shape in SHAPES.items()}
    parts = {stem: np.linalg.svd(one, full_matrices=False) for stem, one in dense.items()}
    found = compression({stem: part[1] for stem, part in parts.items()}, {})
    curve = curves.uniform(found)
    whole = math.sqrt(sum(float((one**2).sum()) for one in dense.values()))
    for k in range(7):
        lost = 0.0
        for stem, (left, values, right) in parts.items():
            cut = dense[stem] - (left[:, :k] * values[:k]) @ right[:k]
            lost += float((cut**2).sum())
        assert curve.errors[k] == pytest.approx(math.sqrt(lost) / whole, abs=1e-12)
        assert curve.parameters[k] == k * sum(m + n for m, n in SHAPES.values())


@pytest.mark.parametrize("seed", range(4))
def test_no_choice_of_ranks_beats_a_point_of_the_global_curve(seed: int) -> None:
    shapes = {"a": (40, 30), "b": (3, 4), "c": (20, 4), "d": (3, 4)}
    spectra = random_spectra(seed, shapes, 3)
    curve = curves.spent(compression(spectra, {}, shapes))
    norm = math.sqrt(sum(float((one**2).sum()) for one in spectra.values()))
    choices = []
    for ranks in itertools.product(range(4), repeat=4):
        lost = sum(
            float((one[k:] ** 2).sum()) for k, one in zip(ranks, spectra.values(), strict=True)
        )
        cost = sum(k * sum(shapes[stem]) for k, stem in zip(ranks, spectra, strict=True))
        choices.append((cost, math.sqrt(lost) / norm))
    assert len(curve.parameters) == 13 and list(curve.parameters) == sorted(curve.parameters)
    for cost, error in zip(curve.parameters, curve.errors, strict=True):
        best = min(other for size, other in choices if size <= cost)
        assert error == pytest.approx(best, abs=1e-12)
    assert curve.parameters[-1] == 3 * sum(m + n for m, n in shapes.values())


def test_the_uniform_curve_is_nowhere_below_the_hull_of_the_global_one() -> None:
    found = compression(random_spectra(5, SHAPES, 6), {})
    whole, best = curves.uniform(found), curves.spent(found)
    hull = np.interp(whole.parameters, best.parameters, best.errors**2)
    assert (hull <= whole.errors**2 + 1e-12).all()


def test_the_last_point_that_fits() -> None:
    curve = curves.Curve(np.array([0, 3, 7]), np.array([1.0, 0.5, 0.0]))
    assert [curve.point(size) for size in (0, 2, 3, 6, 7, 99)] == [0, 0, 1, 1, 2, 2]


def test_modules_are_measured_against_themselves() -> None:
    spectra = {"a": [4.0, 3.0], "b": [1.0], "c": [0.0, 0.0], "d": [30.0, 40.0][::-1]}
    table = curves.by_module(compression(spectra, {}))
    own = np.array([[1.0, 0.6, 0.0], [1.0, 0.0, 0.0], [1.0, 0.6, 0.0]])  # not the zero one
    assert table == pytest.approx(np.quantile(own, [0.1, 0.5, 0.9], axis=0), abs=1e-15)
    assert not curves.by_module(compression({"c": [0.0]}, {})).any()


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200], ids=str)
def test_tails_of_graded_values(scale: float) -> None:
    values = scale * 10.0 ** -np.arange(12)
    tail = curves.tails(values, curves.norm(values))
    for k in range(12):
        exact = math.sqrt(
            math.fsum(100.0**-i for i in range(k, 12)) / math.fsum(100.0**-i for i in range(12))
        )
        assert tail[k] == pytest.approx(exact, rel=1e-14)
    assert tail[12] == 0.0 and not curves.tails(np.zeros(3), 0.0).any()


def test_the_rank_that_is_enough() -> None:
    values = np.array([3.0, 2.0, 1.0])
    assert [curves.enough(values, share) for share in (0.5, 9 / 14, 0.65, 13 / 14, 0.99, 1.0)] == [
        1, 1, 2, 2, 3, 3,
    ]  # fmt: skip
    assert curves.enough(np.zeros(3), 0.99) == 0 == curves.enough(np.zeros(0), 0.99)


def test_what_is_not_listed_is_lost_at_every_rank() -> None:
    found = replace(small(), rest=0.5)
    for curve in (curves.uniform, curves.spent):
        errors = np.hypot(curve(small()).errors, 0.5 / found.norm)
        assert curve(found).errors == pytest.approx(errors, rel=1e-14)


def test_a_thinned_curve_has_points_of_the_whole_one() -> None:
    curve = curves.Curve(np.arange(5000), 1.0 / (1.0 + np.arange(5000)))
    thin = curves.thinned(curve, 100)
    assert 50 < len(thin.errors) <= 100 and (thin.parameters[[0, -1]] == [0, 4999]).all()
    assert (thin.errors == curve.errors[thin.parameters]).all()
    assert curves.thinned(curve, 5000) is curve


# From a certificate.


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("report")
    factors = pairs(3, {f"layers.{i}.{k}": (20, 16) for i in range(3) for k in "qv"}, 4)
    factors["layers.2.v"] = (0 * factors["layers.2.v"][0], factors["layers.2.v"][1])
    source = write_peft(folder / "a", factors)
    made = compress(source, out=folder / "b", rank=2, spectra=True, dtype="float16")
    assert isinstance(made, Report)
    return made


def test_numbers_of_a_certificate(report: Report) -> None:
    found = curves.of_report(report, "a → b")
    assert (found.width, found.dtype, found.rest) == (2, "float16", 0.0)
    assert found.parameters == report.parameters == 6 * 2 * 36
    assert found.error == report.error > 0 and found.mean_rank == 2.0
    curve = curves.uniform(found)
    assert curve.errors[2] == pytest.approx(report.truncation, rel=1e-9)
    assert curve.errors[0] == pytest.approx(1.0, rel=1e-12)
    assert found.errors["layers.2.v"] is None and not found.spectra["layers.2.v"].any()


def test_the_metric_of_a_certificate_decides(report: Report) -> None:
    first = "layers.0.q"
    modules = {
        **report.modules,
        first: replace(report.modules[first], metric_error=0.25, route="range", norm=9.0),
    }
    weighed = replace(report, metric="activation", metric_error=0.125, modules=modules)
    found = curves.of_report(weighed, "")
    assert (found.error, found.errors[first], found.storage) == (0.125, 0.25, 0.0)
    assert found.norm == pytest.approx(math.hypot(*map(curves.norm, found.spectra.values())))
    plain = curves.of_report(replace(report, modules=modules), "")
    listed = curves.norm(np.array(report.spectra[first]))
    assert plain.rest == pytest.approx(math.sqrt(81 - listed**2), rel=1e-12)
    assert "activations" in _text(compression_figure(found))


# The grid.


@pytest.mark.parametrize("mark", ["_", "."], ids=["kohya", "diffusers"])
def test_grid_of_sdxl(mark: str) -> None:
    stems = sdxl(mark)
    grid = arrange(stems)
    assert len(stems) == len(set(grid.places)) == 722
    assert (len(grid.rows), grid.width, grid.ordered) == (81, 12, False)
    assert grid.columns[:4] == (
        "proj_in",
        "proj_out",
        f"attn1{mark}to_k",
        f"attn1{mark}to_out{mark}0",
    )
    assert grid.columns[-2:] == (f"ff{mark}net{mark}0{mark}proj", f"ff{mark}net{mark}2")
    assert len(set(grid.heads)) == 11 == sum(1 for _ in itertools.groupby(grid.heads))
    middle = next(
        row for row in grid.rows if "mid" in row
    )  # one of a kind, yet in the same columns
    assert [grid.columns[c] for r, c in grid.places if grid.rows[r] == middle] == [
        "proj_in",
        "proj_out",
    ]


def test_grid_of_a_text_model() -> None:
    kinds = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
    stems = [f"model.layers.{i}.{kind}" for i in range(12) for kind in kinds]
    grid = arrange(stems)
    assert grid.columns == ("mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj")
    assert grid.rows == tuple(f"model.layers.{i}" for i in range(12))  # 2 before 10
    assert set(grid.heads) == {"model.layers"}
    assert grid.places[stems.index("model.layers.10.self_attn.q_proj")] == (10, 1)
    swapped = arrange(stems[::-1])
    assert swapped.places == grid.places[::-1] and swapped.columns == grid.columns


@pytest.mark.parametrize(("experts", "named"), [(8, 17), (16, 0)], ids=["8", "16"])
def test_grid_of_experts_has_a_row_for_each_layer(experts: int, named: int) -> None:
    each = [f"mlp.{e}.{w}" for e in range(experts) for w in ("up", "down")]
    stems = [f"h.{i}.{kind}" for i in range(32) for kind in ("attn.q", *each)]
    grid = arrange(stems)
    assert (len(grid.rows), grid.width, grid.ordered) == (32, 2 * experts + 1, False)
    assert len(grid.columns) == named and len(set(grid.places)) == len(stems)
    assert all(
        grid.rows[row] == f"h.{index // grid.width}" for index, (row, _) in enumerate(grid.places)
    )


def test_names_that_fit_no_grid_stand_in_order() -> None:
    stems = [f"unet:{i}" for i in range(200)]
    grid = arrange(stems)
    assert grid.ordered and grid.columns == () and grid.width == 18 and len(grid.rows) == 12
    assert grid.places == tuple(divmod(i, 18) for i in range(200))
    assert grid.rows[:2] == ("1", "19")


def test_labels_tell_kinds_apart() -> None:
    long = "a_name_that_is_much_too_long"
    kinds = [f"{long}.in.proj", f"{long}.out.proj", f"{long}.x.{'z' * 30}", f"{long}.y.{'z' * 30}"]
    grid = arrange([f"h.{i}.{kind}" for i in range(3) for kind in kinds])
    assert grid.columns == (*kinds[2:], "much_too_long.in.proj", "much_too_long.out.proj")


@given(
    st.lists(
        st.text("ab01._:/*$é ", min_size=1, max_size=12)
        | st.from_regex(r"h\.\d\d?\.[qkv]", fullmatch=True),
        min_size=0,
        max_size=30,
        unique=True,
    )
)
def test_every_module_has_a_cell_of_its_own(stems: list[str]) -> None:
    grid = arrange(stems)
    assert len(grid.places) == len(set(grid.places)) == len(stems)
    assert all(0 <= r < len(grid.rows) and 0 <= c < grid.width for r, c in grid.places)
    assert len(grid.heads) == len(grid.rows) and len(grid.columns) in (0, grid.width)


# The picture.


def _texts(figure: Any) -> Iterator[str]:
    import matplotlib.text

    for one in figure.findobj(matplotlib.text.Text):
        yield one.get_text()


def _text(figure: Any) -> str:
    return "\n".join(_texts(figure))


def test_what_is_drawn_are_the_numbers() -> None:
    found = small()
    figure = compression_figure(found)
    by_rank, by_size = figure.subfigs[0].axes[:2]
    whole, best = curves.uniform(found), curves.spent(found)
    lines = {line.get_label(): line for line in (*by_rank.lines, *by_size.lines)}
    assert lines["whole adapter"].get_ydata() == pytest.approx(100 * np.maximum(whole.errors, 1e-8))
    drawn = next(line for label, line in lines.items() if label.startswith("ranks by module"))
    assert drawn.get_ydata() == pytest.approx(100 * np.maximum(best.errors, 1e-8))
    assert drawn.get_xdata()[1:] == pytest.approx(best.parameters[1:] * 2 / 1e3)  # kB
    stars = [line for line in lines.values() if line.get_marker() == "*"]
    assert [line.get_ydata()[0] for line in stars] == pytest.approx([100 * found.error] * 2)
    assert [line.get_xdata()[0] for line in stars] == pytest.approx(
        [found.parameters / 48, found.parameters * 2 / 1e3]
    )
    text = _text(figure)
    assert "kept: ranks 0–3" in text and "left out (rank 0)" in text and "adapter → small" in text


def test_cells_are_the_modules() -> None:
    found = small()
    figure = compression_figure(found)
    before, kept, error = (axes.collections[0].get_array() for axes in figure.subfigs[1].axes[:3])
    for index, stem in enumerate(found.stems):
        place = divmod(index, 2)  # two layers of q and v
        assert before[place] == curves.enough(found.spectra[stem], 0.99)
        if stem == "layers.0.v":
            assert kept[place] == error[place] == -1.0  # grey: left out
        else:
            assert kept[place] == found.ranks[stem]
            assert error[place] == pytest.approx(100 * (found.errors[stem] or 0.0))


def test_storage_is_drawn_and_named() -> None:
    seen = _text(compression_figure(replace(small(), storage=0.05)))
    assert "storage in bfloat16 alone: 5 %" in seen and "below" not in seen
    assert "storage in bfloat16 alone: 1e-05 % (below)" in _text(
        compression_figure(replace(small(), storage=1e-7))
    )


CASES = {
    "one module": compression({"q": [3.0, 1.0]}, {"q": 1}),
    "rank one": compression({"q": [3.0]}, {"q": 1}),
    "all zero": compression({"h.0.q": [0.0, 0.0], "h.1.q": [0.0]}, {"h.0.q": 1, "h.1.q": 1}),
    "one zero": compression({"h.0.q": [0.0, 0.0], "h.1.q": [1.0, 1e-3]}, {"h.0.q": 1, "h.1.q": 1}),
    "nothing kept": compression(random_spectra(0, SHAPES, 3), {}),
    "nothing lost": compression(random_spectra(0, SHAPES, 3), dict.fromkeys(SHAPES, 3)),
    "no modules": compression({}, {}),
    "no values": compression({"q": []}, {}),
    "full deltas only": compression({}, {}, norm=1.0),
    "extremes": compression({"h.0.q": [1e150, 1e-150], "h.1.q": [1e-150]}, {"h.0.q": 1}),
    "ranks of 128": compression(random_spectra(0, SHAPES, 128), dict.fromkeys(SHAPES, 16)),
    "many": compression(
        random_spectra(0, dict.fromkeys(sdxl("_"), (8, 8)), 8), dict.fromkeys(sdxl("_"), 4)
    ),
}


@pytest.mark.parametrize("found", CASES.values(), ids=[name.replace(" ", "-") for name in CASES])
def test_every_adapter_has_a_picture(found: Compression, tmp_path: Path) -> None:
    path = tmp_path / "p.svg"
    save_figure(compression_figure(found), path)
    text = path.read_text()
    assert "adapter → small" in text and "mathdefault" not in text
    assert ("what each size would lose" in text) == any(one.any() for one in found.spectra.values())


def test_odd_names(tmp_path: Path) -> None:
    names = [
        "$x_1$",
        "アダプタ.0",
        "n" * 200,
        "a\x1b[31m.1.q",
        "<b>&\"'.3",
        "*.7",
        "..",
        "_",
        "h.٣.q",
    ]
    spectra = random_spectra(2, dict.fromkeys(names, (4, 4)), 2)
    found = compression(spectra, dict.fromkeys(names, 1), title="a\x1b]0;b → <c>" + "t" * 300)
    save_figure(compression_figure(found), tmp_path / "p.svg")
    text = (tmp_path / "p.svg").read_text()
    assert "$x_1$" in text and "\\x1b[31m" in text and "&lt;b&gt;" in text and "\x1b" not in text
    assert "n" * 50 not in text and "t" * 200 not in text


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_files_are_deterministic_and_described(kind: str, tmp_path: Path) -> None:
    first, again = tmp_path / f"1.{kind}", tmp_path / f"2.{kind}"
    for path in (first, again):
        save_figure(compression_figure(small()), path, description='{"from": "<here> & there"}')
    assert first.read_bytes() == again.read_bytes() != b""
    assert description(first) == '{"from": "<here> & there"}'
    assert kind == "png" or "<dc:date>" not in first.read_text()


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    path, figure = tmp_path / "p.png", compression_figure(CASES["all zero"])
    save_figure(figure, path)
    written = path.read_bytes()
    with pytest.raises(OutputExistsError):
        save_figure(figure, path)
    with pytest.raises(UsageError, match=r"\.svg or \.png"):
        save_figure(figure, tmp_path / "p.pdf")
    assert path.read_bytes() == written and list(tmp_path.iterdir()) == [path]
    save_figure(figure, path, description="other", overwrite=True)
    assert description(path) == "other" and list(tmp_path.iterdir()) == [path]


def test_numbers_need_no_matplotlib() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from adapterops.render import compression_plot, curves, heat_map, layers, plots\n"
        "try: plots.check_picture('p.svg')\n"
        "except Exception as error: print(error.hint)"
    )
    root = Path(ao.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.stdout.strip() == "pip install 'adapterops[report]'"
