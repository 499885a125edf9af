"""cluster: a plan's figures against dense float64, its bounds, consent, what stays and why."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import adapterops as ao
from adapterops.activations import write_activations
from adapterops.errors import (
    BudgetError,
    ChangedError,
    FileError,
    FormatError,
    UsageError,
)
from adapterops.fleet.consent.policy import Consent, read_policy
from adapterops.fleet.plans.plan import Plan, Representative
from adapterops.fleet.plans.planfile import read_plan, read_sketches
from adapterops.fleet.representing import averaging
from tests.planted import Fleet, adjusted_rand, plant
from tests.planted_files import read, write
from tests.policies import CONSENTS, NAMES
from tests.support import load_file, pairs, read_kohya, write_kohya, write_peft
from tests.test_mlx import loaded as read_mlx
from tests.test_mlx import make as write_mlx

Deltas = dict[str, np.ndarray]
NEAR = 1e-3  # what counts as a duplicate
SHAPES = {"model.layers.0.self_attn.q_proj": (24, 16), "model.layers.1.mlp.up_proj": (12, 16)}


def dense(folder: Path) -> Deltas:
    return {stem: B @ A for stem, (B, A) in read(folder).items()}


def flat(deltas: Deltas, stems: list[str]) -> np.ndarray:
    parts = [deltas[stem].ravel() for stem in stems if stem in deltas]
    sizes = {stem: deltas[stem].size for stem in deltas}
    assert sum(sizes.values()) == sum(map(len, parts))
    return np.concatenate(parts) if parts else np.zeros(0)


def figures(C: Deltas, D: Deltas) -> dict[str, Any]:
    """error, missing, foreign, cosine and the worst module of serving D by C, by their meaning."""
    zero = {stem: np.zeros_like(value) for stem, value in (C | D).items()}
    stems = sorted(zero)
    c, d = flat(zero | C, stems), flat(zero | D, stems)
    gain = c @ d / (d @ d)
    off = {s: np.linalg.norm((zero | C)[s] - D[s]) / np.linalg.norm(D[s]) for s in D if D[s].any()}
    return {
        "error": np.linalg.norm(c - d) / np.linalg.norm(d),
        "missing": abs(1 - gain),
        "foreign": np.linalg.norm(c - gain * d) / np.linalg.norm(d),
        "cosine": c @ d / np.linalg.norm(c) / np.linalg.norm(d),
        "worst": max(off.values()),
        "modules": off,
    }


def place(plan_folder: Path, rep: Representative) -> Path:
    return Path(rep.location) if rep.location else plan_folder / rep.path


def check(plan_folder: Path, where: dict[str, Path], open_one: Any = dense) -> Plan:
    """Every tenant's figures against what the files say; nobody above the bound; routes, holds."""
    plan = read_plan(plan_folder)
    for name, item in plan.served.items():
        rep = plan.representatives[item.by]
        assert name in rep.members
        route = plan.routes[name]
        if rep.kind == "base":
            assert route is None and not any(v.any() for v in open_one(where[name]).values())
            continue
        served = place(plan_folder, rep)
        assert rep.holds and rep.members == tuple(sorted(rep.members))
        assert route == rep.path and (rep.location or not os.path.isabs(route))
        if rep.kind == "original":
            assert rep.members == rep.holds == (name,)
        if rep.kind in ("original", "medoid"):
            assert served == where[rep.holds[0]]
        if name == rep.holds[0] and rep.location:
            assert (item.error, item.missing, item.foreign, item.cosine) == (0, 0, 0, 1)
            continue
        found = figures(open_one(served), open_one(where[name]))
        for key in ("error", "missing", "foreign", "cosine"):
            assert getattr(item, key) == pytest.approx(found[key], rel=1e-6, abs=3e-12), (name, key)
        assert item.error**2 == pytest.approx(item.missing**2 + item.foreign**2, abs=1e-14)
        assert item.worst[1] == pytest.approx(found["worst"], rel=1e-6, abs=3e-12)
        if item.error > 1e-9:
            stem, value = item.worst
            assert found["modules"][stem] == pytest.approx(value, rel=1e-6)
        assert item.measured is None and item.error <= plan.max_error
    assert {x for rep in plan.representatives.values() for x in rep.members} == plan.served.keys()
    return plan


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def paths(fleet: Fleet) -> dict[str, Path]:
    return {name: fleet.root / name for name in fleet.tenants}


def made(folder: Path, members: dict[str, Any], **options: Any) -> tuple[Path, dict[str, Path]]:
    """Adapters of PEFT tenants and their index: name -> factors, or (factors, config)."""
    where = {}
    for name, given_ in members.items():
        factors, config = given_ if isinstance(given_, tuple) else (given_, {})
        where[name] = write_peft(folder / "a" / name, factors, **config)
    ao.index(folder / "a", out=folder / "fleet", **options)
    return folder / "fleet", where


def near(seed: int, noise: float, *, of: int = 0, rank: int = 2, size: float = 1.0) -> Any:
    """The adapter number `of` with relative noise on B."""
    rng = np.random.default_rng([seed, of])
    return {
        name: ((size * (B + 0.1 * noise * rng.standard_normal(B.shape))).astype(np.float32), A)
        for name, (B, A) in pairs(of, SHAPES, rank).items()
    }


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Fleet]:
    """Clusters at 0.02, 0.05, 0.1, 0.2, 0.35 and 0.5, their index `fleet` and policy `p.csv`."""
    root = tmp_path_factory.mktemp("planted")
    fleet = plant(root / "a", 6)
    fleet.write_policy(root / "p.csv")
    ao.index(root / "a", out=root / "fleet")
    policy = root / "p.csv"
    ao.cluster(root / "fleet", out=root / "all", allow_sharing="all", policy=policy)
    ao.cluster(root / "fleet", out=root / "none", policy=policy)
    rows = [f"{n},{'true' if n in fleet.private else ''},{n[:6]}" for n in fleet.tenants]
    (root / "g.csv").write_text("tenant,private,share_group\n" + "\n".join(rows))
    ao.cluster(root / "fleet", out=root / "group", allow_sharing="group", policy=root / "g.csv")
    return root, fleet


@pytest.mark.parametrize("sharing", ["none", "group", "all"])
def test_every_figure_is_that_of_the_files(planted, sharing):
    root, fleet = planted
    plan = check(root / sharing, paths(fleet))
    assert plan.served.keys() == fleet.tenants.keys()
    averages = [r for r in plan.representatives.values() if r.kind in ("mean", "minimax")]
    largest = max(item.error for item in plan.served.values())
    if sharing == "none":
        assert not averages and largest <= NEAR and not (root / "none/representatives").exists()
    else:
        assert len(averages) >= 3 and 0.1 < largest <= 0.2
    for name in fleet.of("no-op"):
        assert plan.routes[name.name] is None
    for name in fleet.of("flipped", "decoy"):
        assert plan.served[name.name].error == 0


def test_planted_clusters_are_found(planted):
    """Where a cluster's ε is at most half the bound: adjusted Rand index 1."""
    root, fleet = planted
    names = [name for name in fleet.within(0.1) if name not in fleet.private]
    for sharing in ("all", "group"):
        plan = read_plan(root / sharing)
        found = [plan.served[name].by for name in names]
        assert adjusted_rand(fleet.labels(names), found) == 1.0
    plan = read_plan(root / "none")
    assert adjusted_rand(fleet.labels(names), [plan.served[n].by for n in names]) < 0.5


def test_without_consent_copies_share_and_nothing_else(planted):
    root, fleet = planted
    plan = read_plan(root / "none")
    for item in fleet.tenants.values():
        if item.drift < 0.99 * NEAR and item.kind != "no-op":
            same = plan.served[item.name].by == plan.served[item.copy_of].by
            assert same != (item.copy_of in fleet.private), item.name
    for rep in plan.representatives.values():
        assert len({fleet.tenants[name].cluster for name in rep.members}) == 1 or rep.id == "base"


def test_private_tenants_are_alone_and_in_nobodys_weights(planted, tmp_path):
    """Other adapters in their place change no byte of what is written, and nobody's route."""
    root, fleet = planted
    assert len(fleet.private) == 6
    for sharing in ("none", "group", "all"):
        plan = read_plan(root / sharing)
        for name in fleet.private:
            rep = plan.representatives[plan.served[name].by]
            assert rep.members == rep.holds == (name,) and rep.kind == "original"
            assert Path(rep.location) == fleet.root / name
            assert [r.id for r in plan.representatives.values() if name in r.holds] == [rep.id]
        assert not {name for part in plan.related for name in part.members} & fleet.private
    shutil.copytree(fleet.root, tmp_path / "a")
    for seed, name in enumerate(sorted(fleet.private)):
        write(tmp_path / "a" / name, pairs(seed, SHAPES, 2), 4.0, "F32")
    ao.index(tmp_path / "a", out=tmp_path / "fleet")
    ao.cluster(tmp_path / "fleet", out=tmp_path / "all", allow_sharing="all", policy=root / "p.csv")
    assert contents(tmp_path / "all/representatives") == contents(root / "all/representatives")
    before, after = (read_plan(folder / "all").served for folder in (root, tmp_path))
    for name in before.keys() - fleet.private:
        assert after[name] == before[name]


def test_representatives_name_nobody(planted):
    """No tenant's name, no path, in any file that is deployed."""
    root, fleet = planted
    files = contents(root / "all/representatives")
    assert any(name.endswith("README.md") for name in files)
    short = {part for name in fleet.tenants for part in name.split("/")} - {
        "bytes",
        "fp16",
        "split",
    }
    for said in (*sorted(short - {"fp32", "bf16", "absent", "rslora"}), str(root), "planted-"):
        for name, data in files.items():
            if name.endswith(".safetensors"):
                data = data[8 : 8 + int.from_bytes(data[:8], "little")]
            assert said.encode() not in data, (said, name)


def test_two_runs_are_the_same_to_the_byte_with_any_jobs(planted, tmp_path):
    root, _fleet = planted
    for jobs in (1, 2, 5):
        ao.cluster(
            root / "fleet",
            out=tmp_path / "all",
            allow_sharing="all",
            policy=root / "p.csv",
            jobs=jobs,
            overwrite=jobs > 1,
            memory="64MiB" if jobs == 2 else None,
        )
        found, expected = contents(tmp_path / "all"), contents(root / "all")
        assert found.keys() == expected.keys()
        for name in found.keys() - {"adapterops.json"}:  # which names the output
            assert found[name] == expected[name], name


def test_a_plan_reads_back_as_it_was(planted):
    root, fleet = planted
    plan = read_plan(root / "all")
    document = json.loads((root / "all/plan.json").read_text())
    assert document["schema"] == "adapterops.plan/1"
    assert document["routes"] == plan.routes
    assert plan == read_plan(root / "all/plan.json")
    assert plan.options["allow_sharing"] == "all" and plan.fleet == str(root / "fleet")
    ids = {id for part in read_sketches(root / "all") for id in part.ids}
    private = {plan.served[name].by for name in fleet.private}
    assert ids == plan.representatives.keys() - private - {"base"}
    listed = json.loads((root / "all/adapterops.json").read_text())["files"]
    assert set(listed) == contents(root / "all").keys() - {"adapterops.json"}
    for rep in plan.representatives.values():
        if not rep.location and rep.kind != "base":
            weights = root / "all" / rep.path / "adapter_model.safetensors"
            assert rep.size == weights.stat().st_size
            assert {A.shape[0] for _, A in read(root / "all" / rep.path).values()} == {rep.rank}


def test_sketches_are_of_the_files_that_serve(planted):
    """A representative's norm is that of its file, and its sketch is nearest its own members'."""
    root, _fleet = planted
    plan = read_plan(root / "all")
    for part in read_sketches(root / "all"):
        for id, norm in zip(part.ids, part.norms, strict=True):
            where = place(root / "all", plan.representatives[id])
            real = math.sqrt(sum(float((v**2).sum()) for v in dense(where).values()))
            assert norm == pytest.approx(real, rel=1e-5)
        np.testing.assert_allclose(np.linalg.norm(part.sketches, axis=1), 1, atol=0.5)


def damaged(document: dict[str, Any], how: str) -> Any:
    served = document["served"]
    name = next(iter(served))
    if how == "routes":
        document["routes"][name] = "elsewhere"
    elif how == "no representative":
        served[name]["by"] = "nobody"
    elif how == "error is text":
        served[name]["error"] = "small"
    elif how == "no served":
        del document["served"]
    elif how == "a later version":
        document["schema"] = "adapterops.plan/2"
    elif how == "another document":
        document["schema"] = "adapterops.merge/1"
    elif how == "a list":
        return [document]
    return document


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("routes", FormatError),
        ("no representative", FormatError),
        ("error is text", FormatError),
        ("no served", FormatError),
        ("a later version", UsageError),
        ("another document", FormatError),
        ("a list", FormatError),
    ],
)
def test_a_damaged_plan_is_refused(planted, tmp_path, how, error):
    root, _ = planted
    document = damaged(json.loads((root / "none/plan.json").read_text()), how)
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(error, match="plan"):
        read_plan(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b'{"schema": 3}', b"null"])
def test_what_is_no_plan_is_refused(tmp_path, text):
    (tmp_path / "plan.json").write_bytes(text)
    with pytest.raises(FormatError, match=r"no (plan|JSON)"):
        read_plan(tmp_path)
    with pytest.raises(FileError):
        read_plan(tmp_path / "nowhere")


# Consent.


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """Seven tenants within 0.2 of each other; t1 is t0's bytes, t3 t2 in another gauge."""
    folder = tmp_path_factory.mktemp("seven")
    members = {name: near(seed, 0.08) for seed, name in enumerate(NAMES)}
    members["t1"] = members["t0"]
    members["t3"] = {n: (2 * B, A / 2) for n, (B, A) in members["t2"].items()}
    return made(folder, members)


@settings(max_examples=25)
@given(consent=CONSENTS)
def test_no_plan_breaks_a_policy(seven, tmp_path_factory, consent: Consent):
    fleet, where = seven
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "p.json").write_text(json.dumps(consent.policy.to_dict()))
    try:
        ao.cluster(
            fleet,
            out=folder / "plan",
            policy=folder / "p.json",
            allow_sharing=consent.allow_sharing,
            max_error=0.4,
        )
    except FormatError:  # lists that name what the tenant's own share group forbids
        return
    plan = check(folder / "plan", where)
    rule = read_policy(folder / "p.json").rule  # where a blank is the default
    for rep in plan.representatives.values():
        for server in rep.holds:
            for name in set(rep.members) - {server}:
                one, other = rule(name), rule(server)
                assert not one.private and not other.private and other.may_represent
                assert one.share_group == other.share_group
                listed = one.may_be_served_by
                if listed is not None:
                    assert server in listed or f"group:{other.share_group}" in listed
    for name, item in plan.served.items():
        free = consent.allow_sharing == "all"
        free |= consent.allow_sharing == "group" and rule(name).share_group != ""
        assert item.error <= (0 if rule(name).private else 0.4 if free else NEAR)


def test_byte_duplicates_that_a_list_tells_apart(tmp_path):
    """c may be served by a, not by b, whose bytes are a's: no representative holds both."""
    a = near(1, 0.2)
    fleet, where = made(tmp_path, {"a": a, "b": a, "c": near(2, 0.2), "d": near(3, 0.2)})
    (tmp_path / "p.csv").write_text("tenant,may_be_served_by\nc,a;d\n")
    ao.cluster(
        fleet,
        out=tmp_path / "plan",
        policy=tmp_path / "p.csv",
        allow_sharing="all",
        max_error=0.5,
    )
    plan = check(tmp_path / "plan", where)
    rep = plan.representatives[plan.served["c"].by]
    assert "b" not in rep.holds
    assert plan.served["a"].by == plan.served["b"].by


def test_a_tenant_who_may_not_represent_is_in_no_average(tmp_path):
    members = {f"t{n}": near(n, 0.2) for n in range(4)}
    (tmp_path / "p.csv").write_text("tenant,may_represent\nt0,false\n")
    written = []
    for change in (False, True):
        folder = tmp_path / str(change)
        if change:
            members["t0"] = near(9, 0.2)
        fleet, where = made(folder, members)
        ao.cluster(
            fleet, out=folder / "plan", policy=tmp_path / "p.csv", allow_sharing="all",
            max_error=0.6, representative="mean",
        )  # fmt: skip
        plan = check(folder / "plan", where)
        rep = plan.representatives[plan.served["t0"].by]
        assert rep.members == ("t0", "t1", "t2", "t3") and rep.kind == "mean"
        assert rep.holds == ("t1", "t2", "t3")
        written.append(contents(folder / "plan/representatives"))
    assert written[0] == written[1]


# Kinds of representatives, ranks, types.


@pytest.mark.parametrize("kind", ["best", "medoid", "mean", "minimax"])
@pytest.mark.parametrize("traffic", [1.0, 50.0])
def test_representatives_of_each_kind(tmp_path, kind, traffic):
    members = {f"t{n}": near(n, 0.25) for n in range(4)}
    for name, factors in members.items():
        write_peft(tmp_path / "a" / name, factors)
    lines = [f"t{n},a/t{n},{traffic if n == 2 else 1}" for n in range(4)]
    (tmp_path / "m.csv").write_text("tenant,path,traffic\n" + "\n".join(lines))
    ao.index(manifest=tmp_path / "m.csv", out=tmp_path / "fleet")
    report = ao.cluster(
        tmp_path / "fleet",
        out=tmp_path / "plan",
        allow_sharing="all",
        max_error=0.9,
        representative=kind,
    )
    plan = check(tmp_path / "plan", {f"t{n}": tmp_path / "a" / f"t{n}" for n in range(4)})
    [rep] = plan.representatives.values()
    assert report.adapters == 1 and report.groups[0].members == tuple(sorted(members))
    assert rep.kind == kind or (kind == "best" and rep.kind == "minimax")
    assert {item.traffic for item in plan.served.values()} == {1.0, traffic}
    if kind == "mean":
        if traffic > 1:
            heavy = plan.served["t2"].error
            assert heavy < 0.5 * min(plan.served[f"t{n}"].error for n in (0, 1, 3))
        weights = {n: 1.0 if n != 2 else traffic for n in range(4)}
        deltas = {n: dense(tmp_path / "a" / f"t{n}") for n in range(4)}
        shares = {n: w / sum((v**2).sum() for v in deltas[n].values()) for n, w in weights.items()}
        for stem in SHAPES:
            mean = sum(shares[n] * deltas[n][stem] for n in shares) / sum(shares.values())
            U, S, Vt = np.linalg.svd(mean)
            best = (U[:, :2] * S[:2]) @ Vt[:2]
            got = dense(tmp_path / "plan" / rep.path)[stem]
            np.testing.assert_allclose(got, best, rtol=0, atol=1e-5 * S[0])
    if kind == "medoid":
        assert not (tmp_path / "plan/representatives").exists()
    if rep.bound is not None:
        assert rep.bound <= max(item.error for item in plan.served.values()) * (1 + 1e-9)


@pytest.mark.parametrize("rank", [1, 3, "same"])
@pytest.mark.parametrize("dtype", ["keep", "float16", "bfloat16"])
def test_ranks_and_types_of_what_is_written(tmp_path, rank, dtype):
    fleet, where = made(tmp_path, {f"t{n}": near(n, 0.25, rank=2) for n in range(3)})
    ao.cluster(
        fleet, out=tmp_path / "plan", allow_sharing="all", max_error=0.95, rank=rank, dtype=dtype,
        representative="mean",
    )  # fmt: skip
    plan = check(tmp_path / "plan", where)
    [rep] = plan.representatives.values()
    assert rep.rank == (2 if rank == "same" else rank)
    assert rep.dtype in ({"keep": "float32"}.get(dtype, dtype), {"keep": "F32"}.get(dtype))
    tensors = load_file(tmp_path / "plan" / rep.path / "adapter_model.safetensors")
    assert {min(value.shape) for value in tensors.values()} == {rep.rank}


def test_an_average_above_the_bound_gives_way_to_an_original(tmp_path):
    """At rank 1 the mean loses half of each: who may be off by 0.4 is served by the medoid."""
    fleet, where = made(tmp_path, {f"t{n}": near(n, 0.2) for n in range(3)})
    ao.cluster(
        fleet, out=tmp_path / "plan", allow_sharing="all", max_error=0.4, rank=1,
        representative="mean",
    )  # fmt: skip
    plan = check(tmp_path / "plan", where)
    [rep] = plan.representatives.values()
    assert rep.kind == "medoid" and len(rep.members) == 3 and "above its bound" in rep.reason
    assert not list((tmp_path / "plan").glob("representatives/*"))


def test_the_bound_holds_in_terms_of_inputs(tmp_path):
    """Inputs that hide what differs: ‖(C − D)Σ^½‖/‖DΣ^½‖ is what the bound is about."""
    rng = np.random.default_rng(5)
    roots = {}
    for stem, (_, n) in SHAPES.items():
        scale = np.diag(10.0 ** -np.arange(n).clip(0, 3))
        roots[stem] = (scale @ np.linalg.qr(rng.standard_normal((n, n)))[0]).T
    grams = {stem: (root @ root.T).astype(np.float32) for stem, root in roots.items()}
    write_activations(
        tmp_path / "x", {s: ("gram", g) for s, g in grams.items()}, tokens=9, model="tiny/base"
    )
    fleet, where = made(tmp_path, {f"t{n}": near(n, 0.15, of=n // 3) for n in range(6)})
    for sharing, limit in (("all", 0.25), ("none", NEAR)):
        out = tmp_path / sharing
        ao.cluster(
            fleet, out=out, allow_sharing=sharing, max_error=0.25, metric="activation",
            activations=tmp_path / "x",
        )  # fmt: skip
        plan = read_plan(out)
        for name, item in plan.served.items():
            C, D = dense(place(out, plan.representatives[item.by])), dense(where[name])
            off, own = (
                math.sqrt(sum(np.trace(v[s] @ grams[s].astype(float) @ v[s].T) for s in v))
                for v in ({s: C[s] - D[s] for s in D}, D)
            )
            assert item.measured == pytest.approx(off / own, rel=1e-5, abs=1e-12)
            assert item.measured <= limit
            assert item.error == pytest.approx(figures(C, D)["error"], rel=1e-6, abs=1e-12)
        assert len(plan.representatives) == (2 if sharing == "all" else 6)
    assert plan.metric == "activation"


@pytest.mark.parametrize("budget", [False, True], ids=["bound", "number"])
@pytest.mark.parametrize("kind", ["gram", "samples"])
def test_who_is_near_to_inputs_alone_is_found(tmp_path, kind, budget):
    """Two families whose members differ by more than their norm where no input points."""
    rng = np.random.default_rng(8)
    X = rng.standard_normal((40, 16)) * (np.arange(16) < 9)
    members = {}
    for n in range(8):
        blind = rng.standard_normal((2, 16)) * (np.arange(16) >= 9)
        members[f"t{n}"] = {
            stem: (B, (A + blind).astype(np.float32))
            for stem, (B, A) in near(n, 0.02, of=n % 2).items()
        }
    fleet, where = made(tmp_path, members)
    value = X if kind == "samples" else X.T @ X / len(X)
    inputs = dict.fromkeys(SHAPES, (kind, value.astype(np.float32)))
    write_activations(tmp_path / "x", inputs, tokens=40, model="tiny/base")
    assert ao.cluster(fleet, out=tmp_path / "weights", allow_sharing="all").adapters == 8
    report = ao.cluster(
        fleet, out=tmp_path / "plan", allow_sharing="all", metric="activation",
        activations=tmp_path / "x", representative="medoid",
        **({"max_adapters": 2} if budget else {"max_error": 0.2}),
    )  # fmt: skip
    assert report.adapters == 2 and (budget or report.gain["adapters"] == 2)
    plan = read_plan(tmp_path / "plan")
    for name, item in plan.served.items():
        rep = plan.representatives[item.by]
        assert {int(other[1:]) % 2 for other in rep.members} == {int(name[1:]) % 2}
        C, D = dense(place(tmp_path / "plan", rep)), dense(where[name])
        assert item.error == 0 or item.error > 0.3
        off, own = (
            math.hypot(*(float(np.linalg.norm(v[s] @ X.T)) for s in v))
            for v in ({s: C[s] - D[s] for s in D}, D)
        )
        assert item.measured == pytest.approx(off / own, rel=1e-4, abs=1e-9)
        assert item.measured <= 0.2
    again = ao.cluster(
        fleet, out=tmp_path / "plan2", allow_sharing="all", metric="activation",
        activations=tmp_path / "x", representative="medoid", previous=tmp_path / "plan",
    )  # fmt: skip
    assert again.adapters == 2 and again.changes["churn"] == 0


def test_who_inputs_say_nothing_of_is_alone_and_named(tmp_path):
    fleet, _ = made(tmp_path, {f"t{n}": near(n, 0.02) for n in range(3)})
    inputs = {"model.layers.9.other": ("gram", np.eye(16, dtype=np.float32))}
    write_activations(tmp_path / "x", inputs, tokens=9, model="tiny/base")
    report = ao.cluster(
        fleet, out=tmp_path / "plan", allow_sharing="all", metric="activation",
        activations=tmp_path / "x",
    )  # fmt: skip
    assert report.adapters == 3
    assert [text.split()[0] for text in report.warnings] == ["t0", "t1", "t2"]
    assert "lacks 2 of the adapter's 2 modules" in report.warnings[0]


def test_a_duplicate_in_terms_of_inputs_alone_needs_consent(tmp_path):
    """Without consent nobody gets what only looks the same to these inputs."""
    first = pairs(0, SHAPES, 2)
    blind = {s: (B, A + 0.004 * (np.arange(16) == 15)) for s, (B, A) in first.items()}
    first, blind = (
        {s: (b, a.astype(np.float32)) for s, (b, a) in x.items()} for x in (first, blind)
    )
    fleet, where = made(tmp_path, {"a": first, "b": blind})
    assert NEAR < figures(dense(where["a"]), dense(where["b"]))["error"] < 1.3 * NEAR
    gram = np.diag([1.0] * 15 + [1e-12]).astype(np.float32)
    write_activations(
        tmp_path / "x", dict.fromkeys(SHAPES, ("gram", gram)), tokens=9, model="tiny/base"
    )
    options = {"metric": "activation", "activations": tmp_path / "x"}
    report = ao.cluster(fleet, out=tmp_path / "none", **options)
    assert report.adapters == 2
    report = ao.cluster(fleet, out=tmp_path / "all", allow_sharing="all", **options)
    assert report.adapters == 1


# As many adapters as there may be.


def test_at_most_so_many_adapters_or_a_clear_error(planted, tmp_path):
    root, fleet = planted
    bounds = []
    for count in (34, 60):
        out = tmp_path / str(count)
        options = {"allow_sharing": "all", "representative": "medoid"}
        report = ao.cluster(root / "fleet", out=out, max_adapters=count, **options)
        assert report.adapters <= count
        plan = check(out, paths(fleet))
        assert sum(rep.kind != "base" for rep in plan.representatives.values()) <= count
        bounds.append(plan.max_error)
        # A little less would not have done.
        less = ao.cluster(
            root / "fleet", out=out, max_error=max(0.97 * plan.max_error - 0.004, 0.0),
            dry_run=True, overwrite=True, **options,
        )  # fmt: skip
        assert less.adapters > count - 8
    assert bounds == sorted(bounds, reverse=True)
    with pytest.raises(BudgetError, match=r"--max-adapters 3.*are needed") as caught:
        ao.cluster(root / "fleet", out=tmp_path / "no", max_adapters=3, allow_sharing="all")
    few = int(caught.value.hint.split()[2])
    assert caught.value.exit_code == 5 and not (tmp_path / "no").exists()
    ao.cluster(root / "fleet", out=tmp_path / "no", max_adapters=few, allow_sharing="all")
    with pytest.raises(BudgetError, match="fewest"):
        ao.cluster(
            root / "fleet", out=tmp_path / "p", max_adapters=4, allow_sharing="all",
            policy=root / "p.csv",
        )  # fmt: skip


# Dialects, bases, extras.


def test_kohya_files(tmp_path):
    shapes = {"lora_unet_a": (16, 24), "lora_te_b": (20, 12)}
    (tmp_path / "a").mkdir()
    for n in range(4):
        rng = np.random.default_rng(n)
        factors = {
            s: ((B + 0.02 * rng.standard_normal(B.shape)).astype(np.float32), A)
            for s, (B, A) in pairs(0, shapes, 2).items()
        }
        write_kohya(tmp_path / "a" / f"t{n}.safetensors", factors, alpha=4.0)
    ao.index(tmp_path / "a", out=tmp_path / "fleet")
    ao.cluster(tmp_path / "fleet", out=tmp_path / "plan", allow_sharing="all", max_error=0.5)
    where = {f"t{n}.safetensors": tmp_path / "a" / f"t{n}.safetensors" for n in range(4)}
    plan = check(tmp_path / "plan", where, read_kohya)
    [rep] = plan.representatives.values()
    assert rep.kind == "minimax" and rep.path.endswith(".safetensors") and rep.dialect == "kohya"
    assert (tmp_path / "plan" / rep.path).stat().st_size == rep.size
    assert b"t1" not in b"".join(contents(tmp_path / "plan/representatives").values())[:2000]


def test_mlx_directories(tmp_path):
    """What is written is a directory that mlx-lm loads."""
    for n in range(3):
        folder = write_mlx(tmp_path / "a" / f"t{n}", seed=1)
        tensors = load_file(folder / "adapters.safetensors")
        rng = np.random.default_rng(n)
        for name in tensors:
            if name.endswith("lora_b"):
                tensors[name] = tensors[name] + 0.05 * rng.standard_normal(
                    tensors[name].shape
                ).astype(np.float32)
        from safetensors.numpy import save_file

        save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
    ao.index(tmp_path / "a", out=tmp_path / "fleet")
    ao.cluster(tmp_path / "fleet", out=tmp_path / "plan", allow_sharing="all", max_error=0.5)
    plan = check(tmp_path / "plan", {f"t{n}": tmp_path / "a" / f"t{n}" for n in range(3)}, read_mlx)
    [rep] = plan.representatives.values()
    assert rep.kind == "minimax" and (tmp_path / "plan" / rep.path).is_dir()


def test_bases_aliases_extras_and_shapes_keep_apart(tmp_path):
    base = {"base_model_name_or_path": "org/a"}
    head = {"extras": {"base_model.model.score.weight": np.ones((2, 4), np.float32)}}
    same = near(0, 0.0)
    wide = pairs(0, {stem: (m, 2 * n) for stem, (m, n) in SHAPES.items()}, 2)
    fleet, where = made(
        tmp_path,
        {
            "a0": (same, base), "a1": (near(1, 0.05), base),
            "b0": (same, {"base_model_name_or_path": "hub/a"}),
            "c0": (same, {**base, **head}), "c1": (near(1, 0.05), {**base, **head}),
            "w0": (wide, base),
        },
    )  # fmt: skip
    ao.cluster(fleet, out=tmp_path / "plan", allow_sharing="all")
    by = {name: item.by for name, item in read_plan(tmp_path / "plan").served.items()}
    assert by["a0"] == by["a1"] and by["c0"] == by["c1"] and len(set(by.values())) == 4
    assert read_plan(tmp_path / "plan").served["w0"].reason.startswith("the only one of its kind")
    (tmp_path / "alias.csv").write_text("hub/a,org/a\n")
    ao.cluster(fleet, out=tmp_path / "two", allow_sharing="all", base_alias=tmp_path / "alias.csv")
    plan = check(tmp_path / "two", where, lambda f: dense_peft(f))
    assert plan.served["b0"].by == plan.served["a0"].by
    for rep in plan.representatives.values():
        if not rep.location and "c0" in rep.members:
            tensors = load_file(tmp_path / "two" / rep.path / "adapter_model.safetensors")
            np.testing.assert_array_equal(tensors["base_model.model.score.weight"], np.ones((2, 4)))


def dense_peft(folder: Path) -> Deltas:
    """Modules alone, extras left out."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    scale, found = config["lora_alpha"] / config["r"], {}
    for name, B in tensors.items():
        if name.endswith(".lora_B.weight"):
            A = tensors[name.replace("lora_B", "lora_A")].astype(float)
            stem = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            found[stem] = scale * (B.astype(float) @ A)
    return found


# Files that are broken, gone, or not what was indexed.


def test_broken_files_are_left_out_and_said(tmp_path):
    fleet, where = made(tmp_path, {f"t{n}": near(n, 0.05) for n in range(3)})
    (where["t2"] / "adapter_model.safetensors").write_bytes(b"\1" * 20)
    ao.index(tmp_path / "a", out=fleet)
    report = ao.cluster(fleet, out=tmp_path / "plan", allow_sharing="all")
    assert report.excluded.keys() == {"t2"} and report.tenants == 2
    check(tmp_path / "plan", where)
    with pytest.raises(FormatError) as caught:
        ao.cluster(fleet, out=tmp_path / "no", allow_sharing="all", strict=True)
    assert "t2" in str(caught.value) and not (tmp_path / "no").exists()


@pytest.mark.parametrize("sharing", ["none", "all"])
def test_who_changed_since_it_was_indexed_is_served_by_its_own(tmp_path, sharing):
    """Duplicates, too, that are not opened again."""
    a = near(0, 0.05)
    fleet, where = made(tmp_path, {"t0": a, "t1": a, "t2": a, "t3": near(3, 0.05), "z": a})
    for name in ("t1", "t2"):
        write_peft(where[name], near(50, 1.0, of=7))
    shutil.rmtree(where["t3"])
    (where["z"] / "adapter_model.safetensors").write_bytes(b"no adapter")
    report = ao.cluster(fleet, out=tmp_path / "plan", allow_sharing=sharing)
    plan = read_plan(tmp_path / "plan")
    for name in ("t1", "t2"):
        rep = plan.representatives[plan.served[name].by]
        assert rep.members == (name,) and "changed since it was indexed" in rep.reason
    assert plan.excluded.keys() == {"t3", "z"}
    assert "gone since it was indexed" in plan.excluded["t3"]
    assert len(report.warnings) == 4 and "index again" in report.warnings[0]
    check(tmp_path / "plan", where)
    with pytest.raises(ChangedError, match="since it was indexed; index again"):
        ao.cluster(fleet, out=tmp_path / "no", allow_sharing=sharing, strict=True)
    assert not (tmp_path / "no").exists()
    ao.index(tmp_path / "a", out=fleet)
    ao.cluster(fleet, out=tmp_path / "again", allow_sharing=sharing)
    again = check(tmp_path / "again", where)
    assert again.served["t1"].by == again.served["t2"].by


@pytest.mark.parametrize("who", ["the centre", "a member"])
def test_a_file_that_rots_unseen_costs_nobody_else(tmp_path, who):
    """Of the same size and time: its tenant is alone and named, the others share as before."""
    fleet, where = made(tmp_path, {f"t{n}": near(n, 0.1) for n in range(4)})
    options = {"allow_sharing": "all", "max_error": 0.5, "representative": "medoid"}
    ao.cluster(fleet, out=tmp_path / "sound", **options)
    [rep] = read_plan(tmp_path / "sound").representatives.values()
    name = rep.holds[0] if who == "the centre" else min(set(where) - {*rep.holds})
    file = where[name] / "adapter_model.safetensors"
    status, data = file.stat(), file.read_bytes()
    file.write_bytes(data[:-8] + b"\0\0\xc0\x7f" * 2)  # NaN
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    report = ao.cluster(fleet, out=tmp_path / "plan", **options)
    plan = read_plan(tmp_path / "plan")
    groups = sorted(rep.members for rep in plan.representatives.values())
    assert groups == sorted([(name,), tuple(sorted(set(where) - {name}))])
    assert len(report.warnings) == 1 and f"{name} could not be compared" in report.warnings[0]
    file.write_bytes(data)
    check(tmp_path / "plan", where)


def test_a_file_that_changes_while_the_fleet_is_planned(tmp_path, monkeypatch):
    fleet, where = made(tmp_path, {f"t{n}": near(n, 0.1) for n in range(3)})
    real = averaging.signature

    def late(path, seed):
        write_peft(where["t1"], near(9, 1.0, of=4))
        return real(path, seed)

    monkeypatch.setattr(averaging, "signature", late)
    with pytest.raises(ChangedError, match="while the fleet was planned") as caught:
        ao.cluster(fleet, out=tmp_path / "plan", allow_sharing="all", max_error=0.5)
    assert "t1" in str(caught.value) and caught.value.exit_code == 6
    assert sorted(os.listdir(tmp_path)) == ["a", "fleet"]


# Small fleets.


def test_one_tenant_no_ops_and_none(tmp_path):
    zero = {name: (0 * B, A) for name, (B, A) in pairs(0, SHAPES, 2).items()}
    fleet, where = made(tmp_path / "one", {"solo": near(0, 0.1)})
    report = ao.cluster(fleet, out=tmp_path / "plan1", allow_sharing="all")
    assert (report.tenants, report.adapters, report.errors) == (1, 1, None)
    check(tmp_path / "plan1", where)
    fleet, where = made(tmp_path / "zero", {"x": zero, "y": zero, "p": zero})
    (tmp_path / "p.csv").write_text("tenant,private\np,true\n")
    report = ao.cluster(fleet, out=tmp_path / "plan2", policy=tmp_path / "p.csv")
    plan = check(tmp_path / "plan2", {"x": where["x"], "y": where["y"], "p": where["p"]}, dense)
    assert plan.routes == {"p": str(where["p"]), "x": None, "y": None}
    ao.index(out=fleet, remove=["x", "y", "p"])
    with pytest.raises(UsageError, match="has no tenants"):
        ao.cluster(fleet, out=tmp_path / "plan3")
    assert not (tmp_path / "plan3").exists()


# An earlier plan.


@pytest.fixture
def grown(tmp_path: Path) -> tuple[Path, Path, dict[str, Path]]:
    """Three groups of four, planned as `plan`."""
    members = {f"g{n % 3}-{n // 3}": near(n, 0.15, of=n % 3) for n in range(12)}
    fleet, where = made(tmp_path, members)
    ao.cluster(fleet, out=tmp_path / "plan", allow_sharing="all", max_error=0.3)
    assert len(read_plan(tmp_path / "plan").representatives) == 3
    return tmp_path, fleet, where


def again(root: Path, fleet: Path, **options: Any) -> Any:
    ao.index(root / "a", out=fleet)
    given_ = {"allow_sharing": "all", "max_error": 0.3, "previous": root / "plan", **options}
    return ao.cluster(fleet, out=root / "plan2", **given_)


def test_nothing_moves_without_a_reason(grown):
    root, fleet, where = grown
    report = again(root, fleet)
    old, new = check(root / "plan", where), check(root / "plan2", where)
    assert new.routes == old.routes and new.representatives.keys() == old.representatives.keys()
    assert report.changes["churn"] == 0 and not report.changes["moved"]
    assert contents(root / "plan2/representatives") == contents(root / "plan/representatives")
    shutil.rmtree(root / "plan")  # it stands alone
    check(root / "plan2", where)
    assert {id for part in read_sketches(root / "plan2") for id in part.ids} == set(
        new.representatives
    )


def test_newcomers_join_and_nobody_moves(grown):
    root, fleet, where = grown
    for n in range(3):
        where[f"new{n}"] = write_peft(root / "a" / f"new{n}", near(40 + n, 0.1, of=n))
    where["other"] = write_peft(root / "a" / "other", near(50, 0.1, of=8))
    report = again(root, fleet)
    old, new = read_plan(root / "plan"), check(root / "plan2", where)
    assert {n: r for n, r in new.routes.items() if n in old.routes} == old.routes
    assert set(report.changes["joined"]) == {"new0", "new1", "new2", "other"}
    assert report.changes["churn"] == 0
    for n in range(3):
        assert new.served[f"new{n}"].by == new.served[f"g{n}-0"].by
    assert len(report.changes["added"]) == 1 and new.served["other"].error == 0


def test_who_left_is_in_no_representative(grown):
    root, fleet, where = grown
    old = read_plan(root / "plan")
    ao.index(out=fleet, remove="g1-2")
    del where["g1-2"]
    report = again(root, fleet)
    new = check(root / "plan2", where)
    assert "g1-2" not in new.served
    assert not [rep.id for rep in new.representatives.values() if "g1-2" in rep.holds]
    was = old.representatives[old.served["g1-2"].by]
    gone = {rep.id for rep in old.representatives.values() if "g1-2" in rep.holds}
    assert gone == {was.id} and not list((root / "plan2").rglob(f"{was.id}*"))
    moved = {item["tenant"] for item in report.changes["moved"]}
    assert moved == set(was.members) - {"g1-2"} and report.changes["left"] == ["g1-2"]
    assert report.changes["churn"] == pytest.approx(3 / 11)
    for name in new.served.keys() - moved:
        assert new.routes[name] == old.routes[name]


def test_who_has_another_adapter_now_leaves_the_others_their_weights(grown):
    """What was made of its old weights is made anew."""
    root, fleet, where = grown
    old = read_plan(root / "plan")
    write_peft(where["g0-1"], near(70, 0.1, of=9))
    again(root, fleet)
    new = check(root / "plan2", where)
    assert new.representatives[new.served["g0-1"].by].members == ("g0-1",)
    for name in ("g1-0", "g2-3"):
        assert new.routes[name] == old.routes[name]


def test_a_tenant_turned_private_leaves_the_average(grown):
    root, fleet, where = grown
    (root / "p.csv").write_text("tenant,private\ng2-1,true\n")
    again(root, fleet, policy=root / "p.csv")
    new = check(root / "plan2", where)
    holders = [rep for rep in new.representatives.values() if "g2-1" in rep.holds]
    assert [rep.members for rep in holders] == [("g2-1",)]


def test_a_narrower_bound_and_a_fresh_plan_that_saves_much(grown):
    root, fleet, where = grown
    again(root, fleet, max_error=0.12)
    new = check(root / "plan2", where)
    assert max(item.error for item in new.served.values()) <= 0.12
    ao.cluster(fleet, out=root / "alone", max_error=0.3)
    assert len(read_plan(root / "alone").representatives) == 12
    report = again(root, fleet, previous=root / "alone", overwrite=True)
    assert report.adapters == 3  # nine adapters are worth the movement


def test_adapters_that_have_moved_are_routed_where_they_are(tmp_path):
    fleet, where = made(tmp_path, {"t0": near(0, 0.0), "t1": near(1, 0.01), "u": near(2, 0, of=3)})
    ao.cluster(fleet, out=tmp_path / "plan", allow_sharing="all", representative="medoid")
    (tmp_path / "a").rename(tmp_path / "b")
    ao.index(tmp_path / "b", out=tmp_path / "fleet2")
    ao.cluster(
        tmp_path / "fleet2", out=tmp_path / "plan2", allow_sharing="all",
        representative="medoid", previous=tmp_path / "plan",
    )  # fmt: skip
    plan = check(tmp_path / "plan2", {name: tmp_path / "b" / name for name in where})
    assert plan.served["t0"].by == plan.served["t1"].by
    assert read_plan(tmp_path / "plan").served["u"].by == plan.served["u"].by


def test_a_lost_representative_is_made_anew(grown):
    root, fleet, where = grown
    rep = next(r for r in read_plan(root / "plan").representatives.values() if not r.location)
    (root / "plan" / rep.path / "adapter_model.safetensors").write_bytes(b"damaged")
    again(root, fleet)
    check(root / "plan2", where)


def test_a_plan_of_another_seed_and_one_too_close_to_the_earlier(grown):
    root, _fleet, _where = grown
    ao.index(root / "a", out=root / "seeded", seed=5)
    with pytest.raises(UsageError, match="seed 0, the index has 5"):
        ao.cluster(root / "seeded", out=root / "plan2", previous=root / "plan")
    assert not (root / "plan2").exists()


def test_dry_run_writes_nothing(grown):
    root, fleet, _where = grown
    before = sorted(map(str, root.rglob("*")))
    for options in ({}, {"previous": root / "plan"}):
        report = ao.cluster(
            fleet, out=root / "plan2", dry_run=True, allow_sharing="all", max_error=0.3, **options
        )
        assert report.output == "" and report.adapters == 3
    assert sorted(map(str, root.rglob("*"))) == before
    real = ao.cluster(fleet, out=root / "plan2", allow_sharing="all", max_error=0.3)
    assert real.to_dict() | {"output": ""} == report.to_dict() | {"changes": {}}
