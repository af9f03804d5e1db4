"""YAML as people write it: `3e-3` and `1_000_000` are numbers, a repeated key is an error, errors are one line."""

import re
from pathlib import Path
from typing import Any

import yaml

from dlcm.errors import UserError

# YAML 1.1 wants a dot and a signed exponent in a float, so PyYAML reads 3e-3 and 1e6 as strings.
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
# A leading zero is not octal and a colon is not base 60: `010` and `1:30` are what they look like.
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_REPLACED = {f"tag:yaml.org,2002:{name}" for name in ("float", "int", "bool", "timestamp")}


class _Loader(yaml.SafeLoader):
    """Safe loader with the number forms above; `yes`, `no`, `on`, `off` and dates stay strings."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own class attribute, copied so that the parent keeps its own)
        first: [(tag, pattern) for tag, pattern in pairs if tag not in _REPLACED]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; refuse a key that stands twice in the same block (a merged key may be overridden)."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key '{key.value}' stands twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Args:
        path: the file.

    Raises:
        UserError: missing or unreadable file, syntax error or repeated key (with its line), or no mapping at the top.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as UTF-8 text ({error})") from None
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise UserError(f"{place}: {error.problem or error.context or 'not valid YAML'}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(data, dict):
        found = "nothing" if data is None else type(data).__name__
        raise UserError(f"{path}: expected a mapping of keys to values at the top level, found {found}")
    if odd := [key for key in data if not isinstance(key, str)]:
        raise UserError(f"{path}: the key {odd[0]!r} is not text; quote it")
    return data
