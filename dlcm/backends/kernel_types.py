"""`constexpr` as kernels annotate their constants with it, and callers pass plain numbers to it.

Triton types a kernel as the Python function that it is written as, where an `int` is no `constexpr`, though it becomes one
when Triton compiles. To a type checker it is anything here: numbers pass, and arguments are still counted and checked by name.
"""

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    constexpr: TypeAlias = Any
else:
    from triton.language import constexpr

__all__ = ["constexpr"]
