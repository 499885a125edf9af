"""adapterops cluster on the command line: output, JSON, exit codes, signals, full disks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import adapterops as ao
from adapterops.cli import app
from adapterops.errors import AdapterOpsError
from adapterops.fleet.plans.planfile import read_plan
from tests.planted import plant

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
SHARING = ("--allow-sharing", "all")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of two planted clusters, at 0.05 and 0.1."""
    root = tmp_path_factory.mktemp("fleet")
    plant(root / "adapters", 2, epsilons=(0.05, 0.1), private=False)
    ao.index(root / "adapters", out=root / "fleet")
    return root / "fleet"


def cluster(*given: Any) -> Result:
    """The command, errors raised as its `main` gets them."""
    return CliRunner().invoke(app, ["cluster", *map(str, given)], standalone_mode=False)


def failed(result: Result) -> AdapterOpsError:
    assert isinstance(result.exception, AdapterOpsError), result.output
    return result.exception


def started(
    folder: Path, *given: Any, program: str = "from adapterops.cli import main; main()"
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, "cluster", *map(str, given), "--no-progress"],
        cwd=folder,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_from_adapters_to_a_plan(fleet, tmp_path):
    """The commands that the help shows, one after the other."""
    runner = CliRunner()
    adapters, index, plan = fleet.parent / "adapters", tmp_path / "fleet", tmp_path / "plan"
    made = runner.invoke(app, ["index", str(adapters), "-o", str(index)])
    assert made.exit_code == 0, made.output
    made = cluster(index, "-o", plan, *SHARING, "--max-error", "0.2")
    assert made.exit_code == 0
    tenants = len(read_plan(plan).served)
    count = sum(rep.kind != "base" for rep in read_plan(plan).representatives.values())
    assert f"{tenants} tenants served by {count} adapters" in made.output
    assert "none above 0.2, verified" in made.output and "foreign" in made.output
    policy = tmp_path / "consent.csv"
    policy.write_text("tenant,private\nc00000/centre,true\n")
    made = cluster(index, "-o", tmp_path / "plan2", "--policy", policy, "--previous", plan)
    assert made.exit_code == 0 and "1 tenant alone: private" in made.output
    assert read_plan(tmp_path / "plan2").options["allow_sharing"] == "none"
    made = cluster("--help")
    assert made.exit_code == 0 and "adapterops cluster fleet -o plan" in made.output


def test_what_is_shown_when_nothing_may_be_shared(fleet, tmp_path):
    made = cluster(fleet, "-o", tmp_path / "plan")
    assert "sharing more needs consent" in made.output
    assert "if all might share, by originals (estimated)" in made.output
    assert cluster(fleet, "-o", tmp_path / "q", "--quiet").output == ""


def test_json_is_the_report(fleet, tmp_path):
    made = cluster(fleet, "-o", tmp_path / "plan", *SHARING, "--json")
    document = json.loads(made.output)
    report = ao.cluster(fleet, out=tmp_path / "same", allow_sharing="all")
    assert document == json.loads(json.dumps(report.to_dict())) | {"output": document["output"]}
    assert document["schema"] == "adapterops.cluster/1"
    plan = read_plan(tmp_path / "plan")
    assert document["tenants"] == len(plan.served)
    assert document["errors"]["largest"] == max(item.error for item in plan.served.values())
    assert document["foreign"]["largest"] == max(item.foreign for item in plan.served.values())
    sizes = {rep.id: rep.size for rep in plan.representatives.values()}
    assert document["size"] == sum(sizes.values()) < document["size_before"]
    points = document["pareto"]
    counts = [point["adapters"] for point in points]
    assert counts == sorted(counts, reverse=True)
    [at] = [point for point in points if point["max_error"] == 0.2]
    assert document["gain"]["adapters"] == at["adapters"] == document["adapters"]


def test_a_dry_run_says_so_and_writes_nothing(fleet, tmp_path):
    made = cluster(fleet, "-o", tmp_path / "plan", *SHARING, "--dry-run")
    assert made.exit_code == 0 and "nothing written" in made.output
    assert not list(tmp_path.iterdir())


def text(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content)
    return folder / name


WRONG = {
    "two bounds": (["--max-error", "0.1", "--max-adapters", "3"], 2, "exclude each other"),
    "bound of 1": (["--max-error", "1"], 2, "from 0 to below 1"),
    "bound below 0": (["--max-error", "-0.1"], 2, "from 0 to below 1"),
    "bound nan": (["--max-error", "nan"], 2, "from 0 to below 1"),
    "no adapters": (["--max-adapters", "0"], 2, "at least 1"),
    "discovery": (["--discovery", "1"], 2, "between 0 and 1"),
    "metric alone": (["--metric", "activation"], 2, "need each other"),
    "activations alone": (["--activations", "x"], 2, "need each other"),
    "rank 0": (["--rank", "0"], 2, "at least 1"),
    "dtype": (["--dtype", "int8"], 2, "expected one of keep"),
    "few adapters": (["--max-adapters", "1", *SHARING], 5, "--max-adapters 1"),
    "no policy": (["--policy", "{folder}/nowhere.csv"], 6, "nowhere.csv"),
    "bad policy": (["--policy", "{folder}/bad.csv"], 3, "unknown column"),
    "unknown tenant": (["--policy", "{folder}/unknown.csv"], 4, "nobody"),
    "no aliases": (["--base-alias", "{folder}/nowhere"], 6, "nowhere"),
    "bad aliases": (["--base-alias", "{folder}/alias.csv"], 3, "alias.csv"),
    "no activations": (["--metric", "activation", "--activations", "{folder}/no"], 6, "no"),
    "no previous": (["--previous", "{folder}/nowhere"], 6, "nowhere"),
    "previous is no plan": (["--previous", "{folder}/other"], 3, "no plan"),
    "output inside the index": (["-o", "{fleet}/plan"], 2, "is inside the input"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_and_nothing_is_written(fleet, tmp_path, case):
    given, code, said = WRONG[case]
    text(tmp_path, "bad.csv", "tenant,privat\na,true\n")
    text(tmp_path, "unknown.csv", "tenant,private\nnobody,true\n")
    text(tmp_path, "alias.csv", "one name alone\n")
    (tmp_path / "other").mkdir()
    text(tmp_path / "other", "plan.json", "{}")
    (tmp_path / "out").mkdir()
    filled = [each.format(folder=tmp_path, fleet=fleet) for each in given]
    error = failed(cluster(fleet, "-o", tmp_path / "out" / "plan", *filled))
    assert error.exit_code == code and said in str(error)
    assert not list((tmp_path / "out").iterdir()) and not (fleet / "plan").exists()


def test_what_is_no_index(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        error = failed(cluster(tmp_path / name, "-o", tmp_path / "plan"))
        assert error.exit_code in (3, 6) and name in str(error)
    assert os.listdir(tmp_path) == ["empty"]


def test_overwrite_replaces_a_plan_and_nothing_else(fleet, tmp_path):
    """Also one that wrote no representative; what somebody left in one is kept."""
    plan = tmp_path / "plan"
    for given in ((), SHARING, (), SHARING):
        made = cluster(fleet, "-o", plan, *given, "--overwrite")
        assert made.exit_code == 0, made.exception
        assert read_plan(plan).options["allow_sharing"] == ("all" if given else "none")
        assert (plan / "representatives").exists() == bool(given)
    before = sorted(plan.rglob("*"))
    error = failed(cluster(fleet, "-o", plan))
    assert error.exit_code == 2 and "--overwrite" in str(error)
    (plan / "notes.txt").write_text("mine")
    error = failed(cluster(fleet, "-o", plan, "--overwrite"))
    assert "notes.txt" in str(error)
    assert sorted(plan.rglob("*")) == sorted([*before, plan / "notes.txt"])
    adapter = shutil.copytree(fleet.parent / "adapters/c00000/centre", tmp_path / "adapter")
    assert failed(cluster(fleet, "-o", adapter, "--overwrite")).exit_code == 2
    assert (adapter / "adapter_model.safetensors").exists()
    error = failed(cluster(fleet, "-o", plan, "--previous", plan, "--overwrite"))
    assert "is the input" in str(error)


def test_errors_on_a_real_command_line(fleet, tmp_path):
    process = started(tmp_path, fleet, "-o", "plan", "--max-error", "2", "--json")
    shown, said = process.communicate(timeout=60)
    assert (process.returncode, shown) == (2, "")
    assert json.loads(said)["error"]["type"] == "UsageError"
    process = started(tmp_path, fleet, "-o", "nowhere/plan")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 6 and "does not exist" in said and "Traceback" not in said


# The command with every write delayed, so that a signal meets it at work.
SLOW = """
import os, time
real = os.pwrite
def slow(*arguments):
    open("writing", "w").close()
    time.sleep(0.2)
    return real(*arguments)
os.pwrite = slow
from adapterops.cli import main
main()
"""


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("before", ["nothing", "a plan"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_nothing_under_the_final_name(fleet, tmp_path, number, before):
    old = None
    if before == "a plan":
        ao.cluster(fleet, out=tmp_path / "plan")
        old = (tmp_path / "plan/plan.json").read_bytes()
    process = started(tmp_path, fleet, "-o", "plan", *SHARING, "--overwrite", program=SLOW)
    wait_for(tmp_path / "writing", process)
    time.sleep(0.1)
    process.send_signal(number)
    shown, said = process.communicate(timeout=60)
    (tmp_path / "writing").unlink()
    names = sorted(os.listdir(tmp_path))
    if number == signal.SIGKILL:
        assert process.returncode == -number
        names = [name for name in names if not name.startswith(".plan.adapterops-")]
    else:
        assert process.returncode == 130, said
        assert shown == "" and "no unfinished output was left" in said
        assert "Traceback" not in said
    assert names == (["plan"] if old else [])
    if old:
        assert (tmp_path / "plan/plan.json").read_bytes() == old
        assert read_plan(tmp_path / "plan").served
    made = cluster(fleet, "-o", tmp_path / "plan", *SHARING, "--overwrite")
    assert made.exit_code == 0


FILL = """
import json, os, sys
import adapterops as ao
from adapterops.errors import FileError
from pathlib import Path
fleet, disk = sys.argv[1], Path(sys.argv[2])
for free in json.loads(sys.argv[3]):
    left = os.statvfs(disk)
    (disk / "filler").write_bytes(b"x" * max(0, left.f_bavail * left.f_frsize - free))
    try:
        ao.cluster(fleet, out=disk / "plan", allow_sharing="all")
        print("fits", *os.listdir(disk / "plan"))
    except FileError as error:
        assert error.exit_code == 6, error
        print("full")
        assert os.listdir(disk) == ["filler"], os.listdir(disk)
    (disk / "filler").unlink()
"""


def test_a_disk_that_fills_up(fleet, tmp_path):
    """A real file system of 2 MiB, in a mount name space of its own that ends with the process."""
    mount = f"mount -t tmpfs -o size=2m tmpfs {tmp_path}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("may not mount a small file system")
    free = json.dumps([0, 4096, 16384, 24576, 32768, 49152, 65536, 1_500_000])
    done = subprocess.run(
        [
            *("unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh"),
            *(sys.executable, "-c", FILL, str(fleet), str(tmp_path), free),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said.count("full") >= 4 and said[-1].startswith("fits")
