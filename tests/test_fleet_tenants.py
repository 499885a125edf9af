"""Who is a tenant: relative paths, patterns, manifests, on disk and in a bucket."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest

from adapterops.errors import FileError, FormatError, UsageError
from adapterops.files.header import encode_header, layout, parse_header
from adapterops.files.remote import Entry
from adapterops.files.source import MemoryFile
from adapterops.fleet.tenants.finding import check_adapter, find_tenants
from adapterops.fleet.tenants.search import Pattern, RemoteTree, adapters_in

NAMES = (
    "acme/v1/adapter_model.safetensors",
    "acme/v1/adapter_config.json",
    "acme/v1/checkpoint-500/adapter_model.safetensors",
    "beta/v1/checkpoint-20/adapter_model.safetensors",
    "beta/v1/trainer_state.json",
    "gamma/last/adapter_config.json",
    "gamma/last/optimizer.pt",
    "single.safetensors",
    "loose/model-00001-of-00002.safetensors",
    "loose/training_args.bin",
    ".cache/adapter_model.safetensors",
)


def fill(root: str, names: tuple[str, ...] = NAMES) -> None:
    fs, path = fsspec.core.url_to_fs(root)
    for name in names:
        fs.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
        fs.pipe_file(f"{path}/{name}", b"x")


@pytest.fixture(params=["disk", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder and a bucket with the same files."""
    where = os.fspath(tmp_path) if request.param == "disk" else f"memory://{tmp_path.name}"
    fill(where)
    return where


def names(found: list) -> list[tuple[str, str]]:
    return [(tenant.name, tenant.location) for tenant in found]


def test_without_manifest_or_pattern_the_relative_path_is_the_tenant(root):
    notes: list[str] = []
    found = find_tenants(root, note=notes.append)
    assert names(found) == [
        (name, f"{root}/{name}") for name in ("acme/v1", "gamma/last", "single.safetensors")
    ]
    assert all(tenant.traffic == 1 and tenant.path == tenant.location for tenant in found)
    assert notes == [
        "1 checkpoint-* passed over; list them in a manifest to count them",
        "2 files of base models or trainers passed over",
    ]


@pytest.mark.parametrize("name", ["acme/v1", "single.safetensors"])
def test_a_root_that_is_one_adapter_is_one_tenant(root, name):
    found = find_tenants(f"{root}/{name}")
    assert names(found) == [(name.rpartition("/")[2], f"{root}/{name}")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{tenant}/*/adapter_model.safetensors", {"acme": "acme/v1"}),
        ("{tenant}/v1", {"acme": "acme/v1"}),
        ("{tenant}/*", {"acme": "acme/v1", "gamma": "gamma/last"}),
        ("{tenant}.safetensors", {"single": "single.safetensors"}),
        ("a{tenant}/v*", {"cme": "acme/v1"}),
        ("{tenant}/v1/checkpoint-*/adapter_model.safetensors",
         {"acme": "acme/v1/checkpoint-500", "beta": "beta/v1/checkpoint-20"}),
        ("*/v1/checkpoint-{tenant}", {"500": "acme/v1/checkpoint-500",
                                      "20": "beta/v1/checkpoint-20"}),
        (".cache/{tenant}.safetensors", {"adapter_model": ".cache/adapter_model.safetensors"}),
        ("loose/{tenant}.bin", None),
        ("{tenant}/*/*/adapter_model.safetensors", None),
        ("{tenant}/adapter_model.safetensor", None),
    ],
)  # fmt: skip
def test_a_pattern_names_the_tenants(root, pattern, expected):
    if expected is None:
        with pytest.raises(FileError, match="nothing below it matches"):
            find_tenants(root, pattern=pattern)
        return
    found = find_tenants(root, pattern=pattern)
    assert names(found) == sorted((name, f"{root}/{place}") for name, place in expected.items())


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("*/adapter_model.safetensors", "0 times"),
        ("{tenant}/{tenant}", "2 times"),
        ("{tenant}/**/x.safetensors", "one part"),
        ("{tenant}/{version}/x.safetensors", "a brace"),
        ("/data/{tenant}", "absolute"),
        ("../{tenant}", "'..'"),
        ("{tenant}//x.safetensors", "empty part"),
        ("", "0 times"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(pattern, words):
    with pytest.raises(UsageError, match=words):
        Pattern(pattern)


def test_two_adapters_of_one_tenant_are_named(root):
    fill(root, ("acme/v2/adapter_model.safetensors",))
    with pytest.raises(UsageError) as caught:
        find_tenants(root, pattern="{tenant}/*/adapter_model.safetensors")
    assert "'acme' has two adapters" in str(caught.value)
    assert f"{root}/acme/v1 and {root}/acme/v2" in str(caught.value)


def test_two_roots_with_the_same_tenant_are_named(tmp_path):
    for name in ("a", "b"):
        fill(os.fspath(tmp_path / name), ("x/adapter_model.safetensors",))
    with pytest.raises(UsageError, match=r"a/x and .*b/x"):
        find_tenants([tmp_path / "a", tmp_path / "b"])


def test_nothing_there_is_an_error(root, tmp_path):
    with pytest.raises(FileError):
        find_tenants(f"{root}/none")
    with pytest.raises(FileError, match="no adapter in it"):
        find_tenants(f"{root}/loose")
    with pytest.raises(UsageError, match="no input"):
        find_tenants()


def test_two_tenants_may_be_links_to_one_adapter(tmp_path):
    fill(os.fspath(tmp_path), ("store/a/adapter_model.safetensors",))
    (tmp_path / "one").symlink_to(tmp_path / "store" / "a")
    (tmp_path / "two").symlink_to(tmp_path / "store" / "a")
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    notes: list[str] = []
    found = find_tenants(tmp_path, note=notes.append)
    assert [tenant.name for tenant in found] == ["one", "store/a", "two"]
    assert len(notes) == 1 and "entered once" in notes[0]


def test_indexes_plans_and_deployments_are_not_searched(root):
    ours = ("fleet/fleet.sqlite", "plan/plan.json", "plan/sketches.safetensors")
    deployed = ("run/routes.json", "run/adapterops.json", "run/lora-1/adapter_model.safetensors")
    inner = ("fleet/signatures/1.safetensors", "plan/representatives/1/adapter_model.safetensors")
    fill(root, (*ours, *deployed, *inner, "plan.json/adapter_model.safetensors"))
    notes: list[str] = []
    found = find_tenants(root, note=notes.append)
    assert [tenant.name for tenant in found] == [
        "acme/v1", "gamma/last", "plan.json", "single.safetensors"
    ]  # fmt: skip
    assert sorted(notes)[2:] == [
        f"{name}: an index, plan or deployment of adapterops, passed over"
        for name in ("fleet", "plan", "run")
    ]


def test_adapters_inside_others_are_spoken_of(root):
    fill(root, ("acme/v1/second/adapter_model.safetensors", "acme/v1/runs/log.txt"))
    notes: list[str] = []
    assert len(find_tenants(root, note=notes.append)) == 3
    assert notes[2:] == [
        "1 adapters inside the folders of others passed over, 'acme/v1/second' first; list them in "
        "a manifest to count them"
    ]


def test_a_folder_that_goes_while_it_is_searched_is_passed_over(tmp_path, monkeypatch):
    fill(os.fspath(tmp_path), ("a/adapter_model.safetensors", "b/c/adapter_model.safetensors"))
    real = os.stat

    def stat(path, *args, **options):
        if os.fspath(path).endswith("/b"):
            raise FileNotFoundError(2, "gone", path)
        return real(path, *args, **options)

    monkeypatch.setattr("adapterops.fleet.tenants.search.os.stat", stat)
    assert [tenant.name for tenant in find_tenants(tmp_path)] == ["a"]


def test_relative_roots_keep_the_path_as_it_was_given(tmp_path, monkeypatch):
    fill(os.fspath(tmp_path))
    monkeypatch.chdir(tmp_path)
    for given, path in ((".", "acme/v1"), ("acme", "acme/v1"), ("acme/", "acme/v1")):
        tenant = find_tenants(given)[0]
        assert tenant.path == path
        assert tenant.location == os.fspath(tmp_path / "acme" / "v1")


def test_a_name_that_is_not_utf8_is_passed_over(tmp_path):
    fill(os.fspath(tmp_path), ("good/adapter_model.safetensors",))
    os.makedirs(os.fsencode(tmp_path) + b"/bad\xff")
    open(os.fsencode(tmp_path) + b"/bad\xff/adapter_model.safetensors", "wb").close()
    notes: list[str] = []
    assert [t.name for t in find_tenants(tmp_path, note=notes.append)] == ["good"]
    assert len(notes) == 1 and "not UTF-8" in notes[0]


def test_a_folder_that_cannot_be_read_is_a_tenant_that_says_so(tmp_path, monkeypatch):
    fill(os.fspath(tmp_path), ("a/adapter_model.safetensors", "shut/x"))
    real = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert [tenant.name for tenant in find_tenants(tmp_path)] == ["a", "shut"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "bom"])
def test_a_manifest_lists_the_tenants(tmp_path, newline, mark):
    lines = [
        "path,tenant,traffic",
        "b/x,beta,2.5",
        "",
        ' /abs/a , "acme, inc." ,',
        "s3://bucket/c,checkpoint-5,0",
    ]
    manifest = tmp_path / "lists" / "tenants.csv"
    manifest.parent.mkdir()
    # A quoted field must end where the field does.
    text = (mark + newline.join(lines)).replace('inc." ', 'inc."')
    manifest.write_bytes(text.encode())
    found = find_tenants(manifest=manifest)
    assert [(t.name, t.path, t.location, t.traffic) for t in found] == [
        ("acme, inc.", "/abs/a", "/abs/a", 1.0),
        ("beta", "b/x", os.fspath(manifest.parent / "b" / "x"), 2.5),
        ("checkpoint-5", "s3://bucket/c", "s3://bucket/c", 0.0),
    ]


def test_a_manifest_may_lie_in_a_bucket(tmp_path):
    fs, path = fsspec.core.url_to_fs(f"memory://{tmp_path.name}")
    fs.pipe_file(f"{path}/lists/tenants.csv", b"tenant,path\na,one\nb,/two\n")
    found = find_tenants(manifest=f"memory://{tmp_path.name}/lists/tenants.csv")
    assert [tenant.location for tenant in found] == [
        f"memory://{tmp_path.name}/lists/one",
        "/two",
    ]
    with pytest.raises(FileError, match="no such file"):
        find_tenants(manifest=f"memory://{tmp_path.name}/lists/none.csv")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"a,x\nb,y\n", "begin it with the header"),
        (b"tenant,path,trafic\na,x,1\n", "tenant,path,trafic"),
        (b"tenant,tenant,path\na,b,x\n", "begin it with the header"),
        (b"", "lists no tenant"),
        (b"tenant,path\n", "lists no tenant"),
        (b"tenant,path\na\n", "line 2 of the manifest has 1 fields, the header 2"),
        (b"tenant,path\na,x\n,y\n", "line 3 of the manifest has no tenant"),
        (b"tenant,path\na,\n", "line 2 of the manifest has no path"),
        (b"tenant,path,traffic\na,x,-1\n", "'-1', no number"),
        (b"tenant,path,traffic\na,x,nan\n", "'nan', no number"),
        (b"tenant,path,traffic\na,x,inf\n", "'inf', no number"),
        (b"tenant,path,traffic\na,x,much\n", "'much', no number"),
        (b"tenant,path\na,x\xff\n", "line 2 of the manifest is not UTF-8"),
        (b"tenant,path\na,\0\n", "line 2 of the manifest"),
        (b'tenant,path\n"a"b,x\n', "is no CSV"),
        (b"tenant,path\na,x\na,y\n", "'a' has two adapters, x and y"),
    ],
)
def test_bad_manifests_are_refused_with_the_line(tmp_path, text, words):
    manifest = tmp_path / "tenants.csv"
    manifest.write_bytes(text)
    with pytest.raises(UsageError) as caught:
        find_tenants(manifest=manifest)
    assert words in str(caught.value)


def test_a_manifest_stands_alone(tmp_path):
    manifest = tmp_path / "tenants.csv"
    manifest.write_text("tenant,path\na,x\n")
    for more in ({"root": tmp_path}, {"pattern": "{tenant}/x"}):
        with pytest.raises(UsageError, match="give no PATH"):
            find_tenants(manifest=manifest, **more)
    with pytest.raises(FileError, match="no such file"):
        find_tenants(manifest=tmp_path / "none.csv")


def test_hostile_keys_are_passed_over_and_named():
    keys = ("good/adapter_model.safetensors", "../up/adapter_model.safetensors",
            "/etc/adapter_model.safetensors", "a//adapter_model.safetensors",
            "a\\b/adapter_model.safetensors", "c/\n/adapter_model.safetensors")  # fmt: skip
    notes: list[str] = []
    entries = [Entry(f"s3://bucket/{key}", 1, "") for key in keys]
    tree = RemoteTree("s3://bucket", [*entries, Entry("s3://other/x", 1, "")], notes.append)
    assert list(adapters_in(tree)) == ["good"]
    assert list(Pattern("{tenant}/*").adapters_in(tree)) == [("good", "good")]
    assert len(notes) == 1 and "6 keys passed over" in notes[0] and "'s3://bucket/../up" in notes[0]


def test_only_headers_that_name_a_factor_are_an_adapters():
    def header(*tensors: str) -> tuple[MemoryFile, object]:
        entries = layout(dict.fromkeys(tensors, ("F32", (2, 2))))
        raw = encode_header(entries, {})
        size = len(raw) + sum(entry.nbytes for entry in entries.values())
        return MemoryFile("x", raw), parse_header(raw[8:], size, "x")

    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    check_adapter(*header(f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"))
    check_adapter(*header("lora_unet_a.lora_up.weight", "lora_unet_a.lora_down.weight"))
    for tensors in (("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"), ()):
        with pytest.raises(FormatError, match="is not a LoRA adapter"):
            check_adapter(*header(*tensors))
