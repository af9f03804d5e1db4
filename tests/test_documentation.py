"""The documentation is true: links lead somewhere, commands and options exist, the sweep file plans."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.render import render
from dlcm.yaml_io import load_yaml
from sweeps import Sweep, plan

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_local_link_and_picture_exists(page):
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert [t for t in targets if not (page.parent / t).exists()] == []


def commands() -> list[tuple[str, str]]:
    """Page and command of every line of a shell block that calls `dlcm`."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            lines = [line.split("#")[0].strip().removeprefix(".venv/bin/") for line in block.splitlines()]
            found += [(page.name, line) for line in lines if line.startswith("dlcm ")]
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_of_the_documentation_exists_with_its_options(dlcm, page, command):
    words = command.split()[1:]
    verb = words[:2] if words[0] in ("sweep", "flops", "analyze") else words[:1]
    status, out, _ = dlcm(*verb, "--help")
    assert status == 0
    assert [w for w in words if w.startswith("--") and w not in out] == []


@pytest.mark.parametrize("target", ["demo", "test", "setup", "check", "docs"])
def test_every_make_target_of_the_documentation_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_sweep_file_of_the_readme_is_the_demo(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "readme.yaml").write_text(blocks[0])
    shown, shipped = (plan(Sweep.from_yaml(p)) for p in (tmp_path / "readme.yaml", ROOT / "sweeps/recipes/demo.yaml"))
    assert [run.run_id for run in shown.runs] == [run.run_id for run in shipped.runs]


def test_the_cluster_block_of_the_readme_is_valid(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "cluster.yaml").write_text(blocks[1])
    spec = load_yaml(ROOT / "sweeps/recipes/demo.yaml") | load_yaml(tmp_path / "cluster.yaml")
    assert Sweep.from_dict(spec).cluster.partition == "gpu"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_table_of_results_is_the_recorded_one(page):
    """`python benchmarks/render.py` brings a page up to date."""
    assert render(page.read_text()) == page.read_text()


def test_every_function_that_the_page_of_the_model_names_exists():
    names = set(re.findall(r"`((?:dlcm|flops|sweeps|analysis)(?:\.\w+){2,})`", (ROOT / "docs/model.md").read_text()))
    assert len(names) > 15
    for name in sorted(names):
        assert resolved(name) is not None, name


def resolved(name: str) -> object:
    """The object of a dotted path: as much of it as is a module, then attributes."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            found = getattr(found, part)
        return found
    return None


GUIDE = ("docs/fitting.md", "docs/fitting_validate.md", "docs/optimum.md")
"""Pages whose commands are run, one page after the other in one folder."""


def guide_commands() -> list[str]:
    text = "\n".join((ROOT / page).read_text() for page in GUIDE)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line]


@pytest.mark.slow
def test_the_guide_to_fitting_runs_as_it_stands_and_finds_what_was_planted(tmp_path):
    """Its commands one after the other in an empty folder, then its Python."""
    page = (ROOT / "docs/fitting.md").read_text()
    script = "\n".join(["set -e", *guide_commands()]).replace("python docs/", f"{sys.executable} {ROOT}/docs/")
    python = [
        block
        for name in GUIDE
        for block in re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)[:1]
    ]
    truth = "assert best['P'].low < 0.644 < best['P'].high\n"
    (tmp_path / "guide.py").write_text("".join(text + truth for text in python))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    for command in (["bash", "-c", script], [sys.executable, "guide.py"]):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "frontier.png").exists()
    assert (tmp_path / "dense_frontier.csv").exists()
    assert (tmp_path / "isoflop.png").exists()
    # each line that the guide shows of the optimum is one that the tool still prints
    shown = page[page.index("Least predicted loss at 3e+19") :].split("```")[0].splitlines()[0]
    assert shown.split(" nats")[0][:60] in subprocess.run(
        ["dlcm", *["analyze", "optimum", "dlcm.json", "--vocab-size", "32768", "--seq-len", "2048", "--budget", "3e19"]],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
