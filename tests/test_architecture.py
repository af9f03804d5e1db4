"""The house: imports go one way, heavy libraries have one door each, and `dlcm --help` answers at once."""

import ast
import resource
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dlcm", "flops", "sweeps", "analysis")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
SOLE_IMPORTERS = {"submitit": ["sweeps/submit.py"], "fvcore": ["flops/measure.py"]}
NEVER = {"analysis": {"torch", "submitit", "lm_eval"}, "flops": {"submitit", "lm_eval"}, "sweeps": {"fvcore"}}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
HELP_SECONDS = 0.5


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_by(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def loaded_by(statement: str, modules: set[str]) -> list[str]:
    """Which of `modules` a fresh interpreter has loaded after `statement`."""
    code = f"import sys\n{statement}\nprint(*sorted(set({sorted(modules)!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    above = set(PACKAGES[PACKAGES.index(package) + 1 :])
    assert imported_by(path) & above == set()
    assert imported_by(path) & NEVER.get(package, set()) == set()


@pytest.mark.slow
@pytest.mark.parametrize("library", SOLE_IMPORTERS)
def test_a_library_with_one_door_is_imported_there_alone(library):
    assert [relative(path) for path in FILES if library in imported_by(path)] == SOLE_IMPORTERS[library]


def test_command_modules_import_only_typer_each_other_and_the_standard_library_at_the_top():
    modules = [p for p in ROOT.glob("*/*.py") if p.name.endswith("commands.py") or p.name in ("verbs.py", "options.py")]
    modules = [path for path in modules if path.parent.name in PACKAGES]
    light = {f"{path.parent.name}.{path.stem}" for path in modules}
    assert {"analysis.commands", "analysis.verbs", "analysis.options", "sweeps.commands", "dlcm.commands"} <= light
    for path in modules:
        top = {
            name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        heavy = {name for name in top - light if name.split(".")[0] not in sys.stdlib_module_names}
        assert heavy <= {"typer", "click"}, path


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_loads_nothing_heavy(package):
    heavy = {"torch", "submitit", "pandas", "scipy", "matplotlib", "lm_eval", "fvcore", "tokenizers"}
    assert loaded_by(f"import {package}", heavy) == []


@pytest.mark.slow
def test_analysis_loads_no_torch_even_when_all_of_it_is_imported():
    modules = [f"analysis.{path.stem}" for path in FILES if path.parent.name == "analysis" and path.stem != "__init__"]
    assert loaded_by(f"import {', '.join(['analysis', *modules])}", {"torch", "submitit", "fvcore", "lm_eval"}) == []


def test_all_packages_resolve_to_one_parent():
    # A wheel named `sweeps` exists elsewhere and would overwrite ours without a word.
    parents = set()
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        parents.add(Path(spec.origin).resolve().parents[1])
    assert parents == {ROOT}


def help_text() -> str:
    command = [sys.executable, "-c", "from dlcm.cli import main; main()", "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_help_lists_every_verb_with_a_line_each():
    shown = [line.strip() for line in help_text().splitlines()]
    for point in entry_points(group="dlcm.commands"):
        group = point.name.partition(".")[0]
        for command in point.load().registered_commands:
            name = command.name or command.callback.__name__.replace("_", "-")
            full = name if group == "model" else f"{group} {name}"
            assert any(line.startswith(full + " ") and len(line) > len(full) + 10 for line in shown), full


def test_help_answers_at_once():
    # The promise is half a second; twice that is allowed here, of the processor's time, because tests run on busy machines.
    best = min(_seconds_of_help() for _ in range(3))
    assert best < 2 * HELP_SECONDS


def _seconds_of_help() -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    help_text()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            # The docstring is not what makes a function long to read.
            start = (first.end_lineno or 0) if documented else node.lineno
            assert (node.end_lineno or 0) - start <= MAX_FUNCTION_LINES, f"{node.name} at line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_public_definition_has_a_docstring(path):
    if path.stem == "__main__":
        return
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} at line {node.lineno}"
