"""Axes over config fields by dotted path and over design variables; their expansion into points.

A point is a flat mapping: dotted path of a `RunConfig` field, or one of the design variables `size`, `concept_share` and
`parametrization`, which name no field because several follow from them. The sources of a mixture have names that the sweep gives:
`data.mixture.NAME.weight`.
"""

import difflib
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dlcm.config import Frozen, RunConfig
from dlcm.data_config import SourceConfig
from dlcm.errors import UserError, nearest

if TYPE_CHECKING:
    from sweeps.spec import Axes

# Names that stand for a config field: one way to write it, one way to store it.
ALIASES = {"compression_ratio": "model.boundary.compression_ratio", "boundary": "model.boundary.detector"}
# Keys whose values may be written as 0.3M.
COUNTS = ("size", "optim.warmup_tokens", "train.tokens", "train.batch_tokens", "train.micro_batch_tokens")
MIXTURE = "data.mixture"
_UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def parse_count(value: Any) -> Any:
    """A number, or a number with k, M, B or T behind it: `0.3M` is 300,000. Other values are returned as they are."""
    if isinstance(value, str) and value and value[-1].lower() in _UNITS:
        try:
            # The product of two floats is off in the last place (0.3 * 1e6); counts are read to 12 digits.
            return float(f"{float(value[:-1].replace('_', '')) * _UNITS[value[-1].lower()]:.12g}")
        except ValueError:
            return value
    return value


CountText = Annotated[str, Field(pattern=r"^[0-9][0-9._]*(e[+-]?[0-9]+)?[kKmMbBtT]?$")]
Count = Annotated[
    float, Field(gt=0), BeforeValidator(parse_count, json_schema_input_type=Annotated[float, Field(gt=0)] | CountText)
]
Parametrization = Literal["mup", "standard"]


class DesignVariables(Frozen):
    """What a sweep says in place of widths and depths. The shape solver consumes these; they are stored in no run config."""

    size: Count = Field(description="N, non-embedding parameters; the architecture follows by the rule of `shape`")
    concept_share: float = Field(gt=0, lt=1, description="P, share of these parameters in the concept backbone")
    parametrization: Parametrization = Field(
        default="mup",
        description="`mup`: learning rates, initial weights and logits scale with the widths (eqs 18-21); `standard`: one rate "
        "for all widths",
    )


DESIGN = tuple(DesignVariables.model_fields)


@functools.cache
def valid_paths() -> tuple[str, ...]:
    """Every key that an axis may name: fields of the run config by dotted path, design variables, their short names."""
    return (*_leaves(RunConfig), *DESIGN, *ALIASES)


def _leaves(model: type[Frozen], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        nested = _config_in(field.annotation)
        if nested is None:
            yield prefix + name
        else:
            yield from _leaves(nested, f"{prefix}{name}.")


def _config_in(annotation: Any) -> type[Frozen] | None:
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Frozen)), None)


def canonical(path: str, where: str) -> str:
    """The stored name of `path`.

    Raises:
        UserError: no such key, with the nearest valid one.
    """
    if path.startswith(MIXTURE + "."):
        return _source_path(path, where)
    if path not in valid_paths():
        raise UserError(f"{where}: unknown key {path!r}{_suggest(path)}")
    return ALIASES.get(path, path)


def _source_path(path: str, where: str) -> str:
    """`data.mixture.NAME.FIELD`; any name, which the config checks where its value is known."""
    name, _, field = path.removeprefix(MIXTURE + ".").partition(".")
    if not field:
        raise UserError(f"{where}: {path!r}: expected {', '.join(SourceConfig.model_fields)} of the source {name!r}")
    if field not in SourceConfig.model_fields:
        raise UserError(f"{where}: unknown key {path!r}{nearest(field, SourceConfig.model_fields)}")
    return path


def overlay(values: Mapping[str, Any], *over: Mapping[str, Any]) -> dict[str, Any]:
    """Flat mappings, each over those before it; a whole mixture and keys of its sources replace each other."""
    result = dict(values)
    for more in over:
        if MIXTURE in more:
            result = {key: value for key, value in result.items() if not key.startswith(MIXTURE + ".")}
        elif MIXTURE in result and any(key.startswith(MIXTURE + ".") for key in more):
            result |= _leaves_of(result.pop(MIXTURE))
        result |= more
    return result


def _leaves_of(mixture: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Any]:
    """A mixture that was given whole, by dotted path."""
    return {
        f"{MIXTURE}.{name}.{field}": value
        for name, source in (mixture or {}).items()
        for field, value in source.items()
    }


def _suggest(path: str) -> str:
    """What `path` may have been meant to be: spelling first, then the same field in another block, else what is valid there."""
    valid = valid_paths()
    head, _, leaf = path.rpartition(".")
    prefix = head + "." if head else ""
    here = {name.removeprefix(prefix).split(".")[0] for name in valid if name.startswith(prefix)}
    elsewhere = [name for name in valid if name.rpartition(".")[2] == leaf]
    if elsewhere:
        return f"; did you mean {min(elsewhere, key=len)!r}?"
    if here and (word := _near(leaf, here)):
        return f"; did you mean {prefix + word!r}?"
    if word := _near(leaf, {name.rpartition(".")[2] for name in valid}):
        full = min((name for name in valid if name.rpartition(".")[2] == word), key=len)
        return f"; did you mean {full!r}?"
    if not here and (word := _near(path, valid)):
        return f"; did you mean {word!r}?"
    valid_here = [prefix + word for word in sorted(here)] or [*RunConfig.model_fields, *DESIGN, *ALIASES]
    return f"; valid: {', '.join(valid_here)}"


def _near(word: str, valid: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, sorted(valid), n=1, cutoff=0.6)), None)


def check_paths(values: Mapping[str, Any], where: str, seen: dict[str, str]) -> dict[str, Any]:
    """`values` under canonical names.

    Args:
        values: key -> anything.
        where: place, for messages.
        seen: canonical names used by earlier blocks, extended here; one key in two blocks would be ambiguous.

    Raises:
        UserError: unknown key, or a key given twice.
    """
    result = {}
    for key, value in values.items():
        name = canonical(key, where)
        if name.startswith(MIXTURE) and (whole := next((k for k in seen if _overlaps(k, name)), None)):
            raise UserError(f"{where}: {key!r} is given twice, here and with {seen[whole]}; keep one")
        if name in seen:
            raise UserError(f"{where}: {key!r} is given twice, here and as {seen[name]}; keep one")
        seen[name] = f"{where.rpartition(': ')[2]}.{key}"
        result[name] = value
    return result


def _overlaps(one: str, other: str) -> bool:
    """Whether one is the whole mixture and the other a part of it."""
    return {one, other} > {MIXTURE} and max(one, other, key=len).startswith(MIXTURE + ".")


def flatten(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A nested mapping as a flat one by canonical dotted path.

    Raises:
        UserError: unknown key, a key given twice, or a value where a block is expected.
    """
    result: dict[str, Any] = {}

    def walk(block: Mapping[str, Any], prefix: str) -> None:
        for key, value in block.items():
            path = f"{prefix}{key}"
            if _is_block(path, value):
                if not isinstance(value, Mapping):
                    raise UserError(f"{where}: {path!r}: expected a mapping of keys to values, got {value!r}")
                walk(value, path + ".")
                continue
            name = canonical(path, where)
            if name in result:
                raise UserError(f"{where}: {path!r} is given twice; keep one")
            result[name] = value

    walk(values, "")
    return result


def _is_block(path: str, value: Any) -> bool:
    """Whether `path` names a block of fields: a mixture that has sources, and each of them, or a block of the config."""
    if path == MIXTURE:
        return isinstance(value, Mapping) and bool(value)
    is_source = path.startswith(MIXTURE + ".") and path.count(".") == 2
    return is_source or any(name.startswith(path + ".") for name in valid_paths())


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested mapping that `flatten` came from."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        block = nested
        for parent in parents:
            block = block.setdefault(parent, {})
        block[leaf] = value
    return nested


def expand(axes: "Axes") -> list[dict[str, Any]]:
    """All points of the axes: grid x zip x list, the last grid key running fastest within its block."""
    grid = [dict(zip(axes.grid, values)) for values in itertools.product(*axes.grid.values())]
    steps = [dict(zip(axes.zip, values)) for values in zip(*axes.zip.values())] or [{}]
    listed = list(axes.list) or [{}]
    return [{**point, **step, **entry} for point in grid for step in steps for entry in listed]


def label(point: Mapping[str, Any]) -> str:
    """A point in one line, with the short names, for messages."""
    short = {path: name for name, path in ALIASES.items()}
    return ", ".join(f"{short.get(key, key)}={_format(value)}" for key, value in point.items()) or "base"


def _format(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
