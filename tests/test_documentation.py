"""The documentation is true: links lead somewhere, commands and options exist, the sweep file plans."""

import re
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


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(".venv/bin/dlcm ")]


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_exists_with_its_options(dlcm, command):
    words = command.split()[1:]
    verb = words[:2] if words[0] in ("sweep", "flops", "analyze") else words[:1]
    status, out, _ = dlcm(*verb, "--help")
    assert status == 0
    assert [w for w in words if w.startswith("--") and w not in out] == []


@pytest.mark.parametrize("target", ["demo", "test", "setup", "check"])
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
