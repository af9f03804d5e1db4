"""What a user writes about columns: `N=params, D=C/(6*N)` and `loss > 4 and seed == 1`. Parsed as syntax trees, never run.

Arithmetic is + - * / ** on numbers and names; conditions add comparisons, `and`, `or`, `not` and quoted text. A name that
Python could not spell stands between backticks: `` `Model Size` / 1e6 ``.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.frames import numeric_column
from dlcm.errors import UserError, nearest

Array = np.ndarray
SYMBOLS = ("N", "D", "C", "R", "P", "loss")
TEXT_KEYS = ("run_id", "trunk", "status", "sweep", "boundary")
FAMILIES = ("dense", "dlcm")

_LONGEST = 1000
_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
Lookup = Callable[[str], Array]


def parse_columns(text: str) -> dict[str, str]:
    """`N=params,D=C/(6*N),loss=val_loss` as a mapping.

    Raises:
        UserError: a part is not `name=column or expression`, or a name comes twice.
    """
    mapping: dict[str, str] = {}
    for part in re.split(r",(?=(?:[^`]*`[^`]*`)*[^`]*$)", text):
        key, sign, value = (piece.strip() for piece in part.partition("="))
        if not (key and sign and value):
            raise UserError(
                f"--columns: {part.strip()!r} is not NAME=COLUMN; write for example N=params,D=tokens,loss=val_loss"
            )
        if key in mapping:
            raise UserError(f"--columns: {key} is given twice; keep one")
        mapping[key] = value
    return mapping


def evaluate(text: str, lookup: Lookup, where: str) -> Array:
    """Value of an arithmetic expression over columns.

    Args:
        text: the expression.
        lookup: name -> array of numbers.
        where: opens the error messages.

    Raises:
        UserError: no arithmetic, or an unknown name.
    """
    tree, names = _parse(text, where)
    with np.errstate(all="ignore"):
        return np.asarray(_number(tree, lambda name: lookup(names.get(name, name)), where, text), dtype=float)


def holds(text: str, lookup: Lookup, where: str) -> Array:
    """Where a condition holds, as a mask.

    Args:
        text: the condition, such as `loss > 4 and boundary == 'random'`.
        lookup: name -> array of numbers or of text.
        where: opens the error messages.

    Raises:
        UserError: no condition, or an unknown name.
    """
    tree, names = _parse(text, where)
    with np.errstate(all="ignore"):
        return np.asarray(_condition(tree, lambda name: lookup(names.get(name, name)), where, text), dtype=bool)


def _parse(text: str, where: str) -> tuple[ast.expr, dict[str, str]]:
    """The syntax tree, and what the placeholders of names in backticks stand for."""
    names: dict[str, str] = {}

    def placeholder(match: re.Match[str]) -> str:
        name = f"_column_{len(names)}"
        names[name] = match[1]
        return f" {name} "

    try:
        if len(text) > _LONGEST:
            raise ValueError
        return ast.parse(re.sub(r"`([^`]+)`", placeholder, text).strip(), mode="eval").body, names
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(
            f"{where}: {text[:80]!r} is no expression; use names of columns (in `backticks` where they hold blanks), "
            "numbers and + - * / **"
        ) from None


def _number(node: ast.expr, lookup: Lookup, where: str, text: str) -> Any:
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = (_number(side, lookup, where, text) for side in (node.left, node.right))
        return _ARITHMETIC[type(node.op)](left, right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _number(node.operand, lookup, where, text)
        return -value if isinstance(node.op, ast.USub) else value
    # float64 overflows to infinity where Python's integers would grow until memory ends
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return np.float64(node.value)
    if isinstance(node, ast.Name):
        return lookup(node.id)
    raise UserError(
        f"{where}: {ast.unparse(node)!r} in {text!r} is not arithmetic; only + - * / **, numbers and names are"
    )


def _condition(node: ast.expr, lookup: Lookup, where: str, text: str) -> Any:
    if isinstance(node, ast.BoolOp):
        masks = [_condition(part, lookup, where, text) for part in node.values]
        return np.logical_and.reduce(masks) if isinstance(node.op, ast.And) else np.logical_or.reduce(masks)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return np.logical_not(_condition(node.operand, lookup, where, text))
    if isinstance(node, ast.Compare) and all(type(op) in _COMPARE for op in node.ops):
        sides = [_side(side, lookup, where, text) for side in (node.left, *node.comparators)]
        return np.logical_and.reduce([_compare(op, a, b, where, text) for op, a, b in zip(node.ops, sides, sides[1:])])
    raise UserError(f"{where}: {ast.unparse(node)!r} is no condition; compare a column, for example loss > 4")


def _compare(op: ast.cmpop, left: Any, right: Any, where: str, text: str) -> Any:
    is_text = [np.asarray(side).dtype.kind in "OUS" for side in (left, right)]
    if any(is_text):
        if not isinstance(op, ast.Eq | ast.NotEq):
            raise UserError(f"{where}: text has no order in {text!r}; compare it with == or !=")
        left, right = (np.asarray(side).astype(str) for side in (left, right))
    return _COMPARE[type(op)](left, right)


def _side(node: ast.expr, lookup: Lookup, where: str, text: str) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return np.asarray(node.value)
    return lookup(node.id) if isinstance(node, ast.Name) else _number(node, lookup, where, text)


class Mapped:
    """A table seen through a mapping: symbols and further columns as arrays, each by its own expression."""

    def __init__(self, frame: pd.DataFrame, mapping: Mapping[str, str], source: str) -> None:
        self.frame, self.mapping, self.source = frame, mapping, source

    def numbers(self, key: str, within: Sequence[str] = ()) -> Array:
        """What `key` is mapped to, (rows,).

        Names inside an expression are other keys of the mapping first, then columns; inside its own, a key is the column.

        Raises:
            UserError: unknown name, no number in a cell, or a circle of definitions.
        """
        text = self.mapping[key]
        within = (*within, key)
        if text in self.frame.columns:
            return numeric_column(self.frame, text, self.source)

        def lookup(name: str) -> Array:
            if name in self.mapping and name != key:
                if name in within:
                    raise UserError(f"{self.source}: {' -> '.join((*within, name))} is a circle of definitions")
                return self.numbers(name, within)
            if name not in self.frame.columns:
                known = [*map(str, self.frame.columns), *(k for k in self.mapping if k != key)]
                raise UserError(f"{self.source}: {key}={text} names {name!r}, which is no column{nearest(name, known)}")
            return numeric_column(self.frame, name, self.source)

        values = evaluate(text, lookup, f"{self.source}: {key}")
        return np.broadcast_to(values, (len(self.frame),)).copy()

    def text(self, key: str) -> pd.Series:
        """A column that is copied as it is.

        Raises:
            UserError: no such column.
        """
        column = self.mapping[key].strip("`")
        if column not in self.frame.columns:
            raise UserError(
                f"{self.source}: {key}={column}, but there is no column {column!r}{nearest(column, map(str, self.frame))}"
            )
        return pd.Series(self.frame[column])

    def families(self) -> pd.Series:
        """The family of each row: a column, or `dense` or `dlcm` for all.

        Raises:
            UserError: other families.
        """
        if self.mapping["family"] in FAMILIES and self.mapping["family"] not in self.frame.columns:
            return pd.Series([self.mapping["family"]] * len(self.frame))
        found = self.text("family").astype(str)
        if other := sorted(set(found) - set(FAMILIES)):
            raise UserError(
                f"{self.source}: column {self.mapping['family']!r} holds {other[0]!r}; a family is dense or dlcm (choose rows by "
                "another column with --where)"
            )
        return found

    def with_columns(self) -> pd.DataFrame:
        """The table with a column for each key that is no symbol; what it had stays."""
        added: dict[str, Any] = {}
        for key in self.mapping:
            if key == "family":
                added["model"] = self.families().to_numpy()
            elif key in TEXT_KEYS:
                added[key] = self.text(key).to_numpy()
            elif key not in SYMBOLS:
                added[key] = self.numbers(key)
        return self.frame.assign(**added)
