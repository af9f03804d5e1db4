"""The verbs `dlcm flops ...`. Only typer is imported here, so that `dlcm --help` answers at once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="What a model costs.", no_args_is_help=True, rich_markup_mode=None)


class Cross(StrEnum):
    """How token-to-concept attention is counted."""

    exact = "exact"
    replicated = "replicated"


Subject = Annotated[
    Path, typer.Argument(metavar="CONFIG_OR_RUN", help="run folder, run.json, or a config as YAML or JSON")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


@app.command("show")
def show_verb(
    path: Subject,
    seq_len: Annotated[int | None, typer.Option(help="tokens of one sequence; the config's by default")] = None,
    tokens_per_concept: Annotated[
        float | None,
        typer.Option("--tokens-per-concept", "-r", help="R; realised in training if known, else the target"),
    ] = None,
    cross: Annotated[
        Cross, typer.Option(help="cross-attention once per concept, or per replicated concept")
    ] = Cross.exact,
    as_json: AsJson = False,
) -> None:
    """Parameters and FLOPs of one model or run, by component; of a finished run also its speed and MFU."""
    import json

    from flops.count import count, parameters
    from flops.speed import format_speed, run_speed
    from flops.table import format_subject, load_subject, subject_json

    subject = load_subject(path)
    ratio = tokens_per_concept or subject.tokens_per_concept_train
    flops = count(subject.model, seq_len or subject.seq_len, ratio, cross=cross.value)
    args = subject, parameters(subject.model), flops
    speed = run_speed(path) if path.is_dir() else None
    if as_json:
        print(json.dumps({**subject_json(*args), "speed": speed.to_json() if speed else None}, indent=2))
    else:
        print(format_subject(*args))
        if speed:
            print(format_speed(speed))


@app.command("check")
def check_verb(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG_OR_RUN]", help="what to build; a small DLCM and a dense model by default"),
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="tokens of the one document")] = 64,
    as_json: AsJson = False,
) -> None:
    """Check the closed form against torch's and fvcore's counters."""
    import dataclasses
    import json

    from dlcm.errors import UserError
    from flops.measure import EXAMPLES, check
    from flops.table import align, load_subject

    subjects = EXAMPLES if path is None else {str(path): load_subject(path).model}
    out, failed = {}, []
    for name, model in subjects.items():
        rows, params = check(model, seq_len)
        failed += [f"{name}: {row.component}" for row in rows if not row.agrees]
        failed += [] if params.agrees else [f"{name}: parameters"]
        out[name] = {
            "components": [{**dataclasses.asdict(r), "agrees": r.agrees} for r in rows],
            "parameters": vars(params),
        }
        if not as_json:
            cells = [["component", "closed form", "in counters' terms", "torch", "fvcore", "equal"]]
            for row in rows:
                figures = (row.closed_form, row.expected, row.torch, row.fvcore)
                if any(figures):
                    cells.append([row.component, *(f"{n:,.0f}" for n in figures), "yes" if row.agrees else "NO"])
            built = f"parameters: {params.closed_form:,} in closed form, {params.built:,} built"
            print(f"{name}, forward FLOPs of {seq_len} tokens\n{align(cells, left=1)}\n{built}\n")
    if as_json:
        print(json.dumps({"seq_len": seq_len, "models": out, "agrees": not failed}, indent=2))
    if failed:
        raise UserError(f"the closed form and the counters differ in {', '.join(failed)}")
