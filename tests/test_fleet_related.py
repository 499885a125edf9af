"""Related tenants: false discoveries by simulation, planted ones found, groups without chains."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from adapterops.fleet.relating import background, related
from adapterops.fleet.relating.cliques import cliques
from adapterops.fleet.relating.related import Part, Sample, step_up
from adapterops.stream import Compute

ON = Compute(threads=1)
WIDTH = 4096  # columns of an ordinary sketch


def discover(rows, on, starts=None, **options):
    """What one sample shows."""
    [found] = related.discover([Sample(rows, starts)], on, **options)
    return found


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def deltas(rng, count, width=1024):
    """Sketches of unrelated ΔW: sums over many modules, near to normal."""
    return unit(rng.standard_normal((count, width)))


def products(rng, count, modules=60, side=8, rank=2):
    """ΔW itself, of low rank and unequal modules: cosines with heavier tails than normal ones."""
    u = rng.standard_normal((count, modules, side, rank))
    v = rng.standard_normal((count, modules, rank, side))
    size = np.exp(0.5 * rng.standard_normal((count, modules, 1, 1)))
    return unit((size * (u @ v)).reshape(count, -1))


def grams(rng, count, modules=60, side=10, rank=4):
    """ΔWΔWᵀ by module: all cosines are positive, and skewed."""
    u = rng.standard_normal((count, modules, side, rank))
    size = np.exp(0.3 * rng.standard_normal((count, modules, 1, 1)))
    return unit((size * (u @ u.swapaxes(-1, -2))).reshape(count, -1))


def mixed_ranks(rng, count):
    """Half of the fleet scatters more than the other."""
    rows = products(rng, count, modules=60, side=8, rank=1)
    rows[::2] = unit(rng.standard_normal(rows[::2].shape))
    return rows


def leaning(rng, count, width=1024):
    """Every tenant leans, more or less, to a direction that all share."""
    common = rng.standard_normal(width)
    lean = 0.25 * rng.random((count, 1))
    return unit(rng.standard_normal((count, width)) + lean * common)


def rank_one(rng, count):
    """Ten modules of rank one carry all the change."""
    return products(rng, count, modules=10, rank=1)


def few_grams(rng, count):
    """What is above the diagonals of ΔWΔWᵀ, as in sketches: ten modules, rank one and eight."""
    rows = grams(rng, count, modules=10, side=16, rank=1)
    rows[::2] = grams(rng, len(rows[::2]), modules=10, side=16, rank=8)
    square = rows.reshape(count, 10, 16, 16)
    return unit(square[..., *np.triu_indices(16, 1)].reshape(count, -1))


FLEETS = {
    "deltas": deltas,
    "products": products,
    "grams": grams,
    "mixed ranks": mixed_ranks,
    "leaning": leaning,
    "rank one": rank_one,
    "few grams": few_grams,
}


@pytest.mark.parametrize("count", [8, 18, 60])
@pytest.mark.parametrize("kind", FLEETS)
def test_unrelated_fleets_hardly_ever_show_a_group(kind, count):
    """Where nothing is related any discovery is false: q is how often there may be one.

    60 fleets, 15 of the large: 0.05 of them and three standard errors.
    """
    fleets = 15 if count == 60 else 60
    rng = np.random.default_rng(count)
    false = sum(discover(FLEETS[kind](rng, count), ON).significant > 0 for _ in range(fleets))
    assert false <= fleets * 0.05 + 3 * np.sqrt(fleets * 0.05 * 0.95)


DELTAS, GRAMS = (products, rank_one), (few_grams, grams)


@pytest.mark.parametrize(("partitions", "count"), [(1, 8), (1, 18), (5, 8), (3, 18)])
def test_the_rate_is_of_the_whole_report(partitions, count):
    """Of unrelated fleets, in partitions and by both kinds, at most one in twenty shows any.

    Few modules carry the change in every other one. The seed is fixed: this is the achieved rate.
    """
    rng = np.random.default_rng(100 * partitions + count)
    fleets = 160 if partitions == 1 else 60
    false = 0
    for fleet in range(fleets):
        kinds = DELTAS[fleet % 2], GRAMS[fleet // 2 % 2]
        samples = (Sample(kind(rng, count)) for _ in range(partitions) for kind in kinds)
        false += any(one.significant for one in related.discover(samples, ON))
    assert false <= 0.05 * fleets


def test_partitions_and_kinds_are_one_report():
    """A pair that stands out alone does not do so beside many partitions that show nothing."""
    rng = np.random.default_rng(17)
    names = names_of(20)
    rows, _ = planted(rng, deltas(rng, 20), 1, 2, 0.3, 0.3)
    strong, _ = planted(rng, deltas(rng, 20), 2, 4, 0.5, 0.6)
    weak, quiet = Part("delta", names, rows), Part("outputs", names, deltas(rng, 20))
    few = Part("delta", names[:5], rows[:5])
    assert len(related.related([weak], {}, ON)[0]) == 1
    found, notes = related.related([weak, *[quiet] * 400, few], {}, ON)
    assert found == () and notes[:-1] == ("",) * 401 and "5 tenants are too few" in notes[-1]
    # Where much is true, more may be false: other partitions' discoveries let it in again.
    found, _ = related.related([weak, quiet, Part("outputs", names, strong)], {}, ON)
    assert [(item.by, len(item.members)) for item in found] == [
        ("delta", 2),
        ("outputs", 4),
        ("outputs", 4),
    ]


def planted(rng, rows, families, size, low, high):
    """Rows with families whose members have a cosine between low and high; (rows, labels)."""
    labels = np.full(len(rows), -1)
    rows = rows.copy()
    for family in range(families):
        cosine = rng.uniform(low, high)
        own = unit(rng.standard_normal((1, rows.shape[1])))
        place = slice(family * size, (family + 1) * size)
        rows[place] = np.sqrt(1 - cosine) * rows[place] + np.sqrt(cosine) * own
        labels[place] = family
    return unit(rows), labels


def counted(found, labels):
    """(true, false) pairs of the groups that were found."""
    pairs = [p for group in found.groups for p in combinations(group.members, 2)]
    true = sum(labels[i] == labels[j] >= 0 for i, j in pairs)
    return true, len(pairs) - true


@pytest.mark.parametrize(
    ("count", "families", "size"), [(18, 6, 3), (24, 6, 4), (24, 3, 2), (60, 6, 3)]
)
def test_planted_deltas_are_found(count, families, size):
    """Cosines of 0.09 to 0.30 among others of at most about 0.05: what real domains show."""
    rng = np.random.default_rng(count + size)
    true = false = 0
    for _ in range(15):
        rows = deltas(rng, count, WIDTH)
        rows, labels = planted(rng, rows, families, size, 0.09, 0.30)
        hits, wrong = counted(discover(rows, ON), labels)
        true, false = true + hits, false + wrong
    assert true >= 0.95 * 15 * families * size * (size - 1) / 2
    assert false <= 0.05 * (true + false)


def test_planted_outputs_are_found():
    """Cosines of 0.19 to 0.41 of positive, skewed outputs."""
    rng = np.random.default_rng(4)
    true = false = 0
    for _ in range(10):
        rows, labels = planted(rng, grams(rng, 18, side=24), 6, 3, 0.19, 0.41)
        hits, wrong = counted(discover(rows, ON), labels)
        true, false = true + hits, false + wrong
    assert true >= 0.95 * 10 * 18
    assert false <= 0.05 * (true + false)


def test_false_share_stays_below_q_beside_many_true():
    """Among planted pairs too weak to be found all, the share of false ones is q at most."""
    rng = np.random.default_rng(6)
    shares = []
    for _ in range(40):
        rows, labels = planted(rng, deltas(rng, 40, 512), 8, 3, 0.10, 0.25)
        found = discover(rows, ON, q=0.1)
        true, false = counted(found, labels)
        shares.append(false / max(true + false, 1))
    assert np.mean(shares) <= 0.1


def test_figures_of_a_group():
    rng = np.random.default_rng(0)
    rows, _ = planted(rng, deltas(rng, 30), 2, 4, 0.4, 0.6)
    found = discover(rows, ON)
    assert [group.members for group in found.groups] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    for group in found.groups:
        inside = (rows[list(group.members)] @ rows[list(group.members)].T)[np.triu_indices(4, 1)]
        assert group.cosines == pytest.approx((inside.min(), inside.max()), rel=1e-5)
    assert found.tested == 30 * 29 // 2 and found.significant >= 12 and found.note == ""


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_small_fleets_say_so(count):
    found = discover(np.ones((count, 3), np.float32), ON)
    assert not found.groups and not found.tested and f"{count} tenants are too few" in found.note


def test_no_spread_says_so():
    found = discover(np.tile(unit(np.ones((1, 5))), (12, 1)), ON)
    assert not found.groups and not found.tested and "too few" in found.note


def test_step_up_is_benjamini_hochberg():
    rng = np.random.default_rng(1)
    p = np.concatenate([rng.random(80), 1e-3 * rng.random(20)])
    ordered = np.sort(p)
    largest = max(k for k in range(101) if k == 0 or ordered[k - 1] <= 0.1 * k / 100)
    assert largest > 10 and step_up(p, 100, 0.1) == ordered[largest - 1]
    assert step_up(np.array([0.9, 0.8, 0.7]), 3, 0.1) < 0 > step_up(np.zeros(0), 0, 0.1)


def graph(*edges):
    """cliques of (i, j, p)."""
    first, second, p = (np.array(part) for part in zip(*edges, strict=True))
    return sorted(cliques(first, second, p))


def test_groups_do_not_chain():
    """a–b and b–c without a–c: the stronger pair is a group, c stays out."""
    assert graph((0, 1, 1e-9), (1, 2, 1e-6)) == [[0, 1]]
    assert graph((0, 1, 1e-6), (1, 2, 1e-9)) == [[1, 2]]
    assert graph((0, 1, 1e-9), (1, 2, 1e-6), (0, 2, 1e-5)) == [[0, 1, 2]]
    ring = [(i, (i + 1) % 6, 1e-5 * (i + 1)) for i in range(6)]
    assert all(len(group) == 2 for group in graph(*((min(e[:2]), max(e[:2]), e[2]) for e in ring)))


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_maximal_cliques_by_brute_force(seed):
    rng = np.random.default_rng(seed)
    edges = [
        (i, j, float(rng.random())) for i, j in combinations(range(9), 2) if rng.random() < 0.6
    ]
    linked = {(i, j) for i, j, _ in edges}
    found = graph(*edges)
    members = [node for group in found for node in group]
    assert len(members) == len(set(members))
    for group in found:
        assert all(pair in linked for pair in combinations(group, 2))
    nodes = {node for pair in linked for node in pair}
    whole = [*found, *([node] for node in nodes - set(members))]
    for one, other in combinations(whole, 2):  # no two could still join
        assert any(tuple(sorted((i, j))) not in linked for i in one for j in other)


def test_blocks_and_threads_change_nothing(monkeypatch):
    rng = np.random.default_rng(8)
    rows, _ = planted(rng, deltas(rng, 100), 5, 3, 0.3, 0.5)
    starts = unit(rng.standard_normal((100, 8)))
    whole = discover(rows, ON, starts=starts)
    assert len(whole.groups) == 5
    monkeypatch.setattr(related, "_BLOCK", 16)
    assert discover(rows, Compute(threads=2, memory=1), starts=starts) == whole


def test_large_fleets_look_at_a_sample(monkeypatch):
    monkeypatch.setattr(background, "SAMPLE", 128)
    monkeypatch.setattr(related, "_BLOCK", 200)
    monkeypatch.setattr(related, "_KEPT", 2000)
    rng = np.random.default_rng(9)
    rows, labels = planted(rng, deltas(rng, 900, 512), 20, 3, 0.4, 0.6)
    found = discover(rows, ON)
    true, false = counted(found, labels)
    assert true == 60 and false <= 3 and found.tested == 900 * 899 // 2
    assert discover(rows, ON) == found
    first, other = background.sampled(900, 0), background.sampled(900, 1)
    assert len(set(first)) == 128 and first.tolist() != other.tolist()


def test_shared_starts_are_judged_among_themselves():
    """Tenants of one start resemble each other; that alone is no relation."""
    rng = np.random.default_rng(10)
    rows = deltas(rng, 60)
    common = unit(rng.standard_normal((1, 1024)))
    rows[:25] = unit(rows[:25] + 0.6 * common + 0.0 * rows[:25])
    starts = unit(rng.standard_normal((60, 256)))
    starts[:25] = starts[0]
    assert not discover(rows, ON, starts=starts).groups
    family = unit(rng.standard_normal((1, 1024)))
    rows[:3] = unit(rows[:3] + 1.0 * family)
    found = discover(rows, ON, starts=starts)
    assert [group.members for group in found.groups] == [(0, 1, 2)]
    assert found.tested == 60 * 59 // 2


def test_too_few_shared_starts_are_not_tested():
    rng = np.random.default_rng(11)
    rows = deltas(rng, 30)
    starts = unit(rng.standard_normal((30, 256)))
    starts[1], rows[1] = starts[0], unit(rows[:1] + 0.2 * rows[1:2])[0]
    found = discover(rows, ON, starts=starts)
    assert not found.groups and found.tested == 30 * 29 // 2 - 1
    assert "the 1 pairs of tenants that share their start" in found.note
    assert discover(rows, ON).groups[0].members == (0, 1)


def test_negated_copies_are_not_related():
    rng = np.random.default_rng(12)
    rows, _ = planted(rng, deltas(rng, 30), 1, 3, 0.4, 0.5)
    rows[10] = -rows[11]
    assert [group.members for group in discover(rows, ON).groups] == [(0, 1, 2)]


def test_tail_covers_sums_of_products_and_of_squares():
    """p of a large value is not smaller than how often it is seen, and not a hundred times it."""
    rng = np.random.default_rng(13)
    normal = rng.standard_normal((400_000, 16))
    cases = {
        "products": (normal[:, :8] * normal[:, 8:]).sum(1),
        "squares": (normal**2).sum(1),
        "normal": normal[:, 0],
    }
    for name, values in cases.items():
        found = background.background(values[:200_000])
        for share in (1e-2, 1e-3, 1e-4):
            at = np.quantile(values[200_000:], 1 - share)
            p = float(background.p_values(found, np.array([at]))[0])
            assert 0.5 * share <= p <= 20 * share, (name, share, p)
        assert background.p_values(found, np.array([found.cut(1e-3)]))[0] == pytest.approx(1e-3)


def names_of(count):
    return [f"t{n:02d}" for n in range(count)]


def test_tenants_of_one_adapter_count_once():
    """Forty copies of one tenant would be a background of their own."""
    rng = np.random.default_rng(14)
    rows, _ = planted(rng, deltas(rng, 20), 2, 3, 0.3, 0.5)
    rows = np.concatenate([rows, np.repeat(rows[:1], 40, axis=0)])
    names = names_of(60)
    served = dict.fromkeys((names[0], *names[20:]), "rep-a") | {names[1]: "own-1"}
    found, notes = related.related([Part("delta", names, 3.0 * rows)], served, ON)
    assert notes == ("",) and [len(item.members) for item in found] == [43, 3]
    assert found[0].members == tuple(sorted([*names[:3], *names[20:]]))
    assert found[0].grouped == 41 and found[1].grouped == 0
    assert found[0].by == "delta" and 0.2 < found[0].cosines[0] <= found[0].cosines[1] < 0.6
    assert 0.2 < found[1].cosines[0] <= found[1].cosines[1] < 0.6


def test_order_of_tenants_changes_nothing():
    rng = np.random.default_rng(15)
    rows, _ = planted(rng, deltas(rng, 30), 4, 3, 0.3, 0.5)
    names = names_of(30)
    found, _ = related.related([Part("outputs", names, rows)], {}, ON)
    order = rng.permutation(30)
    part = Part("outputs", [names[i] for i in order], rows[order])
    again, _ = related.related([part], {}, ON)
    assert [item.members for item in found] == [item.members for item in again]
    assert len(found) == 4 and all(item.by == "outputs" for item in found)


def test_what_one_adapter_serves_is_no_news():
    rng = np.random.default_rng(16)
    rows, _ = planted(rng, deltas(rng, 30), 1, 3, 0.5, 0.6)
    names = names_of(30)
    served = dict.fromkeys(names[:3], "rep")
    assert not related.related([Part("delta", names, rows)], served, ON)[0]


def test_of_more_pairs_than_are_held_the_most_significant_are_taken(monkeypatch):
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(120, 800))
    vectors[:20] += 1.2 * rng.normal(size=800)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    sample = Sample(vectors.astype(np.float32))
    [every] = related.discover([sample], Compute())
    assert every.groups[0].members == tuple(range(20)) and not every.note
    monkeypatch.setattr(related, "_MOST", 60)
    monkeypatch.setattr(related, "_BLOCK", 16)
    [some] = related.discover([sample], Compute())
    assert 0 < some.significant <= 60 and some.tested == every.tested
    assert all(set(group.members) <= set(range(20)) for group in some.groups)
    assert "more than 60 pairs" in some.note
