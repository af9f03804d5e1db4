"""Writes the tables of sweep_file.md from the schema of the sweep file: `python docs/hooks/sweep_keys.py`.

The page holds `<!-- keys: BLOCK -->` and `<!-- end -->`; what stands between them is made here, so that no key is described by
hand. Tests hold the page to the schema, and the blocks to those that there are.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sweeps.axes import ALIASES, DESIGN, valid_paths
from sweeps.schema import sweep_schema

PAGE = Path(__file__).parents[1] / "sweep_file.md"
_MARKED = re.compile(r"(<!-- keys: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
Schema = Mapping[str, Any]


def blocks() -> dict[str, dict[str, Schema]]:
    """Name of each block of the sweep file -> its keys and their schemas, each key of the file once."""
    schema = sweep_schema()
    definitions = schema["definitions"]
    found: dict[str, dict[str, Schema]] = {"top": schema["properties"]}
    found["design"] = {name: definitions[name] for name in (*DESIGN, *ALIASES)}
    for block in ("model", "model.boundary", "data", "optim", "train"):
        found[block] = {path: definitions[path] for path in valid_paths() if path.rpartition(".")[0] == block}
    found["run"] = {"seed": definitions["seed"]}
    named = {
        "data.mixture": "SourceConfig", "shape": "ShapeRule", "axes": "Axes", "budgets": "Budgets", "batch": "BatchRule",
        "warmup": "WarmupRule", "minimum": "Minimum", "baseline": "Baseline", "cluster": "ClusterConfig",
    }  # fmt: skip
    return found | {block: definitions[name]["properties"] for block, name in named.items()}


def table(block: str) -> str:
    """The keys of a block as a Markdown table."""
    lines = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for path, field in blocks()[block].items():
        key = path.removeprefix(f"{block}.")
        lines.append(f"| `{key}` | {values(field)} | {default(field)} | {_cell(field['description'])} |")
    return "\n".join(lines)


def values(field: Schema) -> str:
    """What may be written, in words."""
    kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
    # Both branches of a count say the same: a number, here with a unit.
    return " or ".join(dict.fromkeys(_kind(kind, kinds) for kind in kinds if not _is_count_text(kind))) + _unit(kinds)


def _kind(kind: Schema, kinds: list[Schema]) -> str:
    if "enum" in kind:
        return ", ".join(f"`{value}`" for value in kind["enum"])
    if "const" in kind:
        return f"`{kind['const']}`"
    if "$ref" in kind or "allOf" in kind:
        return "block"
    if kind.get("type") == "array":
        items = kind.get("items", {})
        if isinstance(items, list):
            return f"list of {len(items)} {_plural(_kind(items[0], kinds))}"
        return f"list of {_plural(values(items))}"
    if kind.get("type") == "object":
        return "block"
    name = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}[kind["type"]]
    return " ".join([name, *_range(kind)])


def _range(kind: Schema) -> list[str]:
    low = [f"> {kind['exclusiveMinimum']:g}"] if "exclusiveMinimum" in kind else []
    low += [f">= {kind['minimum']:g}"] if "minimum" in kind else []
    high = [f"< {kind['exclusiveMaximum']:g}"] if "exclusiveMaximum" in kind else []
    high += [f"<= {kind['maximum']:g}"] if "maximum" in kind else []
    return [", ".join(low + high)] if low or high else []


def _plural(text: str) -> str:
    """`whole number > 0` -> `whole numbers > 0`; blocks, names and texts likewise."""
    for word in ("number", "block", "text"):
        if text.startswith((word, f"whole {word}")):
            return text.replace(word, f"{word}s", 1)
    return text


def _is_count_text(kind: Schema) -> bool:
    return kind.get("type") == "string" and "kKmMbBtT" in kind.get("pattern", "")


def _unit(kinds: list[Schema]) -> str:
    return ", as `0.3M` too" if any(_is_count_text(kind) for kind in kinds) else ""


def default(field: Schema) -> str:
    """The default as it would be written in YAML; empty where a key is required, follows from others, or is off."""
    value = field.get("default")
    if value is None or value in ({}, []):
        return ""
    if isinstance(value, float):
        return f"`{value:.6g}`"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def render(page: str) -> str:
    """`page` with everything between its markers made anew."""
    return _MARKED.sub(lambda found: f"{found[1]}\n{table(found[2])}\n\n{found[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
