"""check among adapters, of merged ones against their inputs, and of thousands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterops as ao
from adapterops.files.source import file_header
from tests.defects import PREFIX, kohya, llama, write_file


def codes(report: ao.CheckReport) -> list[str]:
    return sorted(finding.code for finding in report.findings)


def only(report: ao.CheckReport) -> ao.Finding:
    [finding] = report.findings
    return finding


# Duplicates.


def test_adapters_that_are_the_same(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        llama().write(tmp_path / name)
    llama(2).write(tmp_path / "other")
    report = ao.check(tmp_path, jobs=1)
    finding = only(report)
    assert finding.code == "duplicate" and finding.path == str(tmp_path / "a")
    assert all(str(tmp_path / name) in finding.message for name in "abc")
    assert "other" not in finding.message and report.between == (finding,)
    assert report.exit_code == 0 and report.clean == 4


def test_the_same_tensors_under_another_name_or_scale(tmp_path: Path) -> None:
    kohya().write(tmp_path, "a.safetensors")
    draft = kohya()
    draft.metadata["ss_output_name"] = "new"
    draft.write(tmp_path, "b.safetensors")
    assert only(ao.check(tmp_path, jobs=1)).code == "duplicate-tensors"
    draft.rename("lora_unet_down_blocks_1", "lora_unet_down_blocks_0")
    draft.write(tmp_path, "b.safetensors")
    assert only(ao.check(tmp_path, jobs=1)).code == "duplicate-tensors"


def test_another_alpha_makes_it_no_duplicate_of_files(tmp_path: Path) -> None:
    llama().write(tmp_path / "a")
    llama(lora_alpha=32).write(tmp_path / "b")
    assert only(ao.check(tmp_path, jobs=1)).code == "duplicate-tensors"


def test_the_same_factors_beside_another_head(tmp_path: Path) -> None:
    for name, value in (("a", 0.5), ("b", 0.25)):
        draft = llama(modules_to_save=["score"])
        draft.tensors[f"{PREFIX}score.weight"] = np.full((3, 64), value, np.float32)
        draft.write(tmp_path / name)
    finding = only(ao.check(tmp_path, jobs=1))
    assert finding.code == "duplicate-factors" and finding.severity == "note"


def test_sums_that_agree_are_no_proof(tmp_path: Path) -> None:
    """Rows of 8 bytes in another order have the same checksum, and are another adapter."""
    draft = kohya()
    draft.write(tmp_path, "a.safetensors")
    draft.map(lambda x: np.ascontiguousarray(x[::-1]), "lora_up")
    draft.write(tmp_path, "b.safetensors")
    assert ao.check(tmp_path, jobs=1).findings == ()


def test_files_that_differ_in_one_bit(tmp_path: Path) -> None:
    llama().write(tmp_path / "a")
    draft = llama()
    name = next(iter(draft.tensors))
    draft.tensors[name] = draft.tensors[name].copy()
    draft.tensors[name].view(np.uint16).flat[0] ^= 1
    draft.write(tmp_path / "b")
    assert ao.check(tmp_path, jobs=1).findings == ()


# Base names and ranks.


def test_one_base_name_with_two_shapes(tmp_path: Path) -> None:
    llama().write(tmp_path / "a")
    draft = llama(2)
    for name in draft.tensors:
        if "v_proj.lora_B" in name:
            draft.tensors[name] = np.tile(draft.tensors[name], (2, 1))
    draft.write(tmp_path / "b")
    report = ao.check(tmp_path, jobs=1)
    finding = only(report)
    assert finding.code == "base-conflict" and report.exit_code == 4
    assert "model.layers.*.self_attn.v_proj is 32 x 64 in one and 64 x 64" in finding.message
    draft.config["base_model_name_or_path"] = "meta-llama/other"
    draft.write(tmp_path / "b")
    assert ao.check(tmp_path, jobs=1).findings == ()


def test_a_grown_vocabulary_is_no_conflict(tmp_path: Path) -> None:
    for name, words in (("a", 96), ("b", 100)):
        draft = llama(words, target_modules=["q_proj", "v_proj", "down_proj", "lm_head"])
        for side, shape in (("A", (4, 64)), ("B", (words, 4))):
            x = np.random.default_rng(words).standard_normal(shape) * 0.01
            draft.tensors[f"{PREFIX}lm_head.lora_{side}.weight"] = x.astype(np.float16)
        draft.write(tmp_path / name)
    assert ao.check(tmp_path, jobs=1).findings == ()


def test_one_set_of_shapes_under_several_names(tmp_path: Path) -> None:
    names = ["meta-llama/Llama-3.2-1B", "unsloth/Llama-3.2-1B", "Llama-3.2-1B"]
    for number, name in enumerate(names):
        draft = llama(number, base_model_name_or_path=name)
        draft.write(tmp_path / str(number))
    finding = only(ao.check(tmp_path, jobs=1))
    assert finding.code == "base-aliases" and finding.severity == "note"
    assert all(repr(name) in finding.message for name in names)


def test_ranks_that_vllm_keeps_in_slots_of_the_largest(tmp_path: Path) -> None:
    for number, rank in enumerate((8, 8, 16)):
        llama(number, rank=rank).write(tmp_path / str(number))
    report = ao.check(tmp_path, engine="vllm", jobs=1)
    finding = only(report)
    assert finding.code == "mixed-ranks" and finding.path == str(tmp_path / "2")
    assert "ranks (adapters) 8 (2), 16 (1)" in finding.message
    assert finding.rule.startswith("vllm ")
    assert ao.check(tmp_path, engine="lorax", jobs=1).between == ()
    assert ao.check([tmp_path / "0", tmp_path / "1"], engine="vllm", jobs=1).findings == ()


# Many.


def test_two_thousand_files_in_one_check(tmp_path: Path) -> None:
    """In processes and here: the same findings, in the order of the names."""
    rng = np.random.default_rng(1)
    planted = {17: "non-finite", 500: "zero-adapter", 1234: "truncated", 1999: "alpha-zero"}
    for number in range(2000):
        stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
        tensors: dict[str, np.ndarray] = {
            f"{stem}.lora_down.weight": rng.standard_normal((2, 16)).astype(np.float16),
            f"{stem}.lora_up.weight": 0.01 * rng.standard_normal((16, 2)).astype(np.float16),
            f"{stem}.alpha": np.array(2.0, np.float16),
        }
        kind = planted.get(number)
        if kind == "non-finite":
            tensors[f"{stem}.lora_up.weight"][3, 1] = np.nan
        elif kind == "zero-adapter":
            tensors[f"{stem}.lora_up.weight"][...] = 0
        elif kind == "alpha-zero":
            tensors[f"{stem}.alpha"][...] = 0
        file = write_file(tmp_path / f"{number:04}.safetensors", tensors)
        if kind == "truncated":
            file.write_bytes(file.read_bytes()[:-1])
    shutil.copy(tmp_path / "0042.safetensors", tmp_path / "0043.safetensors")
    report = ao.check(tmp_path, jobs=2)
    assert len(report.adapters) == 2000 and report.exit_code == 3
    assert {
        int(Path(adapter.path).stem): adapter.findings[0].code
        for adapter in report.adapters
        if adapter.findings
    } == planted
    [duplicate] = report.between
    assert duplicate.code == "duplicate"
    assert "0042.safetensors" in duplicate.message and "0043.safetensors" in duplicate.message
    some = sorted(tmp_path.glob("*.safetensors"))[:60]
    assert ao.check(some, jobs=1).findings == tuple(
        finding for finding in report.findings if finding.path in set(map(str, some))
    )


# Provenance.


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """Two adapters in one folder, and what was merged of them in another."""
    for name, seed in (("a", 1), ("b", 2)):
        llama(seed, dtype=np.float32).write(tmp_path / "inputs" / name)
    ao.merge(
        [tmp_path / "inputs" / "a", tmp_path / "inputs" / "b"],
        [0.7, -0.3],
        out=tmp_path / "merged",
        rank=3,
        dtype="float16",
    )
    return tmp_path


def again(folder: Path, inputs: str = "inputs", path: str = "merged") -> ao.CheckReport:
    return ao.check(folder / path, recompute=True, inputs=folder / inputs, jobs=1)


def altered(folder: Path, change: float) -> None:
    """Change one value of the merged factors by a part of itself."""
    file = folder / "merged" / "adapter_model.safetensors"
    header = file_header(file)
    data = bytearray(file.read_bytes())
    name = next(name for name in header.tensors if "lora_B" in name)
    start = header.data_start + header.tensors[name].start
    values = np.frombuffer(data, np.float16, 16, start).copy()
    values *= np.float16(1.0 + change)
    data[start : start + 32] = values.tobytes()
    file.write_bytes(data)


def test_a_merge_is_computed_again(merged: Path) -> None:
    report = again(merged)
    assert only(report).code == "recompute-equal" and report.exit_code == 0
    assert not list(merged.glob(".*"))


def test_inputs_are_found_by_hash_whatever_they_are_called(merged: Path) -> None:
    (merged / "inputs" / "a").rename(merged / "inputs" / "x")
    (merged / "inputs" / "b").rename(merged / "inputs" / "a")
    deep = merged / "elsewhere" / "deep" / "b"
    deep.parent.mkdir(parents=True)
    (merged / "inputs" / "x").rename(deep)
    (merged / "inputs").rename(merged / "elsewhere" / "inputs")
    assert only(again(merged, "elsewhere")).code == "recompute-equal"


def test_an_adapter_that_was_changed_afterwards(merged: Path) -> None:
    altered(merged, 0.5)
    report = again(merged)
    finding = only(report)
    assert finding.code == "recompute-differs" and report.exit_code == 4
    assert "‖ΔW − ΔW′‖ / ‖ΔW‖ = 0.0" in finding.message


def test_differences_within_the_rounding_of_storage(merged: Path) -> None:
    altered(merged, 2.0**-10)
    report = again(merged)
    assert only(report).code == "recompute-close" and report.exit_code == 0


def test_inputs_that_are_not_there_are_named_by_hash(merged: Path) -> None:
    made = json.loads(
        file_header(merged / "merged" / "adapter_model.safetensors").metadata["adapterops"]
    )
    shutil.rmtree(merged / "inputs" / "b")
    report = again(merged)
    finding = only(report)
    assert finding.code == "recompute-inputs" and report.exit_code == 4
    assert made["inputs"][1]["sha256"] in finding.message
    assert made["inputs"][0]["sha256"] not in finding.message


def test_an_input_with_another_config_is_another_input(merged: Path) -> None:
    config = merged / "inputs" / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    assert only(again(merged)).code == "recompute-inputs"


def test_a_merge_into_one_file_with_a_given_alpha(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        kohya(seed, alpha=None if name == "a" else 2.0).write(tmp_path, f"{name}.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    out = tmp_path / "merged.safetensors"
    ao.merge(paths, [1, 0.5], out=out, rank=2, alpha={str(paths[0]): 16.0})
    report = ao.check(out, recompute=True, inputs=tmp_path, jobs=1)
    assert only(report).code == "recompute-equal"


def test_a_merge_with_an_alpha_that_wins(tmp_path: Path) -> None:
    """Given to one path it replaces what the file says; the record holds the number only."""
    llama().write(tmp_path / "a")
    out = tmp_path / "merged"
    ao.merge([tmp_path / "a"], out=out, rank=2, alpha={str(tmp_path / "a"): 32.0})
    report = ao.check(out, recompute=True, inputs=tmp_path, jobs=1)
    assert only(report).code == "recompute-equal"


def test_a_head_that_was_exchanged(tmp_path: Path) -> None:
    draft = llama(modules_to_save=["score"])
    draft.tensors[f"{PREFIX}score.weight"] = np.full((3, 64), 0.5, np.float32)
    draft.write(tmp_path / "a")
    ao.merge([tmp_path / "a"], out=tmp_path / "merged", rank=2)
    file = tmp_path / "merged" / "adapter_model.safetensors"
    header = file_header(file)
    data = bytearray(file.read_bytes())
    start = header.data_start + header.tensors[f"{PREFIX}score.weight"].start
    data[start : start + 4] = np.float32(0.25).tobytes()
    file.write_bytes(data)
    report = ao.check(tmp_path / "merged", recompute=True, inputs=tmp_path, jobs=1)
    finding = only(report)
    assert finding.code == "recompute-differs" and "score.weight" in finding.message


def test_what_cannot_be_computed_again(merged: Path) -> None:
    report = again(merged, path="inputs/a")
    assert codes(report) == ["recompute-none"] and report.exit_code == 0
    file = merged / "merged" / "adapter_model.safetensors"
    data = file.read_bytes()
    for old, new, said in (
        (b'\\"verb\\":\\"merge\\"', b'\\"verb\\":\\"bakes\\"', "was made by 'bakes'"),
        (b'\\"rank\\":3', b'\\"tank\\":3', "cannot repeat"),
        (b'\\"weight\\":0.7', b'\\"weighs\\":0.7', "damaged"),
    ):
        assert data.count(old) == 1, old
        file.write_bytes(data.replace(old, new))
        report = again(merged)
        finding = only(report)
        assert finding.code == "recompute-failed" and report.exit_code == 4
        assert said in finding.message


def test_an_unreadable_adapter_is_not_computed(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"")
    report = ao.check(tmp_path / "x.safetensors", recompute=True, inputs=tmp_path)
    assert codes(report) == ["truncated"]


def test_one_bad_adapter_does_not_stop_the_rest(tmp_path: Path) -> None:
    llama().write(tmp_path / "a")
    llama(2).write(tmp_path / "b")
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    report = ao.check(tmp_path, jobs=1)
    assert [adapter.worst for adapter in report.adapters] == ["error", None]
    assert report.exit_code == 3


def test_what_fails_between_adapters_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapterops.checking import sets
    from adapterops.errors import ChangedError

    def fails(item: Any) -> Any:
        raise ChangedError("changed while being read", path=item.path)

    for name in "ab":
        llama().write(tmp_path / name)
    monkeypatch.setattr(sets, "_hashes", fails)
    report = ao.check(tmp_path, jobs=1)
    assert only(report).code == "unreadable" and report.exit_code == 6
