"""Options and arguments that several verbs of `dlcm analyze` take. Only typer is imported."""

from pathlib import Path
from typing import Annotated

import typer

Results = Annotated[Path, typer.Argument(metavar="RESULTS", help="results.parquet or .csv, or a sweep folder")]
ResultsOrFit = Annotated[
    Path,
    typer.Argument(metavar="RESULTS", help="results.parquet or .csv, a sweep folder, or a fit (`fit --out FIT.json`)"),
]
ColumnsOption = Annotated[
    str | None,
    typer.Option(
        "--columns",
        metavar="N=COLUMN,...",
        help="what a table of other names holds: N=params,D=C/(6*N),C=flops,loss=val_loss",
    ),
]
WhereOption = Annotated[
    str | None, typer.Option("--where", metavar="CONDITION", help="use these rows only: \"training_set == 'c4'\"")
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude", metavar="WHAT", help='leave out, with a reason: "loss > 4: outlier" or RUN_ID=reason; repeatable'
    ),
]
DropOption = Annotated[
    int, typer.Option("--drop-largest-losses", metavar="K", min=0, help="leave out the K largest losses of each family")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="seeds starts and bootstrap")]
Refits = Annotated[int, typer.Option("--bootstrap", min=0, help="refits for the 95% intervals; 0 for none")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
FitFiles = Annotated[
    list[Path] | None, typer.Option("--fit", metavar="FIT.json", help="a saved fit instead of a new one; repeatable")
]
Choices = Annotated[
    list[str] | None,
    typer.Option("--at", metavar="N=,D=,R=,P=", help='what a choice loses against the best: "P=0.5,R=4"; repeatable'),
]
Limit = Annotated[
    float | None,
    typer.Option(
        "--limit", metavar="DECADES", help="how far outside the data to go; 1, or 0.3 where the fit is unsound"
    ),
]
Force = Annotated[bool, typer.Option("--force", help="answer however far outside the data")]
OwnCost = Annotated[
    str | None,
    typer.Option("--cost", metavar="EXPRESSION", help='training FLOPs of your own models over N, D, R, P: "6*N*D"'),
]
Vocabulary = Annotated[
    int | None, typer.Option("--vocab-size", min=1, help="prices shapes where the results stand apart from their sweep")
]
Window = Annotated[
    int | None, typer.Option("--seq-len", min=1, help="window of these shapes, where no results tell it")
]
NMeaning = Annotated[
    str | None, typer.Option("--n", metavar="non_embedding|total", help="which parameters N counts, or a mapped N does")
]
