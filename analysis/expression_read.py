"""Laws from what a user wrote: an expression with bounds, a YAML file; every mistake in it is named."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from analysis import expression as text_of
from analysis.expression_law import KEYS, KINDS, Constant, ExpressionLaw, is_wide
from analysis.law import FAMILIES, Kind
from dlcm.errors import UserError, nearest

_CONSTANT_KEYS = ("bounds", "kind", "start")


def from_expression(
    expression: str,
    parameters: Mapping[str, Any] | None = None,
    *,
    name: str = "custom",
    family: str | None = None,
    target: str = "loss",
    source: str = "user",
    inputs: Sequence[str] | None = None,
    where: str = "",
) -> ExpressionLaw:
    """A law of one's own.

    Every parameter has a kind, found from the expression where it is not given:

    - `floor`: a summand by itself; bounds 0 to the largest target where none are given;
    - `amplitude`: multiplies one summand, above 0. Without bounds it is fitted as the logarithm of what its summand
      contributes at the data's centre, which tells it from the exponents; bounds hold for it as it is;
    - `exponent`: stands in a power; `offset`: is added to what a power is taken of, 0 where it is not needed; `other`: any other.
      These need bounds. An end may be infinite where a `start` is given. Positive bounds over two decades are searched on a
      logarithmic scale.

    Args:
        expression: right side of the equation, of names, numbers, + - * / **, parentheses, exp, log, sqrt. It is never evaluated
            as code.
        parameters: constant -> {"bounds": (low, high), "kind": ..., "start": ...}, each optional, or the bounds alone, or None.
        name: of the law, in reports.
        family: `dense` or `dlcm`, the models that it describes; None for all.
        target: the column that it predicts.
        source: where it is from.
        inputs: names that are columns of the data; every other name is then a parameter. By default every name that is not in
            `parameters` is a column.
        where: what to call it in errors; the name by default.

    Raises:
        UserError: not such an expression, an unknown key, or a parameter without the bounds or the start that it needs.
    """
    where = where or f"law {name}"
    if not isinstance(expression, str):
        raise UserError(f"{where}: expression is {expression!r}; write the right side of the equation as text")
    given = dict(parameters or {})
    tree = text_of.parse(expression, where)
    written = text_of.names(tree)
    for key in given:
        if key not in written:
            raise UserError(f"{where}: parameter {key!r} is not in the expression{nearest(key, written)}")
    if family is not None and family not in FAMILIES:
        raise UserError(f"{where}: family {family!r}{nearest(str(family), FAMILIES)}, or none for all")
    if inputs is not None:
        given |= {n: None for n in written if n not in given and n not in inputs}
    if not given:
        raise UserError(f"{where}: no parameter in {expression!r}; name those that are to be fitted")
    names = tuple(n for n in written if n in given)
    specs = {n: _spec(given[n], n, where) for n in names}
    constants = _classify(expression, names, specs, where, None if inputs is None else list(inputs))
    floor = next((c.name for c in constants if c.kind == "floor"), None)
    law = ExpressionLaw(
        name=name, floor=floor, terms=(), family=family, target=target, source=source,
        expression=expression.strip(), constants=constants,
    )  # fmt: skip
    if not law.inputs:
        raise UserError(f"{where}: every name in {expression!r} is a parameter; an input such as N or D is needed")
    return law


def _spec(given: Any, name: str, where: str) -> dict[str, Any]:
    """Bounds, kind and start as they were given, checked."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        given = {"bounds": given}
    for key in given:
        if key not in _CONSTANT_KEYS:
            raise UserError(f"{where}: parameter {name}: unknown key {key!r}{nearest(str(key), _CONSTANT_KEYS)}")
    spec = {key: value for key, value in given.items() if value is not None}
    if "kind" in spec and spec["kind"] not in KINDS:
        raise UserError(f"{where}: parameter {name}: kind {spec['kind']!r}{nearest(str(spec['kind']), KINDS)}")
    if "bounds" in spec:
        try:
            low, high = (_bound(v, default) for v, default in zip(spec["bounds"], (-math.inf, math.inf), strict=True))
        except (TypeError, ValueError):
            raise UserError(f"{where}: parameter {name}: bounds {spec['bounds']!r}; write [low, high]") from None
        if not low < high:
            raise UserError(
                f"{where}: parameter {name}: bounds {low:g} to {high:g}; the first must be below the second"
            )
        spec["bounds"] = (low, high)
    if "start" in spec:
        try:
            spec["start"] = float(spec["start"])
        except (TypeError, ValueError):
            raise UserError(f"{where}: parameter {name}: start {spec['start']!r} is no number") from None
        low, high = spec.get("bounds", (-math.inf, math.inf))
        if not low <= spec["start"] <= high:
            raise UserError(
                f"{where}: parameter {name}: start {spec['start']:g} lies outside its bounds {low:g} to {high:g}"
            )
    return spec


def _constant(spec: Mapping[str, Any]) -> Constant:
    low, high = spec["bounds"][0], spec["bounds"][1]
    facts: dict[str, Any] = {**spec, "bounds": (_bound(low, -math.inf), _bound(high, math.inf))}
    return Constant(**facts)


def _bound(value: Any, default: float) -> float:
    """An end of bounds; null is open."""
    number = default if value is None else float(value)
    if math.isnan(number):
        raise ValueError
    return number


def _classify(
    expression: str,
    names: tuple[str, ...],
    specs: Mapping[str, Mapping[str, Any]],
    where: str,
    columns: list[str] | None,
) -> tuple[Constant, ...]:
    """Kind, bounds and centre of each constant."""
    terms = text_of.additive_terms(expression)
    constants = []
    for name in names:
        spec, (found, factor) = specs[name], text_of.role_of(name, terms)
        kind = cast(Kind, spec.get("kind", found))
        low, high = spec.get("bounds", (0.0, math.inf) if kind in ("floor", "amplitude") else (-math.inf, math.inf))
        if kind in ("floor", "amplitude") and found != kind:
            raise UserError(
                f"{where}: parameter {name} is no {kind}: {_ROLES[kind]}; leave its kind out, or write {found}"
            )
        if "kind" not in spec and kind in ("floor", "amplitude") and low < 0:
            kind = "other"  # it may change its sign
        elif kind in ("floor", "amplitude") and low < 0:
            raise UserError(
                f"{where}: parameter {name}: a {kind} is not below 0; write bounds from 0 up, or kind other"
            )
        if kind not in ("floor", "amplitude"):
            _require_range(name, spec, where, columns)
        free = kind == "amplitude" and low == 0 and high == math.inf
        constants.append(Constant(name, kind, (low, high), spec.get("start"), factor if free else None))
    # the centre of an amplitude must not depend on another one: then neither could be worked out first
    linear = {c.name for c in constants if c.kind in ("floor", "amplitude")}
    for c in constants:
        if c.centre and linear & set(text_of.names(text_of.parse(c.centre, where))):
            raise UserError(
                f"{where}: {c.name} multiplies another factor of the same summand; only their product can be fitted"
            )
    # a logarithmic scale is for what spans orders of magnitude, which a linear problem would not find
    able = linear | {c.name for c in constants if c.kind == "other" and not is_wide(c.bounds)}
    found = text_of.jointly_linear(
        expression, [*sorted(linear), *(c.name for c in constants if c.name in able - linear)]
    )
    return tuple(dataclasses.replace(c, is_linear=c.name in found) for c in constants)


_ROLES = {
    "floor": "it is no summand by itself",
    "amplitude": "it is no factor of one summand alone",
}


def _require_range(name: str, spec: Mapping[str, Any], where: str, columns: list[str] | None) -> None:
    if "bounds" not in spec:
        known = ""
        if columns is not None:
            known = f" and is no column of the data{nearest(name, columns)}"
        raise UserError(f"{where}: parameter {name} has no bounds{known}; write {name}: [0, 3], or --bounds {name}=0:3")
    if not all(map(math.isfinite, spec["bounds"])) and "start" not in spec:
        low, high = spec["bounds"]
        raise UserError(
            f"{where}: parameter {name} has open bounds ({low:g} to {high:g}) and no start; give one of them"
        )


def load_law(path: str | Path) -> ExpressionLaw:
    """A law from a YAML file with the keys of `from_expression`: expression, parameters, name, family, target, source.

    Raises:
        UserError: not readable, an unknown key, or whatever `from_expression` finds wrong.
    """
    import yaml

    path = Path(path)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(found, dict) or "expression" not in found:
        raise UserError(f"{path}: no key 'expression'; write e.g. expression: E + A*N**-alpha")
    for key in found:
        if key not in KEYS:
            raise UserError(f"{path}: unknown key {key!r}{nearest(str(key), KEYS)}")
    parameters = found.get("parameters") or {}
    if isinstance(parameters, list):
        parameters = dict.fromkeys(map(str, parameters))
    if not isinstance(parameters, dict):
        raise UserError(f"{path}: parameters: write one line each, e.g. alpha: [0, 3]")
    plain = {key: str(found[key]) for key in ("family", "target", "source") if found.get(key) is not None}
    return from_expression(
        found["expression"], parameters, name=str(found.get("name") or path.stem), where=str(path), **plain
    )


def from_dict(data: Mapping[str, Any]) -> ExpressionLaw:
    """The inverse of `ExpressionLaw.to_dict`.

    Raises:
        KeyError, TypeError, ValueError: a key is missing or of another type.
    """
    text_of.parse(data["expression"], f"law {data['name']}", text_of.INTERNAL)
    constants = tuple(map(_constant, data["parameters"].values()))
    floor = next((c.name for c in constants if c.kind == "floor"), None)
    others = {key: data[key] for key in ("name", "family", "target", "source", "expression")}
    return ExpressionLaw(floor=floor, terms=(), constants=constants, **others)
