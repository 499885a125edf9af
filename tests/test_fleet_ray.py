"""--runner ray: a cluster of several nodes on this machine, of which one is killed on the way."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import adapterops as ao
from adapterops import activations
from adapterops.activations import open_activations, write_activations
from adapterops.errors import (
    AdapterOpsError,
    ChangedError,
    FormatError,
    IncompatibleError,
    Interrupted,
    UsageError,
)
from adapterops.fleet import ray_run
from adapterops.fleet.verifying import exact
from adapterops.fleet.verifying.exact import compare_groups
from adapterops.stream import Compute
from tests import ray_work
from tests.planted import SHAPES, plant
from tests.test_fleet_store import content

HERE = Path(__file__).parent.parent
OWN = importlib.util.find_spec("ray") is not None
needs_ray = [
    pytest.mark.ray,
    pytest.mark.skipif(not OWN, reason="no Ray here: `make test-ray` installs it"),
]
STORE = 80 << 20  # bytes: about the least that Ray allows


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without processors; `nodes` has two of one processor each before every test."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray-")  # short: sockets are below it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.fspath(HERE))  # workers import `tests`
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", folder)
        found = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": STORE,
                "include_dashboard": False,
                "_system_config": {
                    "health_check_initial_delay_ms": 0,
                    "health_check_period_ms": 500,
                    "health_check_failure_threshold": 4,
                },
            },
        )
        patch.setenv("RAY_ADDRESS", found.address)
        try:
            yield found
        finally:
            found.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def nodes(cluster: Any) -> list[Any]:
    """The two nodes of the cluster that have processors."""
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(num_cpus=1, object_store_memory=STORE)
    return sorted(cluster.worker_nodes, key=lambda node: node.node_id)


@pytest.fixture
def killer(
    cluster: Any, nodes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], None]]:
    """Arm it, and a node is killed when the first result of the next run arrives."""
    armed: list[Any] = []
    real = ray_run._result

    def result(*given: Any) -> Any:
        found = real(*given)
        while armed:
            cluster.remove_node(armed.pop(), allow_graceful=False)
        return found

    monkeypatch.setattr(ray_run, "_result", result)
    yield lambda: armed.append(nodes[0])
    assert not armed


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A planted fleet of three clusters, and its index made here."""
    root = tmp_path_factory.mktemp("planted")
    plant(root / "in", 3)
    (root / "in" / "c00000" / "broken").mkdir()
    (root / "in" / "c00000" / "broken" / "adapter_model.safetensors").write_bytes(b"x" * 40)
    ao.index(root / "in", out=root / "fleet", jobs=1)
    return root / "in", root / "fleet"


class TestOrdinary:
    """Without Ray, or without a cluster."""

    def test_ray_that_is_not_installed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "ray", None)
        (tmp_path / "in").mkdir()
        with pytest.raises(UsageError, match=r"needs Ray.*adapterops\[ray\]"):
            ao.index(tmp_path / "in", out=tmp_path / "fleet", runner="ray")
        assert not (tmp_path / "fleet").exists()

    def test_no_cluster_and_signals_as_before(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def init(**_: Any) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise ConnectionError("Could not find any running Ray instance.\nPlease …")

        fake = SimpleNamespace(is_initialized=lambda: False, init=init)
        monkeypatch.setitem(sys.modules, "ray", fake)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(UsageError, match=r"Could not find.*instance\.; run on a node"):
            ao.cluster(tmp_path / "fleet", out=tmp_path / "plan", runner="ray")
        assert signal.getsignal(signal.SIGTERM) == before

    def test_a_runner_that_nobody_knows(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        with pytest.raises(UsageError, match="'dask': expected one of threads, ray"):
            ao.index(tmp_path / "in", out=tmp_path / "fleet", runner="dask")  # type: ignore

    def test_an_address_where_nothing_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        with pytest.raises(UsageError, match=r"no Ray cluster at 127\.0\.0\.1:1: .*refused"):
            ray_run._check_answers(os.environ["RAY_ADDRESS"])

    def test_activations_travel_by_name(self, tmp_path: Path) -> None:
        modules = {"m": ("gram", np.eye(3))}
        write_activations(tmp_path / "a", modules, tokens=1, model="x")
        found = open_activations(tmp_path / "a")
        sent = pickle.dumps(found)
        assert len(sent) < 300 and pickle.loads(sent).modules.keys() == {"m"}
        activations._reopened.cache_clear()  # another process has none
        write_activations(tmp_path / "a", modules, tokens=2, model="x", overwrite=True)
        with pytest.raises(ChangedError, match="not the activation file that the run began with"):
            pickle.loads(sent)


class TestMap:
    """The ordered map."""

    pytestmark = needs_ray

    def test_results_in_order_from_both_nodes(self, nodes: list[Any]) -> None:
        with ray_run.joined() as spread:
            found = list(spread(ray_work.node, range(12)))
        assert [item for item, _ in found] == list(range(12))
        assert {node for _, node in found} == {node.node_id for node in nodes}

    def test_no_more_in_flight_than_asked(self, nodes: list[Any]) -> None:
        given = []

        def items() -> Iterator[int]:
            for item in range(40):
                given.append(item)
                yield item

        with ray_run.joined(jobs=1) as spread:
            results = spread(ray_work.node, items())
            next(results)
            assert len(given) <= ray_run._AHEAD
            assert len(list(results)) == 39

    def test_a_worker_that_dies_once(self, nodes: list[Any], tmp_path: Path) -> None:
        with ray_run.joined() as spread:
            found = list(spread(ray_work.dies_once, [(os.fspath(tmp_path), i) for i in range(5)]))
        assert found == list(range(5)) and (tmp_path / "died-2").exists()

    def test_one_that_ray_gave_up_is_sent_again(
        self, nodes: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ray_run, "_RETRIES", 0)
        with ray_run.joined() as spread:
            found = list(spread(ray_work.dies_once, [(os.fspath(tmp_path), i) for i in range(5)]))
        assert found == list(range(5)) and (tmp_path / "died-2").exists()

    def test_a_task_that_always_dies(
        self, nodes: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ray_run, "_RETRIES", 0)
        monkeypatch.setattr(ray_run, "_TRIES", 1)
        with ray_run.joined() as spread:
            results = spread(ray_work.dies, range(4))
            assert next(results) == 0
            with pytest.raises(AdapterOpsError, match=r"lost 2 times.*, on 1; was a node out"):
                next(results)

    def test_a_cluster_that_lost_all_its_nodes(
        self, cluster: Any, nodes: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ray_run, "_PATIENCE", 3.0)
        with ray_run.joined() as spread:
            results = spread(ray_work.node, range(40))
            next(results)
            for node in nodes:
                cluster.remove_node(node, allow_graceful=False)
            with pytest.raises(AdapterOpsError, match="had no processor for 3 s; are all"):
                list(results)

    def test_errors_come_at_their_place(self, nodes: list[Any]) -> None:
        with ray_run.joined() as spread:
            results = spread(ray_work.fails, range(8))
            assert [next(results), next(results)] == [0, 1]
            with pytest.raises(FormatError, match=r"a\.safetensors: is odd; leave it"):
                next(results)
            results = spread(ray_work.fails, [0, 4])
            assert next(results) == 0
            with pytest.raises(AdapterOpsError, match=r"ZeroDivisionError.*by nothing; does"):
                next(results)

    def test_a_worker_of_another_version(
        self, nodes: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ray_run, "__version__", "9.9")
        with (
            ray_run.joined() as spread,
            pytest.raises(IncompatibleError, match=r"the driver 9\.9; install the same"),
        ):
            list(spread(ray_work.fails, [0]))

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
    def test_interrupted_while_it_waits(
        self, nodes: list[Any], tmp_path: Path, number: signal.Signals
    ) -> None:
        code = (
            "import signal, sys\n"
            "from adapterops.cli import _terminate\n"
            "from adapterops.fleet.ray_run import joined\n"
            "from tests.ray_work import lingers\n"
            "signal.signal(signal.SIGTERM, _terminate)\n"
            "try:\n"
            "    with joined() as spread:\n"
            "        list(spread(lingers, [sys.argv[1]] * 9))\n"
            "except KeyboardInterrupt:\n"
            "    sys.exit(130)\n"
        )
        with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=HERE) as process:
            _wait(lambda: len(list(tmp_path.glob("began-*"))) == 2)
            process.send_signal(number)
            start = time.monotonic()
            assert process.wait(30) == 130
        assert time.monotonic() - start < 12
        assert len(list(tmp_path.glob("tidied-*"))) == 2


def _wait(until: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class TestFleets:
    """What comes of it is what comes of a run on this machine."""

    pytestmark = needs_ray

    def test_an_index_though_a_node_is_killed(
        self,
        killer: Callable[[], None],
        planted: tuple[Path, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        root, local = planted
        monkeypatch.chdir(root.parent)
        killer()
        report = ao.index("in", out=tmp_path / "fleet", runner="ray")
        assert report.read == len(content(local)) == 61
        assert capsys.readouterr().out == ""  # Ray says on stderr what it has lost
        # All but the path as it was given.
        found = {name: said[1:] for name, said in content(tmp_path / "fleet").items()}
        assert found == {name: said[1:] for name, said in content(local).items()}

    def test_interrupted_and_continued_here(
        self, nodes: list[Any], planted: tuple[Path, Path], tmp_path: Path
    ) -> None:
        root, local = planted

        def stop(what: str, done: int, count: int) -> None:
            if done == 20:
                raise KeyboardInterrupt

        with pytest.raises(Interrupted, match=r"20 of \d+ adapters are in the index"):
            ao.index(root, out=tmp_path / "fleet", runner="ray", progress=stop)
        report = ao.index(root, out=tmp_path / "fleet", jobs=1)
        assert report.read == len(content(local)) - 20
        assert content(tmp_path / "fleet") == content(local)

    def test_verification_though_a_node_is_killed(
        self,
        killer: Callable[[], None],
        planted: tuple[Path, Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        root, _ = planted
        places = sorted(os.fspath(path.parent) for path in root.rglob("adapter_config.json"))
        groups = [(place, places[: 3 * n]) for n, place in enumerate(places[:20])]
        groups += [(None, places), (os.fspath(root / "c00000" / "broken"), places[:2])]
        monkeypatch.setattr(exact, "_TOGETHER", 16)
        here = list(compare_groups(groups, Compute(threads=1)))
        killer()
        with ray_run.run_by("ray", Compute()) as on:
            there = list(compare_groups(groups, on))
        assert repr(there) == repr(here)
        assert [len(one) for one in there] == [len(members) for _, members in groups]

    @pytest.mark.parametrize("metric", ["frobenius", "activation"])
    def test_a_plan_though_a_node_is_killed(
        self,
        killer: Callable[[], None],
        planted: tuple[Path, Path],
        tmp_path: Path,
        metric: str,
    ) -> None:
        _, fleet = planted
        options: dict[str, Any] = {"allow_sharing": "all", "max_error": 0.2, "metric": metric}
        if metric == "activation":
            rng = np.random.default_rng(0)
            modules = {
                stem: ("samples", rng.standard_normal((8, n))) for stem, (_, n) in SHAPES.items()
            }
            write_activations(tmp_path / "inputs", modules, tokens=8, model="x")
            options["activations"] = tmp_path / "inputs"
        here = ao.cluster(fleet, out=tmp_path / "here", jobs=1, **options)
        assert any(kind in ("mean", "minimax") for kind in kinds(tmp_path / "here"))
        killer()
        there = ao.cluster(fleet, out=tmp_path / "there", runner="ray", **options)
        assert said(here.to_dict()) == said(there.to_dict())
        found, expected = written(tmp_path / "there"), written(tmp_path / "here")
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []
        dry = ao.cluster(fleet, out=tmp_path / "dry", runner="ray", dry_run=True, **options)
        assert said(dry.to_dict()) == said(here.to_dict())
        assert {path.name for path in tmp_path.iterdir()} <= {"here", "there", "inputs"}

    def test_the_command_prints_one_document(
        self, nodes: list[Any], planted: tuple[Path, Path], tmp_path: Path
    ) -> None:
        _, fleet = planted
        command = [sys.executable, "-m", "adapterops", "cluster", fleet, "-o", tmp_path / "plan"]
        done = subprocess.run(
            [*command, "--runner", "ray", "--json"], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["schema"].startswith("adapterops.cluster")


def kinds(plan: Path) -> set[str]:
    """The kinds of a plan's representatives."""
    document = json.loads((plan / "plan.json").read_text())
    return {rep["kind"] for rep in document["representatives"].values()}


def said(report: dict[str, Any]) -> dict[str, Any]:
    """A report without the name of what was written."""
    return {key: value for key, value in report.items() if key not in ("output", "files")}


def written(plan: Path) -> dict[str, bytes]:
    """Every file of a plan but the report beside it, which names the plan."""
    files = [path for path in plan.rglob("*") if path.is_file() and path.parent != plan]
    files.append(plan / "plan.json")
    return {os.fspath(path.relative_to(plan)): path.read_bytes() for path in files}
