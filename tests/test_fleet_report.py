"""A plan summed up: figures, similarities, and the files that show them, whatever names hold."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

import adapterops
from adapterops.errors import FileError, OutputExistsError, UsageError
from adapterops.fleet.indexing.opened import open_fleet
from adapterops.fleet.plans.planfile import read_plan
from adapterops.fleet.summary.map import similarity
from adapterops.fleet.summary.served import FATES, summary
from adapterops.render import fleet_charts, fleet_html, fleet_markdown, fleet_report, markup
from adapterops.render.text import printable
from adapterops.serving import ENGINES
from tests.reporting import HOSTILE, planned
from tests.test_cli import run

VOID = {"meta", "br", "img", "link", "input", "wbr", "hr"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    planned(folder)
    return folder


@pytest.fixture(scope="module")
def report(root):
    return adapterops.report(root / "plan")


class Page(HTMLParser):
    """Elements with their attributes and text; asserts that every element is closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self._open[-1] if self._open else "", []).append(data)

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.elements if name == tag]

    def text(self, tag: str) -> str:
        return "".join(self.texts.get(tag, []))


def island(text: str) -> dict:
    """The data in a page, as its script reads them."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


def test_figures_are_those_of_the_plan(root, report):
    plan = read_plan(root / "plan")
    assert report.tenants == len(plan.served) == sum(report.fates[fate] for fate in FATES[:-1])
    assert report.fates["none"] == len(plan.excluded) == 1
    deployed = [rep for rep in plan.representatives.values() if rep.kind != "base"]
    assert report.adapters == len(deployed) == len(report.groups)
    assert report.size == sum(rep.size for rep in deployed)
    assert report.largest == max(item.error for item in plan.served.values()) <= 0.2
    assert report.mean == pytest.approx(np.mean([x.error for x in plan.served.values()]))
    for name, item in plan.served.items():
        rep, shown = plan.representatives[item.by], report.served[name]
        assert (shown.error, shown.foreign, shown.worst) == (item.error, item.foreign, item.worst)
        assert shown.kind == rep.kind
        assert (shown.fate == "own") == (len(rep.members) == 1 and rep.kind == "original")
        assert (shown.fate == "new") == (rep.kind in ("mean", "minimax"))
        assert (shown.fate == "base") == (rep.kind == "base")
    assert {fate for fate in FATES if report.fates[fate]} == {*FATES}
    alone = sorted(name for names in report.alone.values() for name in names)
    assert alone == sorted(n for n, item in report.served.items() if item.fate == "own")
    assert report.bases == ("planted/base", "planted/other")


@pytest.mark.parametrize("engine", ["vllm", "sglang", "lorax"])
def test_gpu_bytes_are_those_of_a_deployment(root, tmp_path, engine):
    """One base, and adapters that are deployed as they are: the formula has the same input."""
    adapterops.index(root / "adapters" / "c00001", out=tmp_path / "fleet", jobs=1)
    adapterops.cluster(tmp_path / "fleet", out=tmp_path / "plan", jobs=1)
    report = adapterops.report(tmp_path / "plan", engine=engine, max_loras=5)
    deployed = adapterops.deploy(
        tmp_path / "plan",
        engine=engine,
        served_base="planted/base",
        out=tmp_path / "run",
        max_loras=5,
        jobs=1,
        dry_run=True,
    )
    assert report.gpu.before == deployed.memory.before
    assert report.gpu.after == deployed.memory.after
    assert report.resident.after > report.gpu.after
    for point in report.pareto:
        each = report.resident.after / report.resident.adapters_after
        assert point.gpu == round(each * point.adapters)


def test_similarities_are_cosines(root, report):
    found = report.similarity
    plan, index = read_plan(root / "plan"), open_fleet(root / "fleet")
    homes = {record.tenant.name: record for record in index.records}
    assert found.each == "tenants" and found.total == len(found.names)
    assert set(found.names) == {n for n, record in homes.items() if record.row >= 0}
    assert found.groups == tuple(plan.served[name].by for name in found.names)
    changes = [
        g for g, before in zip(found.groups, (None, *found.groups), strict=False) if g != before
    ]
    assert len(changes) == len(set(found.groups))  # members of a group are side by side
    delta = np.array(found.delta, float)
    assert np.array_equal(delta, delta.T, equal_nan=True)
    assert np.array_equal(np.diag(delta), np.ones(len(delta)))
    bases = np.array([homes[name].base for name in found.names])
    apart = bases[:, None] != bases[None, :]
    assert apart.any()
    assert np.array_equal(np.isnan(delta), apart)
    assert np.array_equal(np.isnan(np.array(found.outputs, float)), apart)
    chosen = np.flatnonzero(bases == "planted/base")[::4]
    exact = adapterops.diff([homes[found.names[i]].tenant.location for i in chosen]).cosine
    away = delta[np.ix_(chosen, chosen)] - np.array(exact)
    assert 0.01 < np.sqrt((away**2).mean()) < found.sigma < 0.5
    assert np.abs(away).max() < 3 * found.sigma


@pytest.mark.parametrize(("largest", "each"), [(30, "adapters"), (5, "largest")])
def test_a_large_map_is_of_adapters(root, report, largest, each):
    plan, index = read_plan(root / "plan"), open_fleet(root / "fleet")
    found = similarity(plan, index, largest)
    assert found.each == each and len(found.names) == min(largest, report.adapters)
    assert len(set(found.groups)) == len(found.groups)
    assert found.total == len(report.similarity.names)
    for name, group in zip(found.names, found.groups, strict=True):
        rep = plan.representatives[group]
        assert plan.served[name].error == min(plan.served[n].error for n in rep.members)
    if each == "largest":
        left = [r for r in report.groups if r.id not in found.groups]
        fewest = min(len(plan.representatives[id].members) for id in found.groups)
        assert fewest >= max(len(rep.members) for rep in left)
    assert fleet_html.page(replace(report, similarity=found))


def test_the_page_is_one_file_that_loads_nothing(report):
    text = fleet_html.page(report)
    page = Page(text)
    for tag, attrs in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") or name == "src" for name in attrs), attrs
        assert attrs.get("href", "#").startswith("#")
    assert "url(" not in page.text("style") and "@import" not in page.text("style")
    for target in (attrs["href"][1:] for attrs in page.of("a")):
        assert any(attrs.get("id") == target for _, attrs in page.elements), target
    kinds = [attrs.get("type") for attrs in page.of("script")]
    assert kinds == ["application/json", None]
    script = text.split("<script>")[1].split("</script>")[0]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for a in page.of("meta") if "http-equiv" in a)
    assert f"script-src 'sha256-{allowed}';" in policy and "default-src 'none'" in policy
    assert text == fleet_html.page(report)


def test_the_pages_data_are_the_documents(report):
    text = fleet_html.page(report)
    document, found = report.to_dict(), island(text)
    assert document["schema"] == found["schema"] == "adapterops.fleet-report/1"
    json.dumps(document, allow_nan=False)
    words, table = found["words"], found["tenants"]
    assert found["tenant_total"] == len(table["name"]) == len(report.served) + 1
    served = {printable(name): item for name, item in document["served"].items()}
    for i, name in enumerate(table["name"]):
        if table["fate"][i] == "none":
            assert words[table["reason"][i]] == printable(report.excluded[name])
            assert table["error"][i] is None
            continue
        item = served.pop(name)
        for key in ("error", "missing", "foreign", "cosine", "traffic"):
            assert table[key][i] == pytest.approx(item[key], rel=1e-5)
        assert table["worst_error"][i] == pytest.approx(item["worst"][1], rel=1e-5)
        assert item["worst"][0] == (words[table["worst"][i]] if table["worst"][i] >= 0 else "")
        assert words[table["kind"][i]] == item["kind"] and table["fate"][i] == item["fate"]
        assert table["by"][i] < 0 or words[table["by"][i]] == item["by"]
    assert not served
    errors = [error for error in table["error"] if error is not None]
    assert errors == sorted(errors, reverse=True)
    adapters = found["adapters"]
    for i, place in enumerate(adapters["id"]):
        rep = report.representatives[words[place]]
        assert adapters["members"][i] == len(rep.members) and adapters["size"][i] == rep.size
        largest = max(report.served[name].error for name in rep.members)
        assert adapters["error"][i] == pytest.approx(largest, rel=1e-5)
    count = len(report.similarity.names)
    for key in ("delta", "outputs"):
        packed = np.frombuffer(base64.b64decode(found["map"][key]), np.int8).reshape(count, count)
        rows = np.array(document["similarity"][key], float)
        assert np.array_equal(packed == -128, np.isnan(rows))
        assert np.array_equal(packed[packed != -128], np.rint(100 * rows[~np.isnan(rows)]))


def test_the_pages_text_has_the_figures(report):
    page = Page(fleet_html.page(report))
    assert page.text("h1") == f"{report.tenants} tenants, {report.adapters} adapters"
    now = [data for tag, datas in page.texts.items() if tag == "dd" for data in datas]
    assert f"{report.adapters}" in now and markup.percent(report.largest) in now
    assert f"{report.before} before" in now and markup.size(report.size) in now
    assert f"bound {markup.percent(report.max_error)}" in page.texts["text"]
    for reason, names in report.alone.items():
        assert (
            reason in page.text("summary") + page.text("div") and f"{len(names)}" in page.texts["b"]
        )
    table = page.texts["td"]
    for point in report.pareto:
        assert f"{point.max_error:g}" in table and markup.percent(point.largest) in table
    circles = [a for a in page.of("circle") if a["class"] == "sign largest"]
    assert len(circles) == len({point.adapters for point in report.pareto})


@pytest.mark.parametrize("form", ["html", "md", "text"])
def test_names_are_inert(report, form):
    assert set(HOSTILE) <= report.served.keys()
    # In lists too, not in the tables alone.
    related = replace(
        report.related[0] if report.related else _related(), members=tuple(sorted(HOSTILE))
    )
    shown = replace(
        report,
        related=(related,),
        alone={HOSTILE[0]: HOSTILE},
        excluded=dict.fromkeys(HOSTILE, HOSTILE[1]),
        notes=HOSTILE,
        warnings=HOSTILE,
        plan=HOSTILE[0],
    )
    if form == "html":
        text = fleet_html.page(shown)
        page = Page(text)
        assert len(page.of("script")) == 2 and not page.of("img")
        assert text.count("<!--") == 0 and text.count("</script>") == 2
        assert printable(HOSTILE[0]) in page.text("li")
        names = island(text)["tenants"]["name"]
        assert {printable(name) for name in HOSTILE} <= set(names)
    elif form == "md":
        text = fleet_markdown.document(shown)
        assert "<script" not in text and "<img" not in text and "<!--" not in text
        assert not re.search(r"(?<!\\)\]\(", text) and "$j$" not in text
        for line in text.splitlines():
            if line.startswith("| a&amp;b"):
                assert len(re.findall(r"(?<!\\)\|", line)) == 10
    else:
        text = fleet_report.page(shown, verbose=True)
        assert HOSTILE[1] in text
    assert "\u202e" not in text


def _related():
    from adapterops.fleet.plans.plan import Related

    return Related("outputs", (), (0.3, 0.4))


def test_more_tenants_than_fit_are_cut_with_a_note(report):
    text = fleet_html.page(report, rows=10)
    found = island(text)
    assert len(found["tenants"]["name"]) == len(found["adapters"]["id"]) == 10
    assert all(len(column) == 10 for column in found["tenants"].values())
    assert all(len(column) == 10 for column in found["adapters"].values())
    kept = [error for error in found["tenants"]["error"] if error is not None]
    worst = sorted((item.error for item in report.served.values()), reverse=True)
    assert kept == pytest.approx(worst[:9], rel=1e-5)
    total = report.tenants + 1
    assert f"{total} tenants are too many for one page: these are the 10 with the largest" in text
    assert "too many" not in fleet_html.page(report)


def test_changes_are_the_recorded_ones_or_those_asked_for(root, tmp_path):
    adapterops.cluster(
        root / "fleet",
        out=tmp_path / "plan2",
        allow_sharing="all",
        max_error=0.05,
        previous=root / "plan",
        jobs=1,
    )
    report = adapterops.report(tmp_path / "plan2")
    recorded = json.loads((tmp_path / "plan2" / "adapterops.json").read_text())["changes"]
    assert report.changes == recorded and report.changes["moved"]
    (tmp_path / "plan2" / "adapterops.json").unlink()
    assert adapterops.report(tmp_path / "plan2").changes is None
    asked = adapterops.report(tmp_path / "plan2", previous=root / "plan")
    assert asked.to_dict()["changes"] == recorded
    page = Page(fleet_html.page(asked))
    assert any(attrs.get("id") == "changes" for attrs in page.of("section"))
    assert f"{len(recorded['moved'])}" in page.texts["b"]
    assert "## Changes" in fleet_markdown.document(asked)
    assert "moved" in fleet_report.page(asked)


def test_without_sharing_the_gain_is_named(root, tmp_path):
    adapterops.cluster(root / "fleet", out=tmp_path / "plan", jobs=1)
    report = adapterops.report(tmp_path / "plan")
    assert report.fates["new"] == 0 and report.gain["adapters"] < report.adapters
    said = f"an estimated {report.gain['adapters']} adapters would do"
    assert said in fleet_html.page(report)
    assert said in fleet_markdown.document(report) and said in fleet_report.page(report)


def test_without_the_index_there_is_a_warning(root, tmp_path):
    shutil.copytree(root / "plan", tmp_path / "plan")
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    (tmp_path / "plan" / "plan.json").write_text(json.dumps({**plan, "fleet": "gone"}))
    report = adapterops.report(tmp_path / "plan")
    assert report.similarity is None and report.gpu.after is None and report.gpu.before is None
    assert any("gone" in warning for warning in report.warnings)
    assert all(point.gpu is None for point in report.pareto)
    text = fleet_html.page(report)
    assert island(text)["map"] is None and "canvas" not in Page(text).text("section")
    assert fleet_markdown.document(report) and fleet_report.page(report)
    there = adapterops.report(tmp_path / "plan", fleet=root / "fleet")
    assert there.similarity and there.gpu.after
    with pytest.raises(FileError):
        adapterops.report(tmp_path / "plan", fleet=tmp_path / "nowhere")


def test_what_the_index_knows_since_is_warned_of(root, tmp_path):
    shutil.copytree(root / "fleet", tmp_path / "fleet")
    plan = read_plan(root / "plan")
    holder = next(rep for rep in plan.representatives.values() if rep.kind == "minimax")
    adapterops.index(out=tmp_path / "fleet", remove=holder.holds[0])
    report = adapterops.report(root / "plan", fleet=tmp_path / "fleet")
    assert any("off-boarded" in warning for warning in report.warnings)
    assert not adapterops.report(root / "plan").warnings


def test_the_bound_is_in_the_plans_metric(root):
    plan = read_plan(root / "plan")
    measured = {name: replace(item, measured=0.1) for name, item in plan.served.items()}
    changed = replace(plan, served=measured, metric="activation")
    report = summary(changed, "plan", None, ENGINES["vllm"], slots=4)
    assert report.largest == 0.1
    text = fleet_html.page(report)
    assert set(island(text)["tenants"]["measured"]) == {None, 0.1}
    assert "in terms of outputs" in text


def test_command_line(root, tmp_path):
    plan = root / "plan"
    done = run("report", plan, "--json", "-o", "r.html", cwd=tmp_path)
    document = json.loads(done.stdout)
    assert document == adapterops.report(plan).to_dict()
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    again = run("report", plan, "-o", "r.html", cwd=tmp_path, code=2)
    assert "exists already" in again.stderr
    shown = run("report", plan, "-o", "r.json", cwd=tmp_path).stdout
    assert json.loads((tmp_path / "r.json").read_text()) == document
    assert f"are served by {document['adapters']}" in shown


def test_the_ending_says_the_form(report, tmp_path):
    for name, start in (("r.md", "# Fleet: "), ("r.HTM", "<!doctype html>"), ("r.json", "{")):
        fleet_report.save(report, tmp_path / name)
        assert (tmp_path / name).read_text().startswith(start)
    for refuse in (fleet_report.check_file, lambda path: fleet_report.save(report, path)):
        with pytest.raises(UsageError, match=r"\.html, \.md or \.json"):
            refuse(tmp_path / "r.pdf")
    assert not (tmp_path / "r.pdf").exists()
    fleet_report.save(report, tmp_path / "r.md", overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"engine": "other"}, "expected one of"), ({"max_loras": 0}, "at least 1")],
    ids=["engine", "slots"],
)
def test_wrong_options(root, options, message):
    with pytest.raises(UsageError, match=message):
        adapterops.report(root / "plan", **options)


def test_an_existing_file_is_kept(report, tmp_path):
    (tmp_path / "r.md").write_text("mine")
    with pytest.raises(OutputExistsError):
        fleet_report.save(report, tmp_path / "r.md")
    assert (tmp_path / "r.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "–"),
        (0.0, "0 %"),
        (3e-9, "< 0.001 %"),
        (0.000299, "0.0299 %"),
        (0.16111, "16.1 %"),
        (1.0, "100 %"),
        (123.4, "12,340 %"),
    ],
    ids=str,
)
def test_percent(value, said):
    assert markup.percent(value).replace("\u202f", " ") == said


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (None, "not known"),
        (0, "0 bytes"),
        (999, "999 bytes"),
        (999_600, "1 MB"),
        (2_345_678, "2.35 MB"),
    ],
    ids=str,
)
def test_size(number, said):
    assert markup.size(number).replace("\u202f", " ") == said


@pytest.mark.parametrize("high", [1e-6, 0.02, 0.173, 1.0, 7.0, 80.0, 12345.0])
def test_ticks_are_round_and_few(high):
    found = fleet_charts.ticks(high)
    assert found[0] == 0.0 and 3 <= len(found) <= 7
    assert found[-1] <= high * (1 + 1e-6) and found[-1] + found[1] > high * (1 - 1e-6)
