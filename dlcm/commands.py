"""The verbs `dlcm train` and `dlcm eval`. Only typer is imported here: `dlcm --help` must answer at once."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train and evaluate one model.", no_args_is_help=True, rich_markup_mode=None)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="model, data, optim, train, seed of one run")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="directory of the run")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.command("train")
def train_verb(config: ConfigFile, run_dir: RunDir, as_json: AsJson = False) -> None:
    """Train one run, or continue it where it stopped."""
    import dataclasses
    import json

    from dlcm.config import RunConfig
    from dlcm.console import Reporter
    from dlcm.errors import parse
    from dlcm.yaml_io import load_yaml

    run = parse(RunConfig, load_yaml(config), str(config))

    from dlcm.shards import open_corpus
    from dlcm.train import train

    with Reporter() as report:
        open_corpus(run.data, report)  # with progress; training then finds the corpus in the cache
        result = train(
            run,
            run_dir,
            on_step=lambda at: report(
                "training", at.step, at.n_steps, f"loss {at.loss_nats:.3f}  {at.tokens_per_s:,.0f} tokens/s"
            ),
        )
    if as_json:
        print(json.dumps(dataclasses.asdict(result), indent=2))
        return
    print(
        f"{result.run_id}: {result.status} after {result.step:,} steps, {result.tokens:,} tokens, {result.wall_s:.1f} s"
    )
    if result.reason:
        print(f"reason: {result.reason}")
    if result.loss_nats is not None:
        print(
            f"validation: {result.loss_nats:.4f} nats per token, {result.bits_per_byte:.4f} bits per byte, "
            f"{result.tokens_per_concept:.2f} tokens per concept"
        )
    print(f"written to {run_dir}")


@app.command("eval")
def eval_verb(
    run_dir: RunDir,
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", help="`corpus`, or a .jsonl of query, choices, gold; repeatable")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="items of each task, at most")] = None,
    force: Annotated[bool, typer.Option("--force", help="measure again what was measured before")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the accuracy of a trained run with lm-evaluation-harness."""
    import dataclasses
    import json

    from dlcm.console import Reporter
    from dlcm.evaluate import evaluate, format_results

    with Reporter() as report:
        results = evaluate(run_dir, task or ["corpus"], limit=limit, force=force, progress=report)
    if as_json:
        print(json.dumps([dataclasses.asdict(result) for result in results], indent=2))
    else:
        print(format_results(results))
