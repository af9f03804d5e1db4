"""Laws of powers as plain text and as LaTeX."""

from analysis.law import VARIABLES, Law


def symbol(name: str, latex: bool) -> str:
    """A constant's or an input's name; as LaTeX with Greek letters and subscripts."""
    if not latex:
        return name
    greek = {"alpha": r"\alpha", "beta": r"\beta", "d1": r"\delta_1", "d2": r"\delta_2", "g": r"\gamma"}
    if name in greek:
        return greek[name]
    head, _, tail = name.partition("_")
    if not tail and head[-1:].isdigit():
        head, tail = head[:-1], head[-1]
    return f"{head}_{{{tail}}}" if tail else head


def render(law: Law, *, latex: bool) -> str:
    """The equation, with held constants as numbers."""
    held = dict(law.fixed)

    def constant(name: str) -> str:
        return f"{held[name]:.4g}" if name in held else symbol(name, latex)

    parts = [constant(law.floor)] if law.floor else []
    for term in law.terms:
        above, below = [constant(term.amplitude)], []
        for factor in term.factors:
            if held.get(factor.exponent) == 0.0:
                continue
            variable = VARIABLES[factor.variable]
            base = variable.latex if latex else variable.text
            if factor.offset and held.get(factor.offset) != 0.0:
                base = f"({base} + {constant(factor.offset)})"
            elif len(base) > 1 and not base.startswith("L_"):
                base = f"({base})"
            exponent = constant(factor.exponent)
            power = f"{base}^{{{exponent}}}" if latex else f"{base}^{exponent}"
            (above if factor.sign > 0 else below).append(power)
        part = (r"\," if latex else " ").join(above)
        if below:
            part = rf"\frac{{{part}}}{{{' '.join(below)}}}" if latex else f"{part} / {' '.join(below)}"
        if term.family:
            part = (rf"[\mathrm{{{term.family}}}]\," if latex else f"[{term.family}] ") + part
        parts.append(part)
    return left_side(law, latex=latex) + (" + ".join(parts) or "0")


def left_side(law: Law, *, latex: bool) -> str:
    """`L(N, D) = `."""
    left = "L" if law.target == "loss" else (rf"\mathrm{{{law.target.replace('_', ' ')}}}" if latex else law.target)
    inputs = f"({', '.join(_input(i, latex) for i in law.inputs)})" if law.inputs else ""
    return f"{left}{inputs} = "


def _input(name: str, latex: bool) -> str:
    return VARIABLES[name].latex if latex and name in VARIABLES else symbol(name, latex)
