"""A fleet's page in a headless Chromium: what a reader does with it. `make test-html` runs this."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import pytest

import adapterops
from adapterops.render import fleet_html, markup
from adapterops.render.text import printable
from tests.browser import opened
from tests.reporting import HOSTILE, planned

pytestmark = pytest.mark.html

ROWS = "[...document.querySelectorAll('[data-table={}] tbody tr:not(.below)')]"
CELLS = ROWS.format("tenants") + ".map(row => [...row.cells].map(cell => cell.textContent))"
SEARCH = """(async (name, words) => {
  const input = document.querySelector(`[data-table=${name}] input`);
  input.value = words;
  input.dispatchEvent(new Event('input'));
  return document.getElementById(`found-${name}`).textContent;
})(%s, %s)"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return adapterops.report(planned(tmp_path_factory.mktemp("fleet")))


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    (folder / "fleet.html").write_text(fleet_html.page(report), encoding="utf-8")
    with opened(folder / "fleet.html", folder / "profile") as page:
        yield page


def search(page, name: str, words: str) -> str:
    return page.evaluate(SEARCH % (json.dumps(name), json.dumps(words)))


def test_nothing_is_loaded_and_nobody_complains(page):
    assert page.evaluate("document.readyState") == "complete"
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith(("file:", "about:"))] == []
    assert "owned" not in page.evaluate("document.title")
    assert page.evaluate("document.querySelectorAll('img, iframe').length") == 0


def test_another_script_would_not_run(page):
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), "
        "{textContent: 'window.ran = true'}))"
    )
    assert page.evaluate("window.ran") is None
    page.errors.clear()  # which the policy has just complained of


def test_the_table_shows_the_documents_figures(page, report):
    search(page, "tenants", "")
    found = page.evaluate(CELLS)
    assert len(found) == 50 < report.tenants
    heads = page.evaluate(
        "[...document.querySelectorAll('[data-table=tenants] th')].map(head => head.textContent)"
    )
    assert heads[:8] == [
        "Tenant", "Served by", "Error", "Missing", "Foreign", "Cosine", "Worst", "in module"
    ]  # fmt: skip
    served = {printable(name): item for name, item in report.served.items()}
    errors = [served[row[0]].error for row in found if row[0] in served]
    assert errors == sorted(errors, reverse=True) and errors[0] == report.largest
    for row in found:
        if row[0] not in served:
            assert row[0] in report.excluded and row[2] == "–"
            continue
        item = served[row[0]]
        assert row[1] == ("base model" if item.fate == "base" else item.by)
        figures = (item.error, item.missing, item.foreign)
        assert row[2:5] == [markup.percent(value) for value in figures]
        assert float(row[5]) == pytest.approx(item.cosine, abs=5.1e-5)
        assert row[6] == markup.percent(item.worst[1]) and row[7] == (item.worst[0] or "–")


def test_search_finds_tenants_and_adapters(page, report):
    total = report.tenants + len(report.excluded)
    rep = report.groups[0]
    assert search(page, "tenants", rep.id.upper()) == f"{len(rep.members)} of {total} tenants"
    assert {row[0] for row in page.evaluate(CELLS)} == {printable(n) for n in rep.members}
    for name in HOSTILE:
        assert search(page, "tenants", name if name.isprintable() else printable(name)).startswith(
            "1 of"
        )
        assert page.evaluate(CELLS)[0][0] == printable(name)
    assert search(page, "tenants", "no such tenant").startswith("0 of")
    assert page.evaluate(CELLS) == []
    assert search(page, "tenants", "") == f"{total} tenants"
    assert page.errors == []


def test_pages_sorting_and_filters(page, report):
    search(page, "tenants", "")
    press = "document.querySelectorAll('[data-table=tenants] {}')[{}].click()"
    first = page.evaluate(CELLS)
    page.evaluate(press.format(".pages button", 1))
    second = page.evaluate(CELLS)
    assert not {row[0] for row in first} & {row[0] for row in second}
    page.evaluate(press.format(".pages button", 0))
    assert page.evaluate(CELLS) == first
    page.evaluate(press.format("th button", 2))
    sign = "document.querySelectorAll('[data-table=tenants] th')[2].ariaSort"
    assert page.evaluate(sign) == "ascending"
    assert page.evaluate(CELLS)[0][2] == markup.percent(0.0)
    page.evaluate(press.format("th button", 2))
    assert page.evaluate(sign) == "descending" and page.evaluate(CELLS) == first
    page.evaluate(
        "(() => { const filter = document.querySelector('[data-table=tenants] select');"
        "filter.value = 'own'; filter.dispatchEvent(new Event('change')); })()"
    )
    own = {printable(name) for name, item in report.served.items() if item.fate == "own"}
    assert {row[0] for row in page.evaluate(CELLS)} == own
    page.evaluate(ROWS.format("adapters") + "[0].querySelector('button').click()")
    assert {row[0] for row in page.evaluate(CELLS)} == {
        printable(name) for name in report.groups[0].members
    }


def test_the_map_is_read_by_keys(page, report):
    found = report.similarity
    page.evaluate("document.querySelector('canvas.map').focus()")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        page.press(key)
    said = page.evaluate("document.getElementById('pair').textContent")
    assert said.startswith(f"{printable(found.names[0])} and {printable(found.names[2])}: ")
    assert f"ΔW {found.delta[0][2]:.2f}, outputs {found.outputs[0][2]:.2f}" in said
    drawn = page.evaluate(
        "(() => { const canvas = document.querySelector('canvas.map');"
        "const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;"
        "return new Set(Array.from({length: data.length / 4}, (_, i) => "
        "data.slice(4 * i, 4 * i + 3).join())).size })()"
    )
    assert drawn > 5
    assert page.errors == []


def test_light_and_dark(page):
    colour = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(colour)
    page.evaluate("document.getElementById('scheme').click()")
    assert page.evaluate(colour) != before
    page.evaluate("document.getElementById('scheme').click()")
    assert page.evaluate(colour) == before


def test_nothing_is_wider_than_a_telephone(report, tmp_path):
    (tmp_path / "fleet.html").write_text(fleet_html.page(report), encoding="utf-8")
    with opened(tmp_path / "fleet.html", tmp_path / "profile") as page:
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=360,
            height=740,
            deviceScaleFactor=2,
            mobile=True,
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.errors == []


def test_ten_thousand_tenants_stay_usable_and_print(report, tmp_path):
    some = [(name, item) for name, item in report.served.items() if item.fate != "base"]
    many = {f"t{i:05d}/{some[i % len(some)][0]}": some[i % len(some)][1] for i in range(10_000)}
    large = replace(report, served={**report.served, **many})
    (tmp_path / "fleet.html").write_text(fleet_html.page(large), encoding="utf-8")
    with opened(tmp_path / "fleet.html", tmp_path / "profile") as page:
        started = page.evaluate("performance.now()")
        for words in ("t0", "t09999", "t0999", ""):
            search(page, "tenants", words)
        assert page.evaluate("performance.now()") - started < 4000  # on a busy machine
        assert search(page, "tenants", "t09999").startswith("1 of 10,0")
        search(page, "tenants", "")
        printed = base64.b64decode(page.call("Page.printToPDF", printBackground=True)["data"])
        assert printed.startswith(b"%PDF") and printed.count(b"/Type /Page\n") > 10
        assert page.errors == []
