"""An expression that a user wrote -> its value and derivatives as functions of arrays.

The text is taken apart by Python's own parser and only what a law needs is let through: names, numbers, + - * / **,
parentheses, exp, log, sqrt. From that tree a sympy expression is built node by node. Nothing of the text is ever evaluated,
neither by `eval` nor by sympy's parser, which evaluates code.
"""

import ast
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from dlcm.errors import UserError, nearest

Array = np.ndarray
FUNCTIONS = ("exp", "log", "sqrt")
INTERNAL = (*FUNCTIONS, "repeated")
"""`repeated` serves laws that ship alone; see `repeated`."""
_OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
}
_MAX_LENGTH = 2000
_MAX_DEPTH = 100


def parse(text: str, where: str, functions: tuple[str, ...] = FUNCTIONS) -> ast.expr:
    """The tree of an expression that holds nothing but names, numbers, + - * / ** and `functions`.

    Args:
        text: the right side of a law, e.g. `E + A*N**-alpha + B*D**-beta`.
        where: what to call it in an error.
        functions: names that may be called, with one argument each (`repeated` with three).

    Raises:
        UserError: it is no such expression; says what is wrong with it.
    """
    if len(text) > _MAX_LENGTH:
        raise UserError(f"{where}: the expression has {len(text)} characters; {_MAX_LENGTH} at most")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        told = error.msg if isinstance(error, SyntaxError) else "nested too deep"
        raise UserError(f"{where}: {_short(text)} is no expression ({told}); write e.g. E + A*N**-alpha") from None
    _check(tree, where, functions, 0)
    return tree


def _check(node: ast.AST, where: str, functions: tuple[str, ...], depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise UserError(f"{where}: the expression is nested more than {_MAX_DEPTH} deep")
    match node:
        case ast.BinOp(op=op) if type(op) in _OPERATORS:
            parts = [node.left, node.right]
        case ast.BinOp(op=ast.BitXor()):
            raise UserError(f"{where}: ^ is no power here; write ** (in {_short(ast.unparse(node))})")
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            parts = [node.operand]
        case ast.Constant(value=bool() | complex()):
            raise UserError(f"{where}: {node.value!r} is no real number")
        case ast.Constant(value=int() | float() as value):
            if not _is_finite(value):
                raise UserError(f"{where}: a number is too large for a float")
            parts = []
        case ast.Name():
            if not node.id.isascii():
                raise UserError(f"{where}: name {node.id!r} has letters outside A-Z; write e.g. alpha")
            if node.id in functions:
                raise UserError(f"{where}: {node.id} is a function; write {node.id}(...)")
            parts = []
        case ast.Call(func=ast.Name(id=name), keywords=[]):
            if name not in functions:
                raise UserError(f"{where}: unknown function {name!r}{nearest(name, functions)}")
            if len(node.args) != (3 if name == "repeated" else 1):
                raise UserError(f"{where}: {_short(ast.unparse(node))} has {len(node.args)} arguments; write {name}(x)")
            parts = node.args
        case _:
            what = _short(ast.unparse(node))
            allowed = f"names, numbers, + - * / **, parentheses and {', '.join(functions)}"
            raise UserError(f"{where}: {what} is not allowed; a law is written with {allowed}")
    for part in parts:
        _check(part, where, functions, depth + 1)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def names(tree: ast.expr) -> tuple[str, ...]:
    """Names in an expression in the order in which they are written, functions left out."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in called]
    return tuple(dict.fromkeys(n.id for n in sorted(found, key=lambda n: (n.lineno, n.col_offset))))


def replace_names(text: str, new: Mapping[str, str | float]) -> str:
    """The expression with names replaced by other names or by numbers."""

    class Replace(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            value = new.get(node.id, node.id)
            return ast.Name(value) if isinstance(value, str) else ast.Constant(value)

    return ast.unparse(Replace().visit(ast.parse(text.strip(), mode="eval")).body)


@functools.cache
def to_sympy(text: str) -> Any:
    """The expression in sympy, its names as real symbols.

    Raises:
        UserError: a part that is a number alone is not finite.
    """
    return _build(parse(text, "law", INTERNAL))


def _build(node: ast.expr) -> Any:
    import sympy

    match node:
        case ast.Constant(value=int() | float() as value):
            return sympy.Integer(value) if isinstance(value, int) else sympy.Float(value)
        case ast.Name(id=name):
            return sympy.Symbol(name, real=True)
        case ast.UnaryOp(op=op, operand=operand):
            return -_build(operand) if isinstance(op, ast.USub) else _build(operand)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _build(left), _build(right)
            if a.is_number and b.is_number:
                # in floats: sympy would work out 9**9**9 to the last digit
                return _number(lambda: _OPERATORS[type(op)](float(a), float(b)), node)
            return _OPERATORS[type(op)](a, b)
        case ast.Call(func=ast.Name(id=name), args=args):
            built = [_build(arg) for arg in args]
            if name != "repeated" and built[0].is_number:
                return _number(lambda: getattr(math, name)(float(built[0])), node)
            return _repeated_function()(*built) if name == "repeated" else getattr(sympy, name)(*built)
    raise AssertionError(f"{ast.dump(node)} passed the check")


def _number(compute: Callable[[], Any], node: ast.expr) -> Any:
    import sympy

    try:
        value = compute()
    except (ArithmeticError, ValueError, TypeError):
        value = math.nan
    if isinstance(value, complex) or not math.isfinite(value):
        raise UserError(f"law: {_short(ast.unparse(node))} is not a finite number")
    return sympy.Integer(int(value)) if float(value).is_integer() and abs(value) < 1e9 else sympy.Float(value)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Value and derivatives of an expression, for arrays that broadcast.

    Attributes:
        value: takes the constants, then the inputs, in the order that they were compiled with.
        partials: the same, and returns the derivatives by each constant.
    """

    value: Callable[..., Any]
    partials: Callable[..., Any]


@functools.cache
def compile_expression(text: str, constants: tuple[str, ...], inputs: tuple[str, ...]) -> Compiled:
    """Value and analytic derivatives by the constants, common parts computed once."""
    return _compile(to_sympy(text), constants, inputs)


@functools.cache
def compile_log(text: str, constants: tuple[str, ...], inputs: tuple[str, ...]) -> Compiled:
    """The same of the logarithm of the expression's size."""
    import sympy

    # of N**-alpha it is -alpha log N, which neither overflows nor loses digits
    return _compile(sympy.expand_log(sympy.log(to_sympy(text)), force=True), constants, inputs)


def _compile(expression: Any, constants: tuple[str, ...], inputs: tuple[str, ...]) -> Compiled:
    import sympy

    symbols = [sympy.Symbol(name, real=True) for name in (*constants, *inputs)]
    partials = [sympy.diff(expression, s) for s in symbols[: len(constants)]]
    how: dict[str, Any] = {"modules": [_REPEATED, "numpy"], "cse": True, "dummify": True}
    return Compiled(sympy.lambdify(symbols, expression, **how), sympy.lambdify(symbols, [expression, *partials], **how))


def additive_terms(text: str) -> list[Any]:
    """The summands of the expression, in sympy."""
    import sympy

    return list(sympy.Add.make_args(sympy.expand_mul(to_sympy(text), deep=False)))


def role_of(name: str, terms: Sequence[Any]) -> tuple[Literal["floor", "amplitude", "exponent", "other"], str]:
    """What a constant does in a sum, and of an amplitude what it multiplies, sign aside.

    A factor whose sign depends on the data (a logarithm, a difference) makes no amplitude: there is no contribution at the centre
    to take the logarithm of.
    """
    import sympy

    constant = sympy.Symbol(name, real=True)
    holding = [term for term in terms if constant in term.free_symbols]
    if holding == [constant]:
        return "floor", ""
    if len(holding) == 1:
        factor = holding[0] / constant
        if constant not in factor.free_symbols and constant != holding[0]:
            known = factor.subs({s: sympy.Symbol(s.name, positive=True) for s in factor.free_symbols})
            if known.is_positive or known.is_negative:
                return "amplitude", str(-factor if known.is_negative else factor)
    powers = {power for term in holding for power in term.atoms(sympy.Pow)}
    return ("exponent" if any(constant in power.exp.free_symbols for power in powers) else "other"), ""


def jointly_linear(text: str, candidates: Sequence[str]) -> set[str]:
    """Of the candidates, taken in this order, those that the expression is linear in together."""
    import sympy

    expression, found = to_sympy(text), []
    for name in candidates:
        symbol = sympy.Symbol(name, real=True)
        slope = sympy.diff(expression, symbol)
        if all(sympy.diff(slope, other) == 0 for other in [*found, symbol]):
            found.append(symbol)
    return {symbol.name for symbol in found}


def to_latex(text: str, symbols: Mapping[str, str]) -> str:
    """The expression as LaTeX.

    Args:
        text: the expression.
        symbols: name -> its LaTeX.
    """
    import sympy

    shown = {sympy.Symbol(name, real=True): latex for name, latex in symbols.items()}
    return sympy.latex(to_sympy(text), symbol_names=shown)


def repeated(x: Array, u: Array, r: Array) -> Array:
    """What x is worth of which only u is new:  min(x, u) + u r (1 - exp(-z / r)),  z = max(x / u - 1, 0) repeats.

    Up to a few repeats it is nearly x; it tends to u (1 + r). Value and slopes are continuous at x = u.
    Source: Muennighoff et al. 2023 (arXiv 2305.16264), section 3, for tokens and likewise for parameters in excess.
    """
    z = np.maximum(x / u - 1, 0)
    return np.minimum(x, u) - u * r * np.expm1(-z / r)


def _by_x(x: Array, u: Array, r: Array) -> Array:
    return np.exp(-np.maximum(x / u - 1, 0) / r)


def _by_u(x: Array, u: Array, r: Array) -> Array:
    z = np.maximum(x / u - 1, 0)
    return 1 - r * np.expm1(-z / r) - (1 + z) * np.exp(-z / r)


def _by_r(x: Array, u: Array, r: Array) -> Array:
    z = np.maximum(x / u - 1, 0)
    return -u * (np.expm1(-z / r) + z / r * np.exp(-z / r))


_REPEATED = {"repeated": repeated, "repeated_by_x": _by_x, "repeated_by_u": _by_u, "repeated_by_r": _by_r}


@functools.cache
def _repeated_function() -> Any:
    """`repeated` as a sympy function that knows its derivatives, which sympy's own Min and Max give as steps."""
    import sympy

    slopes = [sympy.Function(f"repeated_by_{name}") for name in "xur"]

    def latex(self: Any, printer: Any, exp: str | None = None) -> str:
        text = r"\operatorname{repeated}\left(" + ", ".join(printer._print(a) for a in self.args) + r"\right)"
        return text if exp is None else f"{text}^{{{exp}}}"

    methods = {"nargs": 3, "fdiff": lambda self, i=1: slopes[i - 1](*self.args), "_latex": latex}
    return type("repeated", (sympy.Function,), methods)
