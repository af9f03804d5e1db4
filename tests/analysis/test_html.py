"""The report as one HTML file: what it holds, and that a real browser can use it without a network."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from analysis import laws
from analysis.explorer import explore
from analysis.regret import regret
from analysis.report import analyze
from analysis.search import Search
from tests.analysis.conftest import PLANTED_DLCM, cost

BUDGETS = np.geomspace(1e12, 1e14, 3)
pytestmark = pytest.mark.slow  # one report for all of them


@pytest.fixture(scope="module")
def page(adequate_frame, tmp_path_factory) -> Path:
    """The report of the planted sweep, beside a folder of run configs."""
    folder = tmp_path_factory.mktemp("report")
    adequate_frame.to_parquet(folder / "results.parquet")
    for i, run in enumerate(adequate_frame["run_id"]):
        (folder / run).mkdir()
        config = {"schema": 1, "model": {"d_token": 64 + i, "kind": "<script>alert(1)</script>"}, "seed": 0}
        (folder / run / "run.json").write_text(json.dumps(config))
    analyze(folder, folder / "report", cost=cost, n_bootstrap=60)
    return folder / "report" / "report.html"


def embedded(page: Path) -> dict:
    return json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])


def test_the_page_is_one_small_file_that_asks_no_network(page):
    text = page.read_text()
    assert page.stat().st_size < 10e6
    assert "default-src 'none'" in text
    own = re.sub(r"<script>/\*\*.*?</script>", "", text, flags=re.DOTALL)  # plotly's own code names its home
    assert len(own) < len(text) - 4e6
    assert re.findall(r"""(?:src|href)=["']?https?:""", own) == []
    assert "@import" not in own


def test_every_run_every_fit_and_the_summary_are_in_the_page(page, adequate_frame):
    text, data = page.read_text(), embedded(page)
    names = [c["name"] for c in data["columns"]]
    assert {row[names.index("run")] for row in data["runs"]} == set(adequate_frame["run_id"])
    for part in ("What was asked", "What was spent", "How sure", "The answer", "Fit card", "Provenance"):
        assert part in text
    loss = dict(zip(adequate_frame["run_id"], adequate_frame["loss_nats"]))
    for row in data["runs"]:
        assert row[names.index("loss nats")] == pytest.approx(loss[row[names.index("run")]], rel=1e-5)


def test_configs_are_kept_once_where_all_runs_share_them_and_end_no_script(page):
    configs = embedded(page)["configs"]
    assert configs["shared"]["model.kind"] == "<script>alert(1)</script>"
    assert all(set(own) == {"model.d_token"} for own in configs["runs"].values())
    assert "<script>alert(1)" not in page.read_text()


def test_the_explorer_holds_the_optimum_and_the_regret_of_each_choice(adequate_fits):
    found = explore(adequate_fits["dlcm"], cost, BUDGETS, n_ratios=5, n_shares=5)
    box = {name: adequate_fits["dlcm"].ranges[name] for name in "NRP"}
    for i, budget in enumerate(BUDGETS):
        best = Search(laws.COMPRESSION_AWARE, cost, budget, box).minimise(adequate_fits["dlcm"].values)
        np.testing.assert_allclose(found.best.points[i], best, rtol=1e-3)
        for s, r in ((0, 0), (2, 3), (4, 1)):
            R, P = float(found.ratios[r]), float(found.shares[s])
            alone = regret(adequate_fits["dlcm"], cost, float(budget), R=R, P=P, force=True)
            assert found.regret[i, s, r] == pytest.approx(alone.value, abs=2e-5)
            assert found.low is not None
            assert found.low[i, s, r] == pytest.approx(alone.low, abs=2e-4)


# -- in a browser ----------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as run:
        opened = run.chromium.launch(executable_path=CHROMIUM, args=FLAGS, chromium_sandbox=False)
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, page):
    """The page with what it complained of and asked for."""
    tab = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True).new_page()
    tab.complaints, tab.requests = [], []
    tab.on(
        "console", lambda message: tab.complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.on("request", lambda request: tab.requests.append(request.url))
    tab.goto(page.as_uri())
    tab.wait_for_function("document.querySelectorAll('#figures .main-svg').length > 4")
    yield tab
    assert tab.complaints == []
    assert [url for url in tab.requests if not url.startswith(("file:", "data:", "blob:"))] == []
    tab.context.close()


def numbers(tab, selector: str) -> list[float]:
    return [float(text) for text in tab.locator(selector).all_inner_texts()]


def nats_lost(tab) -> float:
    return float(re.findall(r"([\d.e-]+) nats \(", tab.locator("#regret").inner_text())[0])


@pytest.mark.slow
def test_the_explorer_moves_to_the_planted_optimum(opened, adequate_frame):
    budgets = [
        row["budget"]
        for row in opened.evaluate("JSON.parse(document.getElementById('data').textContent)")["explorers"][0]["budgets"]
    ]
    at = int(np.argmin(np.abs(np.log(np.array(budgets) / 1e13))))
    opened.locator("#budget").evaluate(f"e => {{ e.value = {at}; e.dispatchEvent(new Event('input')) }}")
    rows = opened.locator("#best tbody tr").all()
    shown = {row.locator("th").inner_text(): row.locator("td").all_inner_texts() for row in rows}
    box = {"N": (1e5, 6e6), "R": (2.0, 8.0), "P": (0.3, 0.7)}
    truth = dict(zip("NDRP", Search(laws.COMPRESSION_AWARE, cost, budgets[at], box).minimise(PLANTED_DLCM)))
    for name, symbol in (("tokens per concept R", "R"), ("backbone share P", "P")):
        value, ends = shown[name]
        if value != "not identified":
            low, high = (float(v) for v in ends.split(" to "))
            assert low * 0.98 <= truth[symbol] <= high * 1.02
    assert "0" in opened.locator("#regret").inner_text()
    # another choice loses, and the way back leads to the best
    opened.locator("#ratio").fill("8")
    opened.locator("#ratio").press("Enter")
    assert "above the least" in opened.locator("#regret").inner_text()
    lost = nats_lost(opened)
    opened.locator("#to-best").click()
    assert lost > nats_lost(opened)
    opened.locator("#share").fill("0.99")
    opened.locator("#share").press("Enter")
    assert "Beyond the data" in opened.locator("#regret").inner_text()
    opened.locator("#budget").evaluate("e => { e.value = e.max; e.dispatchEvent(new Event('input')) }")
    assert opened.locator("#outside").is_visible()


@pytest.mark.slow
def test_the_table_sorts_filters_and_opens_a_run(opened, adequate_frame):
    head = opened.locator("#table thead th", has_text="loss nats")
    column = 1 + opened.locator("#table thead th").all_inner_texts().index("loss nats")
    head.locator("button").click()
    losses = numbers(opened, f"#table tbody td:nth-child({column})")
    assert losses == sorted(losses)
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").press("Enter")
    assert numbers(opened, f"#table tbody td:nth-child({column})")[0] == pytest.approx(
        adequate_frame["loss_nats"].max(), rel=1e-3
    )
    opened.locator("#filter").fill("loss nats < 3")
    n = int((adequate_frame["loss_nats"] < 3).sum())
    assert opened.locator("#count").inner_text() == f"{n} of {len(adequate_frame)} runs"
    opened.locator("#filter").fill("model = dense")
    assert opened.locator("#table tbody tr").count() == int((adequate_frame["model"] == "dense").sum())
    opened.locator("#table tbody .open").first.click()
    assert opened.locator("#run").is_visible()
    assert "model.d_token" in opened.locator("#run").inner_text()
    opened.keyboard.press("Escape")
    assert not opened.locator("#run").is_visible()


@pytest.mark.slow
def test_a_click_on_a_point_opens_the_config_of_its_run(opened):
    opened.locator("#figure-residuals").scroll_into_view_if_needed()
    run = opened.evaluate("document.getElementById('figure-residuals').data[0].customdata[0]")
    opened.evaluate(
        "() => { const e = document.getElementById('figure-residuals');"
        " e.emit('plotly_click', { points: [{ customdata: e.data[0].customdata[0] }] }) }"
    )
    assert opened.locator("#run-title").inner_text() == run


@pytest.mark.slow
def test_at_phone_width_nothing_runs_out_of_the_page_and_both_themes_are_readable(opened):
    opened.set_viewport_size({"width": 375, "height": 740})
    opened.wait_for_timeout(500)
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for _ in range(2):
        opened.locator("#theme").click()
        fg, bg = opened.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        light = [
            np.dot([0.2126, 0.7152, 0.0722], [(int(v) / 255) ** 2.2 for v in re.findall(r"\d+", c)[:3]])
            for c in (fg, bg)
        ]
        assert (max(light) + 0.05) / (min(light) + 0.05) > 7  # contrast as WCAG's AAA asks
