"""A plan as an engine serves it: files, names, routes, errors, memory; and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

import adapterops
from adapterops.activations import write_activations
from adapterops.errors import BudgetError, FileError, FormatError, IncompatibleError, UsageError
from adapterops.files.source import LocalFile
from adapterops.fleet.consent.policy import Consent
from adapterops.fleet.deploy import names, verify
from adapterops.fleet.deploy.flags import cached
from adapterops.fleet.indexing.store import Store
from adapterops.fleet.plans.plan import Served
from adapterops.fleet.signing.signature import signature
from adapterops.fleet.types import Tenant
from adapterops.formats import open_adapter_file
from adapterops.render.fleet_deploy import page
from adapterops.serving import ENGINES, gpu_bytes, judge
from tests.deploying import BASE, SHAPES, Fleet, near, resolved, small
from tests.support import dense, distance, pairs, read_peft, write_peft
from tests.test_cli import run

ENGINE_NAMES = list(ENGINES)


def deploy(plan: Path, out: Path, engine: str = "vllm", **options):
    return adapterops.deploy(plan, engine=engine, served_base=BASE, out=out, jobs=1, **options)


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def routes_of(folder: Path) -> dict:
    return json.loads((folder / "routes.json").read_text())["routes"]


@pytest.fixture
def fleet(tmp_path):
    return small(tmp_path)


def test_layout_routes_and_errors(fleet, tmp_path):
    before = state(tmp_path / "adapters")
    plan = fleet.plan()
    report = deploy(plan, tmp_path / "run")
    assert state(tmp_path / "adapters") == before
    found = routes_of(tmp_path / "run")
    assert set(found) == {"a", "b", "c", "d", "e"} and report.left == {}
    assert found["a"]["adapter"] == found["b"]["adapter"] != found["c"]["adapter"]
    assert found["e"] == {"adapter": None, "request": found["e"]["request"]}
    assert found["e"]["request"]["model"] == BASE
    for tenant, route in found.items():
        if route["adapter"]:
            assert resolved(tmp_path / "run", route["adapter"], BASE), tenant
            assert route["request"]["model"] == route["adapter"]
            written = read_peft_any(tmp_path / "run" / route["adapter"])
            scale = 2.0 if tenant == "d" else 1.0
            own = distance(written, dense(fleet.factors[tenant], scale))
            assert report.tenants[tenant].error == pytest.approx(own, abs=1e-9)
            assert report.tenants[tenant].known == ("computed" if tenant == "b" else "own")
    assert 0.03 < report.tenants["b"].error < 0.08
    assert [item.members for item in report.adapters] == [("c",), ("a", "b"), ("d",)]
    inside = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*.*")}
    assert inside - {"adapterops.json"} == set(report.files) - {"adapterops.json"}
    sidecar = json.loads((tmp_path / "run" / "adapterops.json").read_text())
    assert sidecar["schema"] == "adapterops.deploy/1" and sidecar["plan"] == "plan"
    again = deploy(plan, tmp_path / "run", overwrite=True)  # it knows its own work
    assert [a.name for a in again.adapters] == [a.name for a in report.adapters]


def read_peft_any(folder: Path) -> dict[str, np.ndarray]:
    """ΔW of each module by the adapter's own config, patterns or not."""
    opened = adapterops.open_adapter(folder)
    return {name: (opened[name].B @ opened[name].A) for name in opened}


@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_every_engine_gets_what_it_serves(fleet, tmp_path, engine):
    report = deploy(fleet.plan(), tmp_path / "run", engine, max_loras=2)
    assert not report.left
    for item in report.adapters:
        file = open_adapter_file(tmp_path / "run" / item.name)
        wrong = [o for o in judge(file, engine) if o.severity != "note"]
        assert not wrong and file.rank == item.rank
        written = read_peft_any(tmp_path / "run" / item.name)
        for tenant in item.members:
            exact = dense(fleet.factors[tenant], 2.0 if tenant == "d" else 1.0)
            missing = {name: 0 * written[name] for name in written.keys() - exact.keys()}
            error = distance(written, {**exact, **missing})
            assert report.tenants[tenant].error == pytest.approx(error, abs=1e-9)
    how = {item.id: item.how for item in report.adapters}
    assert how["r-c"] != "written"  # legal everywhere: its own bytes
    assert (how["r-d"] == "written") == (engine in ("lorax", "tgi", "portable"))  # rank 24
    words = " ".join([*report.launch.command, *report.launch.environment.values()])
    text = words + "".join(report.launch.files.values())
    expected = {
        "vllm": ["--max-lora-rank 32", "--max-loras 2", "--max-cpu-loras 3", "lora_filesystem"],
        "sglang": ["--max-lora-rank 24", "--max-loras-per-batch 2", "--max-loaded-loras 3"],
        "lorax": ["--adapter-source local", "--max-active-adapters 2", "--preloaded-adapter-ids"],
        "tgi": [f"{report.adapters[0].name}={tmp_path / 'run' / report.adapters[0].name}"],
        "trtllm": ["max_lora_rank: 24", '"attn_dense", "attn_q", "attn_v"', "max_cpu_loras: 3"],
        "portable": [""],
    }
    assert all(word in text for word in expected[engine]), text
    if engine in ("vllm", "sglang"):
        assert "--lora-target-modules k_proj o_proj q_proj v_proj" in text
    salted = sum("cache_salt" in r["request"] for r in routes_of(tmp_path / "run").values())
    assert salted == report.salted == (0 if engine in ("lorax", "tgi") else 3)


def test_the_resolvers_environment(fleet, tmp_path):
    report = deploy(fleet.plan(), tmp_path / "run")
    assert report.launch.environment == {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_PLUGINS": "lora_filesystem_resolver",
        "VLLM_LORA_RESOLVER_CACHE_DIR": str(tmp_path / "run"),
    }
    assert not resolved(tmp_path / "run", report.adapters[0].name, BASE.upper())


def test_requests_of_engines_without_plain_names(fleet, tmp_path):
    plan = fleet.plan()
    for engine in ("sglang", "lorax", "trtllm", "tgi"):
        report = deploy(plan, tmp_path / engine, engine)
        found = routes_of(tmp_path / engine)
        name = found["c"]["adapter"]
        request = found["c"]["request"]
        path = str(tmp_path / engine / name)
        if engine == "trtllm":
            lora = request["lora_request"]
            assert request["model"] == BASE and lora["lora_path"] == path
            numbers = {
                r["request"]["lora_request"]["lora_int_id"] for r in found.values() if r["adapter"]
            }
            assert len(numbers) == len(report.adapters)
        else:
            model = {"sglang": f"{BASE}:{name}", "lorax": path, "tgi": name}[engine]
            assert request == {"model": model}
        assert found["e"]["request"]["model"] == ("tgi" if engine == "tgi" else BASE)


def test_router_config_is_the_routes(fleet, tmp_path):
    deploy(fleet.plan(), tmp_path / "run")
    found = routes_of(tmp_path / "run")
    models = yaml.safe_load((tmp_path / "run" / "litellm.yaml").read_text())["model_list"]
    assert {m["model_name"] for m in models} == set(found)
    for model in models:
        params, request = model["litellm_params"], found[model["model_name"]]["request"]
        assert params["model"] == "hosted_vllm/" + request["model"]
        more = {key: value for key, value in request.items() if key != "model"}
        assert params.get("extra_body", {}) == more


def test_names_that_a_router_takes_for_patterns_are_warned_of(fleet, tmp_path):
    fleet.add("acme*", pairs(5, SHAPES, 8, np.float16))
    fleet.group(["acme*"])
    report = deploy(fleet.plan(), tmp_path / "run")
    assert [text for text in report.warnings if "(acme*)" in text]


def test_salts_are_random_kept_with_the_adapter_and_only_where_caches_are_shared(fleet, tmp_path):
    plan = fleet.plan()
    deploy(plan, tmp_path / "one")
    deploy(plan, tmp_path / "two")
    deploy(plan, tmp_path / "three", previous=tmp_path / "one")
    salts = [
        {t: r["request"].get("cache_salt") for t, r in routes_of(tmp_path / name).items()}
        for name in ("one", "two", "three")
    ]
    for found in salts:
        assert {t for t, salt in found.items() if salt} == {"a", "b", "e"}
        given = [salt for salt in found.values() if salt]
        assert all(s.startswith("salt:") and len(s) == 37 for s in given) and len({*given}) == 3
    assert not set(salts[0].values()) & set(salts[1].values()) - {None}
    assert salts[2] == salts[0]
    text = (tmp_path / "one" / "adapterops.json").read_text()
    assert not any(salt in text for salt in salts[0].values() if salt)


def test_a_tenant_that_moves_gets_a_new_salt(fleet, tmp_path):
    plan = fleet.plan()
    first = deploy(plan, tmp_path / "one")
    fleet.served["c"] = replace(fleet.served["c"], by="")
    del fleet.reps["r-c"], fleet.reps["r-a"]
    fleet.group(["c", "a"])
    fleet.group(["b"])
    report = deploy(
        fleet.plan("plan2", max_error=None), tmp_path / "two", previous=tmp_path / "one"
    )
    old, new = routes_of(tmp_path / "one"), routes_of(tmp_path / "two")
    assert old["a"]["adapter"] != new["a"]["adapter"] == new["c"]["adapter"]
    assert old["a"]["request"]["cache_salt"] != new["a"]["request"]["cache_salt"]
    assert "cache_salt" not in new["b"]["request"]
    assert old["e"] == new["e"]
    kept = {item.name for item in first.adapters if item.id in ("r-c", "r-d")}
    assert set(report.changes["kept"]) == kept
    assert report.changes["gone"] == (old["a"]["adapter"],)
    assert report.changes["new"] == (new["b"]["adapter"],)


def test_a_version_that_was_assigned_is_what_errors_are_of(fleet, tmp_path):
    plan = fleet.plan(options=Consent("all").to_dict())
    factors = {"b": near(fleet.factors["a"], 9, 0.1), "c": pairs(77, SHAPES, 8, np.float16)}
    new = {
        name: write_peft(tmp_path / "new" / name, own, base_model_name_or_path=BASE)
        for name, own in factors.items()
    }
    adapterops.assign(plan, new, out=tmp_path / "plan2")
    report = deploy(tmp_path / "plan2", tmp_path / "run")
    expected = distance(dense(fleet.factors["a"]), dense(factors["b"]))
    assert report.routes["b"] == report.routes["a"] != report.routes["c"]
    assert report.tenants["b"].error == pytest.approx(expected, rel=1e-6)
    assert report.tenants["c"].error == 0 and report.tenants["c"].known == "own"


def test_names_follow_content(fleet, tmp_path):
    plan = fleet.plan()
    one = deploy(plan, tmp_path / "one")
    other = adapterops.deploy(plan, engine="vllm", served_base="x/tiny", out=tmp_path / "two")
    name = {r.id: r.name for r in one.adapters}
    assert all(n.startswith("lora-") and len(n) == 21 for n in name.values())
    assert not set(name.values()) & {r.name for r in other.adapters}  # its config is another
    moved = Fleet(tmp_path / "moved")
    changed = {n: (B.copy(), A) for n, (B, A) in fleet.factors["c"].items()}
    changed[next(iter(changed))][0][0, 0] += 1
    moved.add("c", changed)
    moved.add("d", fleet.factors["d"], alpha=48)
    moved.group(["c"])
    moved.group(["d"])
    third = {r.id: r.name for r in deploy(moved.plan(), tmp_path / "three").adapters}
    assert third["r-c"] != name["r-c"] and third["r-d"] == name["r-d"]
    assert names.fresh("ab" * 32, {"lora-" + "ab" * 8}) == "lora-" + "ab" * 8 + "-2"


def test_equal_bytes_that_must_not_be_shared_have_names_and_salts_of_their_own(tmp_path):
    fleet = Fleet(tmp_path)
    for name in ("p", "q"):
        fleet.add(name, pairs(1, SHAPES, 8, np.float16))
        fleet.group([name])
    report = deploy(fleet.plan(), tmp_path / "run")
    one, two = (routes_of(tmp_path / "run")[name] for name in "pq")
    assert two["adapter"] == one["adapter"] + "-2" and report.salted == 2


def test_threads_change_nothing(fleet, tmp_path):
    other = {"model.layers.0.self_attn.q_proj": (48, 32)}  # of another model: left out in the end
    fleet.add("f", pairs(11, other, 4, np.float16), base_model_name_or_path="")
    fleet.group(["f"])
    plan = fleet.plan()
    found = [
        adapterops.deploy(
            plan, engine="vllm", served_base=BASE, out=tmp_path / f"on{jobs}", max_rank=16,
            max_error=1.0, jobs=jobs,
        ).to_dict()
        for jobs in (1, 2, 5)
    ]  # fmt: skip
    assert "has out=48, in=32, other adapters of this deployment have" in found[0]["left"]["f"]
    for one in found:
        one["output"], one["launch"] = "", {}
        assert one == found[0]
    files = {str(path.relative_to(tmp_path / "on1")) for path in (tmp_path / "on1").rglob("*")}
    for jobs in (2, 5):
        assert files == {
            str(path.relative_to(tmp_path / f"on{jobs}"))
            for path in (tmp_path / f"on{jobs}").rglob("*")
        }
        for name in files:
            one, other = tmp_path / "on1" / name, tmp_path / f"on{jobs}" / name
            if one.suffix == ".safetensors":
                assert one.read_bytes() == other.read_bytes()


def test_what_is_copied_is_read_once(tmp_path, monkeypatch):
    fleet = Fleet(tmp_path)
    fleet.add("a", pairs(1, dict.fromkeys(SHAPES, (512, 512)), 128, np.float16))
    fleet.group(["a"])
    plan = fleet.plan()
    size = (fleet.home("a") / "adapter_model.safetensors").stat().st_size
    seen = []
    pread_into = LocalFile.pread_into

    def counted(self, offset, buffer):
        if self.path.endswith("adapter_model.safetensors"):
            seen.append(len(buffer))
        pread_into(self, offset, buffer)

    monkeypatch.setattr(LocalFile, "pread_into", counted)
    report = deploy(plan, tmp_path / "run")
    assert [item.how for item in report.adapters] == ["copied"] or report.adapters[
        0
    ].how == "cloned"
    assert size <= sum(seen) < 1.2 * size  # headers beside
    again = names.content(tmp_path / "run" / report.adapters[0].name)
    assert report.adapters[0].name == names.fresh(again, ())


def test_link_gives_originals_a_second_name(fleet, tmp_path):
    report = deploy(fleet.plan(), tmp_path / "run", link=True)
    item = next(item for item in report.adapters if item.id == "r-c")
    weights = tmp_path / "run" / item.name / "adapter_model.safetensors"
    assert item.how == "linked" and item.change == 0.0
    assert os.path.samefile(weights, fleet.home("c") / "adapter_model.safetensors")


def test_the_plans_own_representatives(tmp_path):
    fleet = Fleet(tmp_path)
    a = pairs(1, SHAPES, 8, np.float16)
    for index, name in enumerate("abc"):
        fleet.add(name, near(a, index, 0.1))
    (tmp_path / "representatives").mkdir()
    mean = tmp_path / "representatives" / "mean"
    homes = [fleet.home(name) for name in "abc"]
    adapterops.merge(homes, [1 / 3] * 3, out=mean, rank=24)
    fleet.group("abc", "mean", mean)
    report = deploy(fleet.plan(), tmp_path / "run")
    written = read_peft(tmp_path / "run" / report.adapters[0].name)
    for name in "abc":
        error = distance(written, dense(fleet.factors[name]))
        assert report.tenants[name].error == pytest.approx(error, abs=1e-9)
    for path in (tmp_path / "run" / report.adapters[0].name).iterdir():
        assert path.name in ("adapter_config.json", "adapter_model.safetensors")


def test_what_is_written_names_no_tenant(tmp_path):
    fleet = Fleet(tmp_path)
    fleet.add("customer-77", pairs(1, SHAPES, 24, np.float16))
    fleet.group(["customer-77"])
    report = deploy(fleet.plan(), tmp_path / "run", "portable")
    assert report.adapters[0].how == "written"
    for path in (tmp_path / "run" / report.adapters[0].name).iterdir():
        assert b"customer-77" not in path.read_bytes()


def test_an_off_boarded_tenant_stops_it(fleet, tmp_path):
    plan = fleet.plan()
    with Store.open(tmp_path / "fleet") as store:
        store.forget(["a"])
    with pytest.raises(IncompatibleError, match="still holds weights of a,") as caught:
        deploy(plan, tmp_path / "run")
    assert caught.value.exit_code == 4 and not (tmp_path / "run").exists()
    assert "cluster FLEET --previous PLAN" in str(caught.value)


def test_an_off_boarded_member_stops_it(fleet, tmp_path):
    plan = fleet.plan()
    with Store.open(tmp_path / "fleet") as store:
        store.forget(["b"])
    with pytest.raises(IncompatibleError, match="still serves b,"):
        deploy(plan, tmp_path / "run")


def test_without_the_index_nobody_knows_who_left(fleet, tmp_path):
    plan = fleet.plan()
    (tmp_path / "fleet").rename(tmp_path / "elsewhere")
    for dry in (False, True):
        with pytest.raises(FileError, match="off-boarded since is not known") as caught:
            deploy(plan, tmp_path / "run", dry_run=dry)
        assert caught.value.exit_code == 6 and not (tmp_path / "run").exists()
        assert "--fleet FLEET" in caught.value.hint
    with Store.open(tmp_path / "elsewhere") as store:
        store.forget(["a"])
    with pytest.raises(IncompatibleError, match="weights of a,"):
        deploy(plan, tmp_path / "run", fleet=tmp_path / "elsewhere")
    plan = fleet.plan("plan2", options={"removed": ["d"]})
    with pytest.raises(IncompatibleError, match="weights of d,"):  # the plan itself says it
        deploy(plan, tmp_path / "run")


@pytest.mark.parametrize("given", [False, True])
def test_another_index_does_not_know_who_left(fleet, tmp_path, given):
    plan = fleet.plan()
    options = {"fleet": tmp_path / "fleet"} if given else {}
    for name in ("seed", "tenants"):
        shutil.rmtree(tmp_path / "fleet")
        with Store.create(tmp_path / "fleet", 1 if name == "seed" else 0) as store:
            home = str(fleet.home("a"))
            store.put([(Tenant("a", home, home), "1", signature(home, store.seed))])
        said = "has the seed 1, the plan 0" if name == "seed" else "does not know b, c, d, e,"
        with pytest.raises(IncompatibleError, match=said) as caught:
            deploy(plan, tmp_path / "run", **options)
        assert "--fleet" in caught.value.hint
    (tmp_path / "fleet" / "fleet.sqlite").write_bytes(b"SQLite format 3\0" + bytes(2000))
    with pytest.raises(FormatError, match="the plan's index cannot be read"):
        deploy(plan, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_errors_are_bounded_where_a_tenants_own_adapter_is_gone(fleet, tmp_path):
    plan = fleet.plan()
    exact = deploy(plan, tmp_path / "x", "vllm", max_rank=1, max_error=2.0)
    fleet.home("b").rename(tmp_path / "gone")
    report = deploy(plan, tmp_path / "run", "vllm", max_rank=1, max_error=2.0)
    assert any("own adapters of 1 tenants cannot be read (b)" in text for text in report.warnings)
    assert report.tenants["b"].known == "bounded" and exact.tenants["b"].known == "computed"
    assert exact.tenants["b"].error <= report.tenants["b"].error
    assert report.tenants["b"].error > report.tenants["b"].planned
    with pytest.raises(IncompatibleError, match="cannot be read"):
        deploy(plan, tmp_path / "strict", strict=True, max_rank=1, max_error=2.0)
    whole = deploy(plan, tmp_path / "whole", max_error=1.0)
    assert whole.tenants["b"].known == "planned"
    assert whole.tenants["b"].error == whole.tenants["b"].planned


def test_a_changed_representative_stops_it(fleet, tmp_path):
    plan = fleet.plan()
    path = fleet.home("c") / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IncompatibleError, match="r-c has changed since it was planned"):
        deploy(plan, tmp_path / "run")
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".run*"))


def test_an_error_above_the_bound_stops_it(fleet, tmp_path):
    fleet.max_error = 0.06
    plan = fleet.plan()
    with pytest.raises(BudgetError, match=r"tenants would be above --max-error 0.06.*: a, b, c, d"):
        deploy(plan, tmp_path / "run", max_rank=1)
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".run*"))
    report = deploy(plan, tmp_path / "run", max_rank=1, max_error=1.0)
    assert report.limit == 1.0 and max(e.error for e in report.tenants.values()) < 1.0
    with pytest.raises(BudgetError, match=r"1 of 5 tenants.*: b;"):
        deploy(plan, tmp_path / "tight", max_error=0.01)


def test_tenants_that_the_engine_cannot_serve_are_named_and_routed_nowhere(fleet, tmp_path):
    head = {"base_model.model.lm_head.weight": np.ones((4, 32), np.float16)}
    fleet.add("f", pairs(9, SHAPES, 8, np.float16), extras=head, modules_to_save=["lm_head"])
    fleet.group(["f"])
    plan = fleet.plan(excluded={"g": "its file is truncated"})
    report = deploy(plan, tmp_path / "run")
    assert set(report.left) == {"f", "g"} and "lm_head" in report.left["f"]
    assert report.left["g"] == "its file is truncated"
    document = json.loads((tmp_path / "run" / "routes.json").read_text())
    assert not {"f", "g"} & document["routes"].keys() and document["not_deployed"] == report.left
    assert "2 tenants are routed nowhere: f, g" in report.warnings
    with pytest.raises(IncompatibleError, match="routed nowhere"):
        deploy(plan, tmp_path / "strict", strict=True)


def test_one_deployment_serves_one_base(fleet, tmp_path):
    fleet.add("z", pairs(8, SHAPES, 8, np.float16), base_model_name_or_path="org/other")
    fleet.group(["z"])
    a = fleet.factors["a"]
    zero = {name: (0 * B, A) for name, (B, A) in a.items()}
    fleet.add("y", zero, base_model_name_or_path="org/other")
    fleet.group(["e", "y"], "base")
    plan = fleet.plan()
    report = adapterops.deploy(plan, engine="vllm", served_base="/models/tiny", out=tmp_path / "r")
    assert "org/other" in report.left["z"] and "org/other" in report.left["y"]
    assert set(report.routes) == set("abcde") and report.routes["e"] is None
    assert report.memory.adapters_before == 5
    with pytest.raises(IncompatibleError, match="2 bases"):
        adapterops.deploy(plan, engine="vllm", served_base="third", out=tmp_path / "s")
    alone = Fleet(tmp_path / "alone")
    alone.add("c", fleet.factors["c"])
    alone.group(["c"])
    report = adapterops.deploy(alone.plan(), engine="vllm", served_base="third", out=tmp_path / "t")
    assert "'third' must have the same weights" in report.warnings[0]


def test_an_adapter_that_was_never_read_is_routed_nowhere(fleet, tmp_path):
    fleet.reps["r-c"] = replace(fleet.reps["r-c"], content="", base="")
    report = deploy(fleet.plan(), tmp_path / "run")
    assert "c" not in report.routes and "was not read when it was planned" in report.left["c"]
    assert "c" not in routes_of(tmp_path / "run")


def test_the_base_that_is_named_in_full_goes_before_one_that_ends_alike(fleet, tmp_path):
    fleet.add("z", pairs(8, SHAPES, 8, np.float16), base_model_name_or_path="other/tiny")
    fleet.group(["z"])
    plan = fleet.plan()
    report = deploy(plan, tmp_path / "run")
    assert "z" not in report.routes and "other/tiny" in report.left["z"]
    with pytest.raises(IncompatibleError, match="several of them called like '/models/tiny'"):
        adapterops.deploy(plan, engine="vllm", served_base="/models/tiny", out=tmp_path / "r")


def test_adapters_without_a_base_are_warned_of_and_must_have_the_shapes_of_the_others(
    fleet, tmp_path
):
    wide = {name: (rows, 48) for name, (rows, _) in SHAPES.items()}
    fleet.add("f", pairs(8, wide, 8, np.float16), traffic=99, base_model_name_or_path=None)
    fleet.add("g", pairs(9, SHAPES, 8, np.float16), traffic=50, base_model_name_or_path=None)
    fleet.group(["f"])
    fleet.group(["g"])
    report = deploy(fleet.plan(), tmp_path / "run")
    assert "f" not in report.routes and "out=16, in=48" in report.left["f"]
    assert [item.members for item in report.adapters][:2] == [("g",), ("c",)]  # by traffic
    assert any("2 tenants name no base (f, g)" in text for text in report.warnings)


@pytest.mark.parametrize(
    ("kind", "encoding"),
    [("LORA", "utf-8-sig"), ("LORA", "utf-16"), ("lora", "utf-8"), (None, "utf-8")],
    ids=["mark", "utf-16", "small", "null"],
)
def test_configs_are_written_as_engines_read_them(fleet, tmp_path, kind, encoding):
    config = fleet.home("c") / "adapter_config.json"
    document = {**json.loads(config.read_text()), "peft_type": kind}
    config.write_bytes(json.dumps(document).encode(encoding))
    plan = fleet.plan()
    report = deploy(plan, tmp_path / "run")
    name = report.routes["c"]
    assert {item.name: item.how for item in report.adapters}[name] == "copied"
    assert resolved(tmp_path / "run", name, BASE)


def test_image_adapters_are_left_out_by_name(fleet, tmp_path):
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.lora"
    home = fleet.home("i") / "pytorch_lora_weights.safetensors"
    home.parent.mkdir()
    down, up = np.ones((4, 32), np.float16), np.ones((32, 4), np.float16)
    save_file({f"{stem}.down.weight": down, f"{stem}.up.weight": up}, home)
    fleet.served["i"] = Served("")
    fleet.group(["i"])
    plan = fleet.plan()
    for engine in ENGINE_NAMES:
        report = deploy(plan, tmp_path / engine, engine)
        assert "image model" in report.left["i"]
        assert set(report.routes) == set("abcde")
        assert report.memory.adapters_before == 5
        assert not any("unet" in text for text in report.warnings)
    assert "i" in deploy(plan, tmp_path / "dry", dry_run=True).left


def test_gpu_bytes_before_and_after(fleet, tmp_path):
    report = deploy(fleet.plan(), tmp_path / "run", max_loras=4)
    vllm = ENGINES["vllm"]
    assert report.memory.before == gpu_bytes(vllm, SHAPES.values(), adapters=4, rank=24)
    assert report.memory.after == gpu_bytes(vllm, SHAPES.values(), adapters=3, rank=24)
    assert report.memory.after == 2 * 3 * 32 * sum(m + n for m, n in SHAPES.values())
    lorax = deploy(tmp_path / "plan", tmp_path / "lorax", "lorax", max_loras=4)
    wide = sum(m + n for m, n in SHAPES.values())
    assert lorax.memory.after == 2 * wide * (8 + 8 + 32)
    assert lorax.memory.before == 2 * wide * 3 * 8  # of four, e has no modules that change
    assert deploy(tmp_path / "plan", tmp_path / "trt", "trtllm").memory.after is None


def test_slots_are_paid_for_in_every_layer_and_fused_group(tmp_path):
    fleet = Fleet(tmp_path)
    some = {n: s for n, s in SHAPES.items() if "q_proj" in n or "v_proj" in n}
    some.pop("model.layers.0.self_attn.v_proj")
    fleet.add("a", pairs(1, some, 8, np.float16))
    fleet.group(["a"])
    report = deploy(fleet.plan(), tmp_path / "run")
    qkv = [s for n, s in SHAPES.items() if "o_proj" not in n]
    assert report.memory.after == gpu_bytes(ENGINES["vllm"], qkv, adapters=1, rank=8)


def test_proposals_are_exact_and_can_be_taken(fleet, tmp_path):
    plan = fleet.plan(max_error=0.95)
    report = deploy(plan, tmp_path / "run")
    assert [(p.rank, p.now, p.tenants) for p in report.proposals] == [(16, 32, 1), (8, 32, 1)]
    deltas = dense(fleet.factors["d"], 2.0).values()
    values = [np.linalg.svd(delta, compute_uv=False) for delta in deltas]
    whole = sum((v**2).sum() for v in values)
    for proposal in report.proposals:
        lost = np.sqrt(sum((v[proposal.rank :] ** 2).sum() for v in values) / whole)
        assert proposal.largest == pytest.approx(float(lost), rel=1e-9)
    assert [p.over for p in report.proposals] == [(), ()]
    tight = deploy(plan, tmp_path / "tight", max_error=0.1)
    assert [p.over for p in tight.proposals] == [("d",), ("d",)]
    assert "--max-rank 16, which the bound of 0.1 may forbid for d" in page(tight, verbose=False)
    proposal = report.proposals[0]
    lost = proposal.largest
    taken = deploy(plan, tmp_path / "low", max_rank=16)
    assert taken.memory.after == report.memory.after - proposal.saves
    assert taken.tenants["d"].error == pytest.approx(float(lost), rel=1e-3)
    assert [p.rank for p in taken.proposals] == [8]
    assert "--max-lora-rank 16" in " ".join(taken.launch.command)


def test_ranks_that_no_slot_has(fleet, tmp_path):
    plan = fleet.plan()
    with pytest.raises(UsageError, match="the next is 16"):
        deploy(plan, tmp_path / "run", "lorax", max_rank=12)
    assert cached([5, 5, 5], 1, 11) == 2 and cached([5, 5, 5], 3, 0) == 3


def test_dry_run_writes_nothing(fleet, tmp_path):
    plan = fleet.plan()
    before = sorted(tmp_path.iterdir())
    report = deploy(plan, tmp_path / "run", "portable", dry_run=True)
    assert sorted(tmp_path.iterdir()) == before and report.files == ()
    real = deploy(plan, tmp_path / "run", "portable")
    assert [(a.id, a.rank, a.how == "written") for a in report.adapters] == [
        (a.id, a.rank, a.how == "written") for a in real.adapters
    ]
    assert report.memory == real.memory
    assert {e.known for e in report.tenants.values()} <= {"planned", "base"}


def test_a_deployment_appears_whole_or_not_at_all(fleet, tmp_path, monkeypatch):
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    plan = fleet.plan()
    monkeypatch.setattr(verify, "check_limit", killed)
    with pytest.raises(KeyboardInterrupt):
        deploy(plan, tmp_path / "run")
    assert not list(tmp_path.glob("*run*")) and not list(tmp_path.glob(".*run*"))


def test_places_that_are_refused(fleet, tmp_path):
    plan = fleet.plan()
    deploy(plan, tmp_path / "one")
    for out in (plan / "inside", fleet.home("a") / "inside", tmp_path / "adapters"):
        with pytest.raises(UsageError):
            deploy(plan, out)
    with pytest.raises(UsageError, match="is the input"):  # it would be the way back
        deploy(plan, tmp_path / "one", previous=tmp_path / "one", overwrite=True)
    with pytest.raises(UsageError, match="has a comma"):
        deploy(plan, tmp_path / "a,b", "tgi")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "routes.json").write_text('{"schema": "adapterops.routes/1"}')
    with pytest.raises(FormatError, match=r"no routes\.json"):
        deploy(plan, tmp_path / "two", previous=tmp_path / "other")
    (tmp_path / "other" / "routes.json").write_text('{"schema": "adapterops.routes/9"}')
    with pytest.raises(UsageError, match="routes/9"):
        deploy(plan, tmp_path / "two", previous=tmp_path / "other")


def test_wide_factors_are_rounded_here_where_that_is_wanted(tmp_path):
    fleet = Fleet(tmp_path)
    fleet.add("w", pairs(1, SHAPES, 8))
    fleet.group(["w"])
    plan = fleet.plan()
    kept = deploy(plan, tmp_path / "kept")
    assert kept.tenants["w"].error == 0.0 and kept.tenants["w"].known == "own"
    assert any("rounded to the model's own type" in note for note in kept.notes)
    narrow = deploy(plan, tmp_path / "narrow", dtype="bf16")
    error = distance(
        read_peft(tmp_path / "narrow" / narrow.adapters[0].name), dense(fleet.factors["w"])
    )
    assert 1e-4 < narrow.tenants["w"].error == pytest.approx(error, rel=1e-9)
    assert not any("rounded to the model's own type" in note for note in narrow.notes)
    with pytest.raises(UsageError, match="--dtype 'int8'"):
        deploy(plan, tmp_path / "no", dtype="int8")


def test_errors_of_outputs(fleet, tmp_path):
    rng = np.random.default_rng(0)
    samples = {name: ("samples", rng.standard_normal((40, 32))) for name in SHAPES}
    write_activations(tmp_path / "x.safetensors", samples, tokens=40, model=BASE)
    plan = fleet.plan(metric="activation")
    with pytest.raises(IncompatibleError, match="--activations"):
        deploy(plan, tmp_path / "run")
    report = deploy(plan, tmp_path / "run", activations=tmp_path / "x.safetensors")
    own, by = dense(fleet.factors["b"]), dense(fleet.factors["a"])
    x = {name: values[1].astype(np.float32).astype(float).T for name, values in samples.items()}
    lost = sum(np.sum(((by[n] - own[n]) @ x[n]) ** 2) for n in own)
    whole = sum(np.sum((own[n] @ x[n]) ** 2) for n in own)
    assert report.tenants["b"].measured == pytest.approx(float(np.sqrt(lost / whole)), rel=1e-6)


def test_originals_in_a_bucket(tmp_path):
    fleet, store = Fleet(tmp_path), fsspec.filesystem("memory")
    folder, bucket = tmp_path / "files", f"memory://{tmp_path.name}"
    folder.mkdir()
    for index, name in enumerate("mn"):
        fleet.add(name, near(pairs(1, SHAPES, 8, np.float16), index, 0.05))
        adapterops.merge(fleet.home(name), out=folder / f"{name}.safetensors")
    fleet.home = lambda name: folder / f"{name}.safetensors"
    fleet.group(["m", "n"])
    store.put(str(folder), f"/{tmp_path.name}", recursive=True)
    uris = {name: f"{bucket}/{name}.safetensors" for name in "mn"}
    fleet.reps["r-m"] = replace(fleet.reps["r-m"], path=uris["m"], location=uris["m"])
    with Store.create(tmp_path / "fleet", 0) as index:
        index.put(
            [
                (Tenant(name, uri, uri), "1", signature(str(fleet.home(name)), 0))
                for name, uri in uris.items()
            ]
        )
    plan = fleet.plan()
    shutil.rmtree(folder)
    report = deploy(plan, tmp_path / "run")
    (item,) = report.adapters
    written = read_peft(tmp_path / "run" / item.name)
    assert item.how == "written"
    for name in "mn":
        assert report.tenants[name].known == "computed"
        error = distance(written, dense(fleet.factors[name]))
        assert report.tenants[name].error == pytest.approx(error, abs=1e-9)
    store.rm(f"/{tmp_path.name}", recursive=True)
    with pytest.raises(FileError):
        deploy(plan, tmp_path / "gone")


def test_real_adapters_of_another_dialect(corpus, tmp_path):
    fleet = Fleet(tmp_path)
    fleet.home = lambda name: corpus / "wyek1n__MLX-CLI" / name / "adapters.safetensors"
    for name in ("0000100", "0000200"):
        fleet.served[name] = Served("")
        fleet.group([name])
    plan = fleet.plan()
    report = adapterops.deploy(
        plan, engine="portable", served_base="Qwen/Qwen2.5-0.5B-Instruct", out=tmp_path / "run"
    )
    for item in report.adapters:
        (name,) = item.members
        original = adapterops.open_adapter(fleet.home(name))
        exact = {stem: original[stem].B @ original[stem].A for stem in original}
        written = read_peft_any(tmp_path / "run" / item.name)
        assert all(np.all(written[stem] == 0) for stem in written.keys() - exact.keys())
        error = distance({stem: written[stem] for stem in exact}, exact)
        assert report.tenants[name].error == pytest.approx(error, rel=1e-6)
        assert 1e-4 < error < 5e-3  # bfloat16
        file = open_adapter_file(tmp_path / "run" / item.name)
        assert not [o for o in judge(file, "portable") if o.severity != "note"]


def test_command_line(fleet, tmp_path):
    fleet.plan()
    arguments = ("deploy", "plan", "--engine", "vllm", "--served-base", BASE, "-o", "run")
    dry = run(*arguments, "--dry-run", cwd=tmp_path)
    assert "would be vllm, 3 adapters for 5 tenants" in dry.stdout
    done = run(*arguments, cwd=tmp_path)
    assert "1 adapter holds the fleet at 32; at 16 they lose at most" in done.stdout
    assert "VLLM_LORA_RESOLVER_CACHE_DIR=" in done.stdout and "no promise" in done.stdout
    shown = json.loads(run(*arguments, "--overwrite", "--json", cwd=tmp_path).stdout)
    assert shown["schema"] == "adapterops.deploy/1" and shown["output"] == "run"
    with Store.open(tmp_path / "fleet") as store:
        store.forget(["a"])
    assert "off-boarded" in run(*arguments, "--overwrite", cwd=tmp_path, code=4).stderr
    assert (tmp_path / "run" / "routes.json").is_file()
