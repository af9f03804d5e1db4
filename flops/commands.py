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

    from flops.speed import format_speed, run_speed
    from flops.table import counted, format_subject, load_subject, subject_json

    item = counted(load_subject(path), seq_len, tokens_per_concept, cross.value)
    speed = run_speed(path) if path.is_dir() else None
    if as_json:
        print(json.dumps({**subject_json(item), "speed": speed.to_json() if speed else None}, indent=2))
    else:
        print(format_subject(item))
        if speed:
            print(format_speed(speed))


@app.command("check")
def check_verb(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG_OR_RUN]", help="what to check; a small DLCM and a dense model by default"),
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="tokens of the one document")] = 64,
    tokens_per_concept: Annotated[
        float | None,
        typer.Option("--tokens-per-concept", "-r", help="R of the injected boundaries; the target by default"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check the closed form against torch's and fvcore's counters, forward and training, at any size."""
    import json

    from dlcm.errors import UserError
    from flops.checked import check_json, format_check
    from flops.measure import EXAMPLES, check
    from flops.table import load_subject

    subjects = EXAMPLES if path is None else {str(path): load_subject(path).model}
    out, failed = {}, []
    for name, model in subjects.items():
        found = check(model, seq_len, tokens_per_concept=tokens_per_concept)
        failed += [f"{name}: {failure}" for failure in found.failures]
        out[name] = check_json(found)
        if not as_json:
            print(format_check(name, seq_len, found) + "\n")
    if as_json:
        print(json.dumps({"seq_len": seq_len, "models": out, "agrees": not failed}, indent=2))
    if failed:
        raise UserError(f"the closed form and the counters differ in {', '.join(failed)}")
