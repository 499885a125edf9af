"""Representatives: which is chosen and why, what it holds, and that it names nobody."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from adapterops.errors import AdapterOpsError, OutputExistsError
from adapterops.fleet.representing import minimax
from adapterops.fleet.representing.representative import Chosen, choose
from adapterops.fleet.types import Record, Tenant
from adapterops.fleet.verifying.exact import Error
from adapterops.formats import open_adapter_file
from adapterops.stream import Compute
from tests.support import (
    distance,
    load_file,
    pairs,
    read_kohya,
    read_peft,
    weighted,
    write_kohya,
    write_peft,
)

SHAPES = {
    "model.layers.0.self_attn.q_proj": (32, 24),
    "model.layers.0.mlp.up_proj": (40, 24),
    "model.layers.1.self_attn.q_proj": (32, 24),
}
COMMON = pairs(0, SHAPES, 4)


def fork(seed, noise, *, size=1.0, rank=4):
    """The common adapter with noise of this relative size in B, times `size`."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, (B, A) in COMMON.items():
        moved = size * (B + noise * 0.1 * rng.standard_normal(B.shape))
        more = rank - B.shape[1]
        made[name] = (
            np.hstack([moved, np.zeros((len(B), more))]).astype(np.float32),
            np.vstack([A, np.ones((more, A.shape[1]))]).astype(np.float32),
        )
    return made


def record(name, path, *, traffic=1.0):
    """What `index` would say of the adapter at `path`."""
    file = open_adapter_file(path)
    squares = [
        np.sum((site.scale * (site.factors()[0] @ site.factors()[1])) ** 2)
        for site in file.sites.values()
    ]
    weights = Path(file.weights_file)
    return Record(
        tenant=Tenant(name, str(path), str(path), traffic),
        version="",
        status="ok",
        reason="",
        content=hashlib.sha256(weights.read_bytes()).hexdigest(),
        extras="",
        base=file.base or "",
        dialect=file.dialect,
        dtype="float32",
        size=weights.stat().st_size,
        rank=file.rank,
        needed=(file.rank, file.rank),
        norm=float(np.sqrt(np.sum(squares))),
    )


def fleet(folder, members, **options):
    """Records of PEFT tenants: name -> factors, or (factors, traffic)."""
    found = []
    for name, given in members.items():
        factors, traffic = given if isinstance(given, tuple) else (given, 1.0)
        found.append(
            record(name, write_peft(folder / name / "v3", factors, **options), traffic=traffic)
        )
    return found


def several(count, noise=0.4, **options):
    return {f"tenant-{n}": fork(n + 1, noise, **options) for n in range(count)}


def chosen(records, out, **options) -> Chosen:
    options = {"on": Compute(), **options}
    return choose(records[0], records, out=out, **options)


def check_measured(made, records, written):
    """The errors are those of what is written, by the dense oracle."""
    assert set(made.errors) == {r.tenant.name for r in records}
    for each in records:
        own = read_peft_of(each)
        error = made.errors[each.tenant.name]
        assert isinstance(error, Error)
        assert error.error == pytest.approx(distance(written, own), rel=1e-6)
    assert made.largest == max(error.error for error in made.errors.values())


def read_peft_of(each):
    folder = Path(each.tenant.location)
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    result = {}
    for key, B in tensors.items():
        if key.endswith(".lora_B.weight"):
            stem = key.removesuffix(".lora_B.weight")
            A = tensors[f"{stem}.lora_A.weight"].astype(float)
            scale = config["lora_alpha"] / config["r"]
            result[stem.removeprefix("base_model.model.")] = scale * (B.astype(float) @ A)
    return result


def test_an_average_serves_where_it_gains(tmp_path):
    records = fleet(tmp_path, several(5))
    made = chosen(records, tmp_path / "rep")
    assert made.kind == "minimax" and made.path == str(tmp_path / "rep")
    assert made.rank == 4 and made.dtype == "float32"
    check_measured(made, records, read_peft(tmp_path / "rep"))
    original = choose(records[0], records, out=tmp_path / "no", on=Compute(), kinds=("medoid",))
    assert made.largest < 0.9 * original.largest
    assert 0 < made.bound <= made.largest
    assert made.size == (tmp_path / "rep" / "adapter_model.safetensors").stat().st_size
    assert f"{made.largest:.3g}" in made.reason and f"{original.largest:.3g}" in made.reason
    assert original.kind == "medoid" and original.path == "" and original.size == records[0].size
    assert not (tmp_path / "no").exists()


def test_mean_is_weighted_by_traffic_over_squared_norm(tmp_path):
    members = {
        "a": (fork(1, 0.5), 5.0),
        "b": (fork(2, 0.5, size=2.0), 1.0),
        "c": (fork(3, 0.5, size=0.5), 0.0),
    }
    records = fleet(tmp_path, members)
    made = chosen(records, tmp_path / "rep", kinds=("mean",))
    assert made.kind == "mean" and made.holds == ("a", "b")  # no traffic, no say
    weights = [r.tenant.traffic / r.norm**2 for r in records]
    expected = weighted(
        *((w / sum(weights), read_peft_of(r)) for w, r in zip(weights, records, strict=True))
    )
    assert distance(read_peft(tmp_path / "rep"), expected) < 1e-5  # one A: of rank 4 itself
    check_measured(made, records, read_peft(tmp_path / "rep"))


def test_without_traffic_all_count_alike(tmp_path):
    records = fleet(tmp_path, {n: (fork(i, 0.5), 0.0) for i, n in enumerate("abc")})
    assert chosen(records, tmp_path / "rep", kinds=("mean",)).holds == ("a", "b", "c")


def test_minimax_is_better_than_mean_for_the_outlier(tmp_path):
    members = {f"t{n}": fork(9, 0.01 * n) for n in range(6)} | {"far": fork(5, 0.8)}
    records = fleet(tmp_path, members)
    mean = chosen(records, tmp_path / "mean", kinds=("mean",))
    made = chosen(records, tmp_path / "best", kinds=("mean", "minimax"))
    assert made.kind == "minimax"
    assert made.largest < 0.8 * mean.largest
    assert mean.bound <= mean.largest and made.bound == pytest.approx(mean.bound, rel=1e-6)


def test_mean_is_preferred_where_it_is_as_good(tmp_path):
    """Two members of one norm: the middle is both."""
    records = fleet(tmp_path, several(2))
    records = [records[0], record("again", records[1].tenant.path)]
    first, second = (r.norm for r in records)
    assert abs(first - second) < 0.2 * first
    made = chosen(records, tmp_path / "rep")
    assert made.kind in ("mean", "minimax")
    mean = chosen(records, tmp_path / "mean", kinds=("mean",))
    assert made.largest <= mean.largest * (1 + 1e-6)
    assert (made.kind == "mean") == (mean.largest <= 1.01 * made.bound)


@pytest.mark.parametrize("noise", [0.0, 5e-4])
def test_duplicates_keep_an_original(tmp_path, noise):
    records = fleet(tmp_path, several(3, noise=noise))
    made = chosen(records, tmp_path / "rep")
    assert made.kind == "medoid" and "differ from it by at most" in made.reason
    assert not (tmp_path / "rep").exists()


def test_one_member_is_an_original(tmp_path):
    records = fleet(tmp_path, several(1))
    made = chosen(records, tmp_path / "rep")
    assert made.kind == "original" and made.holds == ("tenant-0",) and made.largest == 0.0
    assert not (tmp_path / "rep").exists()


def test_small_gain_keeps_the_original(tmp_path):
    """One per cent away from each other: an average would be half as far, which nobody notices."""
    records = fleet(tmp_path, several(3, noise=0.01))
    made = chosen(records, tmp_path / "rep")
    assert made.kind == "medoid" and "not worth a new file" in made.reason
    assert not (tmp_path / "rep").exists()
    bound = 0.9 * made.largest
    kept = chosen(records, tmp_path / "rep", max_error=bound)
    assert kept.kind != "medoid" and kept.largest <= bound  # the original does not keep it


def test_large_error_small_gain_keeps_the_original(tmp_path):
    """The center lies in the middle already, so an average gains hardly anything."""
    near = {f"t{n}": fork(n + 1, 0.4) for n in range(2)}
    middle = {
        name: (
            sum(near[t][name][0] for t in near) / 2,
            near["t0"][name][1],
        )
        for name in COMMON
    }
    records = fleet(tmp_path, {"middle": middle, **near})
    made = chosen(records, tmp_path / "rep")
    assert made.kind == "medoid" and made.center == "middle" and made.largest > 0.1
    assert made.reason.startswith("an original: ")


def test_only_the_allowed_are_averaged_in(tmp_path):
    members = several(3) | {"private": fork(9, 0.4)}
    records = fleet(tmp_path, members)
    made = chosen(records, tmp_path / "rep", allowed={"tenant-0", "tenant-1", "tenant-2"})
    assert made.kind != "medoid" and "private" not in made.holds
    check_measured(made, records, read_peft(tmp_path / "rep"))  # but it is served, and measured
    chosen(records[:3], tmp_path / "without")
    assert load_bytes(tmp_path / "rep") == load_bytes(tmp_path / "without")
    secret = hashlib.sha256((tmp_path / "private/v3/adapter_model.safetensors").read_bytes())
    for file in (tmp_path / "rep").iterdir():
        assert secret.hexdigest()[:16].encode() not in file.read_bytes()


def load_bytes(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("allowed", [set(), {"tenant-1"}])
def test_too_few_to_average(tmp_path, allowed):
    records = fleet(tmp_path, several(3))
    made = chosen(records, tmp_path / "rep", allowed=allowed)
    assert made.kind == "medoid" and f"only {len(allowed)} may be averaged" in made.reason


@pytest.mark.parametrize(("rank", "expected"), [(None, 6), ("same", 6), (2, 2), (8, 8)])
def test_rank(tmp_path, rank, expected):
    records = fleet(tmp_path, {"a": fork(1, 0.6), "b": fork(2, 0.6, rank=6), "c": fork(3, 0.6)})
    made = chosen(records, tmp_path / "rep", rank=rank, kinds=("minimax",))
    assert made.rank == expected
    config = json.loads((tmp_path / "rep" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == expected and not config["rank_pattern"]
    check_measured(made, records, read_peft(tmp_path / "rep"))


def test_too_large_for_minimax_is_a_mean(tmp_path, monkeypatch):
    monkeypatch.setattr(minimax, "LARGEST", 12)
    records = fleet(tmp_path, several(4))
    made = chosen(records, tmp_path / "rep")
    assert made.kind == "mean" and made.bound is None
    assert "add up to 16" in made.reason and "up to 12" in made.reason


def test_average_without_a_forecast_is_removed_where_it_does_not_gain(tmp_path, monkeypatch):
    monkeypatch.setattr(minimax, "LARGEST", 1)
    records = fleet(tmp_path, several(3, noise=0.01))
    made = chosen(records, tmp_path / "rep")
    assert made.kind == "medoid" and made.path == ""
    assert not (tmp_path / "rep").exists()


def test_bytes_depend_on_contents_alone(tmp_path):
    members = several(4)
    first = fleet(tmp_path / "one", members)
    others = dict(zip(("zeta", "eta", "beta", "alpha"), members.values(), strict=True))
    second = fleet(tmp_path / "two", others)
    chosen(first, tmp_path / "a")
    chosen(second[::-1], tmp_path / "b", on=Compute(threads=1, memory=1 << 20))
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


LEAKS = ("acme", "globex", "initech", "v3", "secret")


def check_nameless(paths, *more):
    for path in paths:
        content = path.read_bytes()
        for word in (*LEAKS, *more):
            assert word.encode() not in content, f"{path.name} says {word}"


def test_peft_output_names_nobody(tmp_path):
    records = []
    for n, name in enumerate(("acme", "globex", "initech")):
        folder = write_peft(
            tmp_path / name / "v3",
            fork(n, 0.4),
            base_model_name_or_path=f"/home/{name}/models/llama",
            task_type="CAUSAL_LM",
            revision=f"{name}-secret",
            custom={"owner": name},
        )
        (folder / "tokenizer_config.json").write_text(json.dumps({"name_or_path": name}))
        (folder / "README.md").write_text(f"# {name}")
        records.append(record(name, folder))
    made = chosen(records, tmp_path / "rep")
    assert made.kind == "minimax"
    files = sorted(path.name for path in (tmp_path / "rep").iterdir())
    expected = ["README.md", "adapter_config.json", "adapter_model.safetensors", "adapterops.json"]
    assert files == expected
    check_nameless((tmp_path / "rep").iterdir(), str(tmp_path))
    config = json.loads((tmp_path / "rep" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "llama" and config["task_type"] == "CAUSAL_LM"
    sidecar = json.loads((tmp_path / "rep" / "adapterops.json").read_text())
    inputs = {entry["sha256"] for entry in sidecar["provenance"]["inputs"]}
    assert inputs == {record.content for record in records}
    assert sidecar["provenance"]["options"]["representative"] == "minimax"


def test_commonest_public_base_is_written(tmp_path):
    records = fleet(tmp_path, several(3))
    for each, base in zip(records, ("org/base", "org/base", "C:\\acme\\base"), strict=True):
        path = Path(each.tenant.location) / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "base_model_name_or_path": base}))
    chosen(records, tmp_path / "rep")
    config = json.loads((tmp_path / "rep" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    check_nameless((tmp_path / "rep").iterdir())


def test_kohya_output_names_nobody(tmp_path):
    records = []
    for n, name in enumerate(("acme", "globex", "initech")):
        factors = {f"lora_unet_{k.replace('.', '_')}": v for k, v in fork(n, 0.4).items()}
        metadata = {
            "ss_output_name": name,
            "ss_training_comment": "secret",
            "ss_sd_model_name": f"/data/{name}/sd.safetensors",
            "ss_base_model_version": "sd_v1",
            "ss_dataset_dirs": json.dumps({f"/data/{name}": {}}),
            "modelspec.author": name,
        }
        file = write_kohya(tmp_path / f"{name}.safetensors", factors, alpha=2, metadata=metadata)
        records.append(record(name, file))
    made = chosen(records, tmp_path / "rep")
    assert made.kind == "minimax" and made.path == str(tmp_path / "rep.safetensors")
    written = [tmp_path / "rep.safetensors", tmp_path / "rep.adapterops.json"]
    check_nameless(written, str(tmp_path))
    assert open_adapter_file(made.path).metadata["ss_base_model_version"] == "sd_v1"
    for each in records:
        error = distance(read_kohya(written[0]), read_kohya(Path(each.tenant.path)))
        assert made.errors[each.tenant.name].error == pytest.approx(error, rel=1e-6)


def test_extras_are_carried_once(tmp_path):
    head = np.arange(6, dtype=np.float32).reshape(2, 3)
    name = "base_model.model.score.weight"
    options = {"extras": {name: head}, "modules_to_save": ["score"], "task_type": "SEQ_CLS"}
    records = fleet(tmp_path, several(3), **options)
    made = chosen(records, tmp_path / "rep")
    assert made.kind == "minimax"
    tensors = load_file(tmp_path / "rep" / "adapter_model.safetensors")
    np.testing.assert_array_equal(tensors[name], head)


def test_extras_that_differ_keep_the_original(tmp_path):
    records = fleet(tmp_path / "a", several(2))
    name = "base_model.model.score.weight"
    for n, each in enumerate(records):
        path = Path(each.tenant.location) / "adapter_model.safetensors"
        save_file({**load_file(path), name: np.full((2, 3), n, np.float32)}, path)
    made = chosen(records, tmp_path / "rep")
    assert made.kind == "medoid" and "no average could be made" in made.reason
    assert not (tmp_path / "rep").exists()


def test_what_a_format_cannot_hold_keeps_the_original(tmp_path):
    members = several(2)
    for factors in members.values():
        for name, (B, A) in factors.items():
            factors[name] = (B * 1e6, A * 1e6)
    made = chosen(fleet(tmp_path, members), tmp_path / "rep", dtype="float16")
    assert made.kind == "medoid" and "float16" in made.reason
    assert not (tmp_path / "rep").exists()


def test_stored_as_most_members_are(tmp_path):
    def halved(factors):
        return {k: (B.astype(np.float16), A.astype(np.float16)) for k, (B, A) in factors.items()}

    members = several(3)
    records = fleet(tmp_path, {n: halved(f) if n != "tenant-1" else f for n, f in members.items()})
    made = chosen(records, tmp_path / "rep", kinds=("minimax",))
    assert made.dtype == "float16"
    check_measured(made, records, read_peft(tmp_path / "rep"))
    other = chosen(records, tmp_path / "other", kinds=("minimax",), dtype="bfloat16")
    assert other.dtype == "bfloat16"


def test_member_that_cannot_be_read(tmp_path):
    records = fleet(tmp_path, several(4))
    gone = Path(records[2].tenant.location) / "adapter_model.safetensors"
    gone.unlink()
    made = chosen(records, tmp_path / "rep")
    assert isinstance(made.errors["tenant-2"], AdapterOpsError)
    assert made.kind == "minimax" and "tenant-2" not in made.holds and np.isfinite(made.largest)
    (Path(records[0].tenant.location) / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterOpsError, match="tenant-0"):
        chosen(records, tmp_path / "again")


def test_without_medoid_an_average_is_taken(tmp_path):
    records = fleet(tmp_path, several(3, noise=0.005))
    made = chosen(records, tmp_path / "rep", kinds=("mean", "minimax"))
    assert made.kind in ("mean", "minimax") and (tmp_path / "rep").is_dir()


def test_output_that_exists(tmp_path):
    (tmp_path / "rep").mkdir()
    (tmp_path / "rep" / "mine").write_text("keep")
    with pytest.raises(OutputExistsError):
        chosen(fleet(tmp_path, several(3)), tmp_path / "rep")
    assert (tmp_path / "rep" / "mine").read_text() == "keep"
