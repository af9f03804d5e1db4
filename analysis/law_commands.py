"""`dlcm analyze laws`, and the options that name a law. Only typer is imported at the top."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis.options import AsJson

if TYPE_CHECKING:
    from analysis.data import ResultsData
    from analysis.law import Law

LawName = Annotated[
    str,
    typer.Option(
        "--law",
        help='name of a law (`analyze laws` lists them), path of a .yaml file, or an expression: "E + A*N**-alpha + B*D**-beta"',
    ),
]
BoundsOption = Annotated[
    list[str] | None,
    typer.Option("--bounds", metavar="NAME=LOW:HIGH", help="range of a parameter of an expression; repeatable"),
]
FamilyOption = Annotated[
    str | None, typer.Option("--family", metavar="FAMILY", help="models that an expression describes: dense or dlcm")
]
TargetOption = Annotated[str, typer.Option("--target", metavar="COLUMN", help="what an expression predicts")]


def chosen_law(text: str, bounds: list[str] | None, family: str | None, target: str, data: "ResultsData") -> "Law":
    """The law that the options name; in an expression, what is a column of the data is an input.

    Raises:
        UserError: no such law, or bounds that are none.
    """
    from analysis import laws
    from analysis.inputs import known_inputs

    found = dict(map(parse_range, bounds or []))
    inputs = [name for name in known_inputs(data) if name not in found]
    return laws.find(text, bounds=found, family=family, target=target, inputs=inputs)


def parse_range(text: str) -> tuple[str, tuple[float, float]]:
    """`NAME=LOW:HIGH` as a name and its ends; an end that is left out is open.

    Raises:
        UserError: it is not written so.
    """
    from dlcm.errors import UserError

    name, sign, ends = (part.strip() for part in text.partition("="))
    low, colon, high = ends.partition(":")
    try:
        if name and sign and colon:
            return name, (float(low or "-inf"), float(high or "inf"))
    except ValueError:
        pass
    raise UserError(f"--bounds {text}: write NAME=LOW:HIGH, e.g. alpha=0:3")


def laws_verb(as_json: AsJson = False) -> None:
    """List the laws: equation, inputs, source, and named reductions."""
    import json

    described = describe_laws()
    print(json.dumps(described, indent=2) if as_json else "\n\n".join(map(_format, described)))


def describe_laws() -> list[dict[str, Any]]:
    """Every law as JSON types."""
    from analysis import laws

    found = []
    for law in laws.ALL.values():
        reductions = {
            f"{law.name}.{name}": laws.get(f"{law.name}.{name}").equation for name in laws.REDUCTIONS.get(law.name, {})
        }
        found.append(
            {
                "name": law.name,
                "equation": law.equation,
                "latex": law.latex,
                "inputs": list(law.inputs),
                "target": law.target,
                "family": law.family,
                "source": law.source,
                "parameters": [{"name": p.name, "kind": p.kind} for p in law.parameters],
                "reductions": reductions,
            }
        )
    return found


def _format(law: dict[str, Any]) -> str:
    lines = [
        law["name"],
        f"  {law['equation']}",
        f"  inputs {', '.join(law['inputs'])}; fitted to {law['family'] or 'all'} runs",
        f"  source {law['source']}",
    ]
    return "\n".join([*lines, *(f"  {name}\n    {equation}" for name, equation in law["reductions"].items())])
