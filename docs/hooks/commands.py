"""Puts the reference of every command into the page cli.md, where it says so, from the commands themselves."""

import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from typer.main import get_command

from dlcm.cli import build_app

MARK = "<!-- commands -->"


def reference(root: Any = None, name: str = "dlcm") -> str:
    """Markdown of all commands: a heading for each group, one for each command, its arguments and options as lists."""
    root = root or get_command(build_app())
    context = root.make_context(name, [], resilient_parsing=True)
    groups: dict[str, list[str]] = {"": []}
    for word in root.list_commands(context):
        command = root.get_command(context, word)
        if hasattr(command, "list_commands"):
            with_verbs = groups.setdefault(word, [f"## dlcm {word}", literal(command.help or "")])
            inner = command.make_context(word, [], parent=context, resilient_parsing=True)
            for verb in command.list_commands(inner):
                with_verbs.append(one(command.get_command(inner, verb), inner, verb))
        else:
            groups[""].append(one(command, context, word))
    groups[""].insert(0, "## dlcm\n\nOne run: train it, measure it, use it.")
    return "\n\n".join(line for lines in groups.values() for line in lines if line)


def one(command: Any, parent: Any, word: str) -> str:
    """One command: help, usage, arguments, options."""
    context = command.make_context(word, [], parent=parent, resilient_parsing=True)
    lines = [f"### {context.command_path}", "", literal(command.help or ""), ""]
    lines += ["```console", f"$ {context.command_path} {' '.join(command.collect_usage_pieces(context))}", "```", ""]
    for param in command.get_params(context):
        record = param.get_help_record(context)
        if record is not None and "--help" not in param.opts:
            lines.append(f"- `{record[0]}`: {literal(record[1])}".rstrip(": "))
    return "\n".join(lines)


def literal(text: str) -> str:
    """Text that is read as it stands, not as Markdown; what is in backticks stays code."""
    code_or_mark = re.compile(r"`[^`]*`|[*_<\[\]|\\\\]")
    return code_or_mark.sub(lambda found: found[0] if len(found[0]) > 1 else "\\" + found[0], text)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill the page in."""
    if page.file.src_uri != "cli.md":
        return markdown
    assert MARK in markdown, f"cli.md has no {MARK}"
    return markdown.replace(MARK, reference())
