"""The site: it builds without a warning, opens without a network, leads nowhere that is not there, and leaves nothing out."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock

from dlcm.config import RunConfig
from sweeps import Sweep
from sweeps.axes import valid_paths
from sweeps.cluster_config import ClusterConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGES = ("dlcm", "flops", "sweeps", "analysis")
# Elements that the pages are made of; any other was meant as text, as the <n> of a docstring, and is lost.
_NAMES = """
    a abbr article aside autoref b blockquote body br button code dd details div dl dt em footer form h1 h2 h3 h4 h5 h6 head header hr
    html iframe img input label li link main meta nav ol p path pre script small source span strong style sub summary sup svg table
    tbody td th thead title tr ul
"""
ELEMENTS = set(re.findall(r"\w+", _NAMES))


@dataclass
class Page(HTMLParser):
    """What a page loads, where it leads, and what may be led to."""

    path: Path
    loads: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    elements: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.elements.add(tag)
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("next", "prev", "canonical"):
            self.loads.append(given["href"])
        self.loads += [given[name] for name in ("src", "srcset", "data", "poster") if name in given]


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The site, built once for all workers of the test run."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared
    folder = shared / "site"
    with FileLock(shared / "site.lock"):
        if not (folder / "built").exists():
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
            environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            (folder / "built").touch()
    return folder


@pytest.fixture(scope="session")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def definitions() -> Iterator[str]:
    """Dotted path of every public function, class and method of the packages; commands and start files are none."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if path.stem.startswith("__") or path.stem.endswith(("commands", "verbs")):
                continue
            module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
            for node in ast.parse(path.read_text()).body:
                if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                    continue
                yield f"{module}.{node.name}"
                inner = node.body if isinstance(node, ast.ClassDef) else []
                for method in inner:
                    public = isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
                    if public and ast.get_docstring(method):
                        yield f"{module}.{node.name}.{method.name}"


@pytest.mark.slow
def test_every_page_that_is_written_is_built(site):
    written = [path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md")]
    assert len(written) > 12
    assert [str(path) for path in written if not (site / path).exists()] == []


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site, pages):
    remote = re.compile(r"^\s*(https?:)?//")
    assert {(page.path.name, url) for page in pages.values() for url in page.loads if remote.match(url)} == set()
    styles = "\n".join(path.read_text() for path in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)]*", styles) == []


@pytest.mark.slow
def test_every_link_leads_somewhere(pages):
    lost = []
    for page in pages.values():
        for url in [*page.links, *page.loads]:
            parts = urlsplit(url)
            if parts.scheme:
                continue
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
            anchor = unquote(parts.fragment)
            known = pages[target].ids if target in pages else set()
            if not target.exists() or (
                anchor and anchor != "__comments" and target.suffix == ".html" and anchor not in known
            ):
                lost.append((page.path.name, url))
    assert lost == []


@pytest.mark.slow
def test_no_text_is_lost_as_an_element(pages):
    odd = {(page.path.name, tag) for page in pages.values() for tag in page.elements - ELEMENTS}
    assert odd == set(), "write <name> in code, or with &lt;"


@pytest.mark.slow
def test_the_reference_has_every_public_definition(pages):
    ids = set().union(*(page.ids for page in pages.values()))
    names = set(definitions())
    assert len(names) > 500
    assert sorted(names - ids) == []
    # fields of configs are described by their Field, not by a docstring
    assert "dlcm.config.BoundaryConfig.compression_ratio" in ids


@pytest.mark.slow
def test_the_page_of_commands_has_every_command_and_option(site):
    text = re.sub(r"<[^>]+>", "", (site / "cli.html").read_text())
    for point in entry_points(group="dlcm.commands"):
        group = point.name.partition(".")[0]
        for command in point.load().registered_commands:
            name = command.name or command.callback.__name__.replace("_", "-")
            full = f"dlcm {name}" if group == "model" else f"dlcm {group} {name}"
            begin = text.index(f"$ {full} ")
            told = text[begin : text.find("$ dlcm", begin + 1)]
            shown = set(re.findall(r"--[a-z][a-z-]+", told))
            assert options(command.callback) <= shown, full


def options(callback) -> set[str]:
    """Long names of the options that the annotations of a command declare."""
    return {
        flag
        for hint in callback.__annotations__.values()
        for meta in getattr(hint, "__metadata__", ())
        for flags in getattr(meta, "param_decls", None) or ()
        for flag in flags.split("/")
        if flag.startswith("--")
    }


@pytest.mark.slow
def test_names_in_the_text_lead_to_the_reference(pages, site):
    links = pages[site / "model.html"].links
    assert "api/dlcm/boundary.html#dlcm.boundary.ratio_loss" in links
    assert "api/analysis/bootstrap.html#analysis.bootstrap" in pages[site / "fitting.html"].links


def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium; `apt-get install chromium` brings it")
    return found


def dom(url: str, profile: Path, *flags: str) -> str:
    """The page as a browser has it when its scripts have run."""
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    quiet += ["--disable-background-networking", "--disable-component-update", "--virtual-time-budget=20000"]
    quiet.append(f"--user-data-dir={profile}")
    command = [browser(), *quiet, *flags, "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.slow
def test_the_search_works_from_the_disk(site, tmp_path):
    # The browser may reach nothing, and a file: page may start no worker.
    shown = dom(f"{(site / 'index.html').as_uri()}?q=compression", tmp_path, "--host-resolver-rules=MAP * ~NOTFOUND")
    assert re.search(r"\d+ matching documents", shown)
    assert "model.boundary" in shown


@pytest.mark.slow
def test_pages_fit_a_phone(site, tmp_path):
    """A page with a frame of 390 px for each page, and as its title how wide they find themselves."""
    names = ["index", "quickstart", "sweep_file", "cluster", "model", "flops", "fitting", "faq", "cli", "gallery"]
    names += ["api/analysis/index", "api/analysis/result", "api/dlcm/config"]
    frames = "".join(f'<iframe src="{name}.html" width="390" height="800"></iframe>' for name in names)
    widths_of = "[...document.querySelectorAll('iframe')].map((f) => f.contentDocument.documentElement.scrollWidth)"
    script = f"document.title = {widths_of}.join(' ')"
    probe = site / "probe.html"
    probe.write_text(f'<body onload="{script}">{frames}')
    try:
        shown = dom(probe.as_uri(), tmp_path, "--allow-file-access-from-files", "--disable-web-security")
    finally:
        probe.unlink()
    found = re.search(r"<title>([\d ]+)</title>", shown)
    assert found is not None
    widths = dict(zip(names, map(int, found[1].split()), strict=True))
    assert {name: width for name, width in widths.items() if width > 390} == {}


# -- what is written, without building the site -----------------------------------------------------------------------


def sweep_keys():
    """The module that writes the tables of the sweep file's page."""
    sys.path.insert(0, str(DOCS / "hooks"))
    try:
        import sweep_keys as module
    finally:
        sys.path.remove(str(DOCS / "hooks"))
    return module


@pytest.mark.slow
def test_the_tables_of_the_sweep_file_are_current():
    module = sweep_keys()
    page = module.PAGE.read_text()
    assert module.render(page) == page, "run: python docs/hooks/sweep_keys.py"


def test_the_page_of_the_sweep_file_has_every_key_once_with_its_description():
    page = (DOCS / "sweep_file.md").read_text()
    sections = dict(re.findall(r"<!-- keys: (\S+) -->\n(.*?)<!-- end -->", page, re.DOTALL))
    rows = {name: re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE) for name, text in sections.items()}
    assert rows["top"] == list(Sweep.model_fields)
    assert rows["cluster"] == list(ClusterConfig.model_fields)
    shown = [f"{name}.{key}" for name in ("model", "model.boundary", "data", "optim", "train") for key in rows[name]]
    assert sorted([*shown, *rows["design"], *rows["run"]]) == sorted(valid_paths())
    for name, field_ in RunConfig.model_fields["train"].annotation.model_fields.items():
        assert field_.description.split("`")[0][:60] in sections["train"], name


def test_the_gallery_shows_every_figure_with_what_makes_it():
    page = (DOCS / "gallery.md").read_text()
    shown = re.findall(r"!\[[^\]]{20,}\]\(figures/([\w.]+)\)", page)
    figures = [path.name for path in (DOCS / "figures").iterdir() if path.suffix in (".png", ".svg")]
    assert sorted(shown) == sorted(figures)
    for section in page.split("\n## ")[1:]:
        (block,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
        files = re.findall(r"\b(?:docs|benchmarks|sweeps|notebooks)/[\w./]+", block)
        assert [name for name in files if not (ROOT / name).exists()] == [], section.splitlines()[0]


def test_the_pitfalls_have_a_question_an_answer_and_what_the_tool_does():
    entries = (DOCS / "faq.md").read_text().split("\n### ")[1:]
    assert len(entries) >= 20
    for entry in entries:
        assert "?" in entry.splitlines()[0] or "." in entry.splitlines()[0]
        assert entry.count("**The tool**") == 1, entry.splitlines()[0]
