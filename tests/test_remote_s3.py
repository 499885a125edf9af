"""Adapters in a bucket: s3fs against an S3 server on loopback that misbehaves on request."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapterops.errors import ChangedError, FileError, FormatError
from adapterops.files import patience
from adapterops.files.objects import Store
from adapterops.files.remote import listing, located
from adapterops.fleet.tenants.finding import check_adapter, find_tenants
from adapterops.formats import open_adapter_file
from tests.remote_adapters import adapter, large
from tests.s3_server import Server, needs_server, serving

pytestmark = needs_server


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short pauses, and a TMPDIR of the test's own, which is empty afterwards."""
    monkeypatch.setattr(patience, "PAUSES", (0.01, 0.02))
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(folder))
    yield
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An S3 server for the tests of this file; each uses buckets of its own."""
    with serving(tmp_path_factory.mktemp("s3")) as found, pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment.items():
            patch.setenv(name, value)
        yield found


@pytest.fixture
def bucket(server: Server, tmp_path: Path) -> str:
    """The URI of a new bucket, served without faults."""
    name = f"bucket-{tmp_path.name.replace('_', '-')}"[:60].strip("-").lower()
    (server.folder / name).mkdir()
    server.control(throttle=0, broken=0, delay=0, vanish=-1, change="", after=0)
    return f"s3://{name}"


def stored(server: Server, bucket: str) -> Path:
    """Where the server keeps a bucket."""
    return server.folder / bucket.removeprefix("s3://")


def test_found_and_fetched_with_few_requests(server, bucket, tmp_path):
    for name in ("acme/v1", "beta/v1"):
        adapter(stored(server, bucket) / name)
    large(stored(server, bucket) / "gamma" / "v1", 18)
    server.control(delay=0)
    found = find_tenants(bucket, pattern="{tenant}/*/adapter_model.safetensors")
    assert [tenant.location for tenant in found] == [
        f"{bucket}/{name}/v1" for name in ("acme", "beta", "gamma")
    ]
    assert server.control()["requests"] == 1
    for tenant in found:
        server.control(delay=0)
        with located(tenant.location, accept=check_adapter) as path:
            counts = server.control()
            folder = Path(tenant.location.replace(bucket, str(stored(server, bucket))))
            for file in folder.iterdir():
                assert Path(path, file.name).read_bytes() == file.read_bytes()
        ranges = 3 if tenant.name == "gamma" else 0
        assert counts["requests"] == 5 + ranges  # a listing, two files, a look at each after
        assert counts["bytes"] == sum(file.stat().st_size for file in folder.iterdir())


def test_etags_are_the_versions(server, bucket):
    folder = adapter(stored(server, bucket) / "a")
    first = listing(bucket)
    assert [len(entry.version) for entry in first] == [32, 32]
    (folder / "adapter_config.json").write_text("{ }")
    second = listing(bucket)
    assert second[1] == first[1] and second[0].version != first[0].version
    assert listing(f"{bucket}/a/adapter_config.json") == [second[0]]
    assert listing(f"{bucket}/none") == []
    with pytest.raises(FileError, match="no such file"):
        listing("s3://no-such-bucket")


def test_an_empty_object_is_no_adapter(server, bucket):
    (stored(server, bucket) / "a.safetensors").touch()
    with (
        pytest.raises(FormatError, match="too short"),
        located(f"{bucket}/a.safetensors"),
    ):
        pass


@pytest.mark.parametrize("fault", ["throttle", "broken"])
def test_a_throttled_read_goes_on(server, bucket, fault):
    folder = adapter(stored(server, bucket) / "a")
    server.control(**{fault: 2})
    with located(f"{bucket}/a") as path:
        for file in folder.iterdir():
            assert Path(path, file.name).read_bytes() == file.read_bytes()
    assert server.control()["requests"] == 7


def test_a_store_that_stays_busy_is_given_up(server, bucket, monkeypatch):
    adapter(stored(server, bucket) / "a")
    server.control(broken=1000)
    with pytest.raises(FileError, match="gave up after 3 tries"), located(f"{bucket}/a"):
        pass
    assert server.control()["requests"] == 3


def test_a_bucket_that_vanishes_in_the_middle(server, bucket):
    for index in range(8):
        adapter(stored(server, bucket) / f"t{index}")
    tenants = find_tenants(bucket)
    server.control(vanish=12)
    outcomes = []
    for tenant in tenants:
        try:
            with located(tenant.location):
                outcomes.append("read")
        except FileError as error:
            outcomes.append(error.message)
    assert outcomes == ["read"] * 2 + ["no such file or directory"] * 6


def test_an_object_that_is_replaced_while_read(server, bucket):
    large(stored(server, bucket) / "a", 18)
    server.control(change="a/adapter_model.safetensors", after=2)
    with pytest.raises(ChangedError, match="changed while being read"), located(f"{bucket}/a"):
        pass


def test_few_requests_at_a_time(server, bucket):
    for index in range(24):
        adapter(stored(server, bucket) / f"t{index:02d}")
    tenants = find_tenants(bucket)
    server.control(delay=0.1)

    def read(location: str) -> int:
        with located(location) as path:
            return len(open_adapter_file(path).sites)

    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(read, [tenant.location for tenant in tenants])) == [2] * 24
    assert 1 < server.control()["peak"] <= patience.REQUESTS


def test_a_large_listing_takes_a_request_a_page(server, bucket):
    server.control(keys=4000)
    notes: list[str] = []
    found = find_tenants("s3://huge", note=notes.append)
    assert len(found) == 2000 and found[-1].name == "fleet/t001999"
    assert server.control()["requests"] == 4
    assert len(notes) == 1 and "4 keys passed over" in notes[0]


@pytest.mark.long
def test_a_hundred_thousand_keys(server, bucket):
    server.control(keys=100_000)
    script = (
        "import resource\n"
        "from adapterops.files.remote import listing\n"
        "from adapterops.files.objects import Store\n"
        "Store('s3://huge')\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3\n"
        "before = peak()\n"
        "print(len(listing('s3://huge')), peak() - before)\n"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | server.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    count, megabytes = done.stdout.split()
    assert count == "100000" and float(megabytes) < 150
    assert time.monotonic() - start < 120  # s3fs' own `find`: 250 s
    assert server.control()["requests"] == 100


def test_a_reader_that_is_stopped_and_started_again(server, bucket, tmp_path):
    folder = large(stored(server, bucket) / "a", 10)
    temporary = tmp_path / "own"
    temporary.mkdir()
    script = (
        "from adapterops.files.remote import located\n"
        "print('begun', flush=True)\n"
        f"with located('{bucket}/a') as path:\n"
        "    print(open(path + '/adapter_model.safetensors', 'rb').read()[-8:].hex())\n"
    )
    command = [sys.executable, "-c", script]
    env = os.environ | server.environment | {"TMPDIR": os.fspath(temporary)}
    server.control(delay=0.3)
    for number in (signal.SIGINT, signal.SIGKILL):
        with subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            while not any(temporary.rglob(".adapter_model*")):
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(number)
            assert process.stdout is not None and process.stdout.read() == "begun\n"
            assert process.wait(30) != 0
        left = list(temporary.iterdir())
        assert len(left) == (number == signal.SIGKILL)
    os.utime(left[0], (1, 1))
    server.control(delay=0)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    tail = (folder / "adapter_model.safetensors").read_bytes()[-8:]
    assert done.stdout.split() == ["begun", tail.hex()]
    assert list(temporary.iterdir()) == []


def test_a_server_that_is_gone(tmp_path, monkeypatch):
    folder = tmp_path / "s3"
    adapter(folder / "bucket" / "a")
    with serving(folder) as other:
        monkeypatch.setenv("AWS_ENDPOINT_URL", other.environment["AWS_ENDPOINT_URL"])
        Store("s3://bucket").fs.clear_instance_cache()
        with located("s3://bucket/a") as path:
            assert os.path.exists(path)
        other.process.kill()
        other.process.wait()
        with pytest.raises(FileError, match=r"Could not connect.*gave up after"):
            listing("s3://bucket")
    Store("s3://bucket").fs.clear_instance_cache()
