"""The verbs `train`, `generate`, `show` and `export`. Only typer is imported here: `dlcm --help` must answer at once."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train and evaluate one model.", no_args_is_help=True, rich_markup_mode=None)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="model, data, optim, train, seed of one run")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="directory of the run")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.command("train")
def train_verb(
    config: ConfigFile,
    run_dir: RunDir,
    track: Annotated[
        list[str] | None, typer.Option("--track", help="tensorboard or wandb: show metrics there too; repeatable")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train one run, or continue it where it stopped."""
    import dataclasses
    import json

    from dlcm.config import RunConfig
    from dlcm.console import Reporter
    from dlcm.errors import parse
    from dlcm.yaml_io import load_yaml

    run = parse(RunConfig, load_yaml(config), str(config))

    from dlcm.distributed import joined
    from dlcm.shards import open_corpus
    from dlcm.train import train

    with joined() as ranks, Reporter() as report:
        open_corpus(run.data, report)  # with progress; training then finds the corpus in the cache
        result = train(
            run,
            run_dir,
            on_step=lambda at: report("training", at.step, at.n_steps, at.told()),
            trackers=track or (),
        )
    if not ranks.is_main:
        return
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
    for name, found in (result.sources or {}).items():
        print(
            f"  source {name}, weight {found['weight']:.3g}: {found['loss_nats']:.4f} nats per token, "
            f"{found['bits_per_byte']:.4f} bits per byte, {found['tokens_per_concept']:.2f} tokens per concept, "
            f"{found['epochs']:.3g} epochs"
        )
    for name, found in (result.domains or {}).items():
        if found["tokens"] and found["loss_nats"] is not None:
            ratio = found["tokens_per_concept"]
            print(
                f"  {name}: {found['tokens']:,} tokens, {found['loss_nats']:.4f} nats per token, "
                + ("no concept begins here" if ratio is None else f"{ratio:.2f} tokens per concept")
            )
    print(f"written to {run_dir}")


@app.command("generate")
def generate_verb(
    run_dir: RunDir,
    prompt: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="texts to continue; `-` reads one from standard input"),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="new tokens of each text, at most")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.8,
    top_p: Annotated[float, typer.Option(help="draw from the likeliest tokens that hold this probability")] = 0.95,
    seed: Annotated[int, typer.Option(help="of the draws: the same seed writes the same text")] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="text that ends a continuation; repeatable")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="continuations of each prompt")] = 1,
    as_json: AsJson = False,
) -> None:
    """Continue texts with a trained model."""
    import dataclasses
    import json
    import sys

    from dlcm.generate import Sampling, generate_from_run

    texts = [sys.stdin.read() if text == "-" else text for text in prompt or [""] for _ in range(samples)]
    sampling = Sampling(max_tokens, temperature, top_p, seed, tuple(stop or ()))

    def show(_: int, text: str) -> None:
        print(text, end="", flush=True)

    streams = len(texts) == 1 and not as_json
    if streams:
        print(texts[0], end="", flush=True)
    completions = generate_from_run(run_dir, texts, sampling, on_text=show if streams else None)
    if as_json:
        records = [{"prompt": text, **dataclasses.asdict(done)} for text, done in zip(texts, completions)]
        print(
            json.dumps({"run_dir": str(run_dir), "sampling": dataclasses.asdict(sampling), "texts": records}, indent=2)
        )
        return
    for i, (text, done) in enumerate(zip(texts, completions)):
        note = f"{done.n_tokens} tokens, ended by {done.reason}, {done.tokens_per_concept:.2f} tokens per concept"
        # Standard output holds the text alone, so that it can be piped on.
        print("\n" if streams else f"{text}{done.text}", flush=True)
        print(f"[{i + 1} of {len(texts)}: {note}]", file=sys.stderr)


@app.command("show")
def show_verb(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="one run, or several side by side")],
    text: Annotated[str | None, typer.Option("--text", "-t", help="the text to read")] = None,
    file: Annotated[str | None, typer.Option("--file", "-f", help="a UTF-8 file of it; `-` is standard input")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="write a page that opens offline, too")] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="print a table of every token, too")] = False,
    validation: Annotated[
        bool,
        typer.Option("--validation", help="measure the validation set inside the concepts -> inside.json of the run"),
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="RUN_DIR", help="with --validation: a dense run on the same text"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look inside: where concepts begin in a text, and what each token costs."""
    from dlcm.show_run import show

    show(
        run_dirs,
        text=text,
        file=file,
        html=html,
        with_tokens=tokens,
        validation=validation,
        against=against,
        as_json=as_json,
    )


@app.command("export")
def export_verb(
    run_dir: RunDir,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="directory to make")],
    hf: Annotated[
        bool, typer.Option("--hf", help="Hugging Face: config.json, weights, tokenizer (dense runs)")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a trained dense model in the format of Hugging Face."""
    from dlcm.errors import UserError

    if not hf:
        raise UserError("name the format: --hf is the one there is")
    from dlcm.export import export_hf

    done = export_hf(run_dir, output)
    if as_json:
        import json

        print(json.dumps({"path": str(done.path), "files": done.files, "n_parameters": done.n_parameters}, indent=2))
    else:
        print(f"{done.path}: {done.n_parameters:,} parameters; {', '.join(done.files)}")
