"""Adds the reference of the Python interface to the site: a page for each package and one for each module."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PACKAGES = ("dlcm", "flops", "sweeps", "analysis")
# Modules that hold commands: their pages are those of the command line.
_COMMANDS = ("commands", "verbs")
_NAME = re.compile(r"(?<![\[`])`((?:dlcm|flops|sweeps|analysis)(?:\.\w+)+)`(?!`)")
_FILE = re.compile(r"\[([^\]]*)\]\(\.\./([\w./]+)\)")


def modules(package: str) -> Iterator[tuple[str, str]]:
    """Dotted name and first sentence of the docstring of every module of a package that holds something to import."""
    for path in sorted((ROOT / package).rglob("*.py")):
        if path.stem.startswith("__") or path.stem.endswith(_COMMANDS):
            continue
        name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        yield name, first_paragraph(path)


def first_paragraph(path: Path) -> str:
    """What a module says of itself in its first paragraph, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def exports(package: str) -> dict[str, str]:
    """Public names of a package and the modules that define them, as it hands them to `lazy_exports`."""
    return dict(vars(import_module(package))["_exports"])


def package_page(package: str) -> str:
    """A package: what it is for, what it exports, and its modules."""
    lines = [f"# `{package}`", "", first_paragraph(ROOT / package / "__init__.py"), ""]
    public = exports(package)
    if public:
        lines += [f"## From `{package}` itself", "", "| name | defined in |", "|---|---|"]
        for name, module in sorted(public.items(), key=lambda item: item[0].lower()):
            target = f"{module}.{name}" if has_entry(module, name) else module
            lines.append(f"| `{name}` | [`{module}`][{target}] |")
        lines.append("")
    lines += ["## Modules", "", "| module | |", "|---|---|"]
    lines += [f"| [`{name}`][{name}] | {cell(told)} |" for name, told in modules(package)]
    return "\n".join(lines) + "\n"


def has_entry(module: str, name: str) -> bool:
    """Whether the page of a module has an entry of that name: a function, a class, or an attribute with a docstring."""
    body = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")).body
    for node, behind in zip(body, [*body[1:], ast.Pass()]):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return True
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        told = isinstance(behind, ast.Expr) and isinstance(behind.value, ast.Constant)
        if told and any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return True
    return False


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return text.replace("|", "\\|")


def path_of(name: str) -> str:
    """Where the page of a module stands, below the documentation; a package's is the index of its folder."""
    return f"api/{name}/index.md" if name in PACKAGES else f"api/{name.replace('.', '/')}.md"


def pages() -> dict[str, str]:
    """Path below the documentation -> Markdown, of every generated page."""
    found = {path_of(package): package_page(package) for package in PACKAGES}
    for package in PACKAGES:
        found |= {path_of(name): f"::: {name}\n" for name, _ in modules(package)}
    return found


@cache
def entries() -> frozenset[str]:
    """Everything that has a place in the reference: packages, modules, what they define, and methods with a docstring."""
    found = set(PACKAGES)
    for module in (name for package in PACKAGES for name, _ in modules(package)):
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        found.add(module)
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            found.add(f"{module}.{node.name}")
            methods = node.body if isinstance(node, ast.ClassDef) else []
            named = [m for m in methods if isinstance(m, ast.FunctionDef) and ast.get_docstring(m)]
            found |= {f"{module}.{node.name}.{m.name}" for m in named if not m.name.startswith("_")}
    return frozenset(found)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead from the names and files of functions, classes and modules in the text of a page to their places in the reference.

    The sources of the pages hold bare names, and links to files of the repository, since they are read on code hosts too. A file
    that is not part of the site (a notebook, say) is named without a link.
    """

    def named(found: re.Match[str]) -> str:
        return f"[{found[0]}][{found[1]}]" if found[1] in entries() else found[0]

    def in_repository(found: re.Match[str]) -> str:
        module = found[2].removesuffix(".py").replace("/", ".")
        return f"[{found[1]}][{module}]" if module in entries() else f"`{found[2]}`"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(p if p.startswith("```") else _FILE.sub(in_repository, _NAME.sub(named, p)) for p in parts)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages into the navigation, behind those that are written."""
    section: list[dict[str, Any]] = []
    for package in PACKAGES:
        below = [{name.removeprefix(f"{package}."): path_of(name)} for name, _ in modules(package)]
        section.append({package: [path_of(package), *below]})
    assert config.nav is not None
    config.nav.append({"Python": section})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Hand the generated pages over."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files
