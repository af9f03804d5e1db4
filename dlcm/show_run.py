"""What `dlcm show` does: reads its text, opens the runs one after the other, and shows or writes what they find."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlcm.console import Reporter
from dlcm.errors import UserError
from dlcm.inside import Inside, look_inside
from dlcm.inside_validation import INSIDE_FILE, measure_inside
from dlcm.opened import open_run
from dlcm.show import SHOW_SCHEMA, inside_json, print_inside
from dlcm.show_html import save_html


def show(
    run_dirs: Sequence[Path],
    *,
    text: str | None,
    file: str | None,
    html: Path | None,
    with_tokens: bool,
    validation: bool,
    against: Path | None,
    as_json: bool,
) -> None:
    """Show a text, the validation set, or both, as each run reads them.

    Args:
        run_dirs: the runs.
        text: the text.
        file: a file of it, `-` for standard input.
        html: where a page is written to.
        with_tokens: print a table of all tokens.
        validation: measure the validation set.
        against: a dense run to compare it with.
        as_json: print JSON alone.

    Raises:
        UserError: no text, or two; options that do not go together; a run that cannot be opened.
    """
    words = _text(text, file)
    if words is None and not validation:
        raise UserError("nothing to show: give --text TEXT, --file FILE, or --validation")
    for name, given, needed, missing in (
        ("--against", against, "--validation", not validation),
        ("--html", html, "--text or --file", words is None),
    ):
        if given is not None and missing:
            raise UserError(f"{name} needs {needed}")
    looks, records = [], []
    with Reporter() as report:
        dense = None if against is None else open_run(against, report)
        for run_dir in run_dirs:
            run = open_run(run_dir, report)
            if words is not None:
                looks.append(look_inside(run, words))
            if validation:
                records.append(measure_inside(run, dense, report))
    if html is not None:
        save_html(looks, html)
    if as_json:
        print(json.dumps({"schema": SHOW_SCHEMA, "text": words, **_json(looks, records)}, indent=2))
        return
    _print(looks, records, run_dirs, html, with_tokens)


def _text(text: str | None, file: str | None) -> str | None:
    if text is not None and file is not None:
        raise UserError("--text and --file are both given; one text is shown at a time")
    if file is None:
        return text
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode()
    except OSError as error:
        raise UserError(f"--file {file}: {error.strerror}; give a text file, or - for standard input") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--file {file}: byte {error.start} is not UTF-8; convert it to UTF-8 first") from None


def _json(looks: Sequence[Inside], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if looks:
        found["runs"] = [inside_json(inside) for inside in looks]
    if records:
        found["validation"] = list(records)
    return found


def _print(
    looks: Sequence[Inside],
    records: Sequence[dict[str, Any]],
    run_dirs: Sequence[Path],
    html: Path | None,
    tokens: bool,
) -> None:
    from rich.console import Console

    if looks:
        print_inside(looks, Console(), with_tokens=tokens)
    for record, run_dir in zip(records, run_dirs):
        print(format_validation(record))
        print(f"written to {run_dir / INSIDE_FILE}")
    if html is not None:
        print(f"written to {html}")


def format_validation(record: dict[str, Any]) -> str:
    """The main figures of `inside.json`, with standard errors over documents behind ±."""

    def cell(row: dict[str, Any], digits: int = 3, sign: str = "") -> str:
        if row["value"] is None:
            return "-"
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.{digits}f}"
        return f"{row['value']:{sign}.{digits}f}{error}"

    rows = [
        ("validation set", f"{record['n_tokens']:,} tokens in {record['n_documents']} documents"),
        ("tokens per concept", cell(record["tokens_per_concept"])),
        *((f"  {name}", cell(of["tokens_per_concept"])) for name, of in record["content"].items()),
        *((f"  source {name}", cell(of["tokens_per_concept"])) for name, of in (record["sources"] or {}).items()),
        ("nats per token", cell(record["loss_nats"])),
    ]
    for name, what in (("control", "control less own"), ("dense", "own less dense")):
        if record[name] is not None:
            rows += [
                (f"  {name}", cell(record[name]["loss_nats"])),
                (f"  {what}", cell(record[name]["difference_nats"], 4, "+")),
            ]
    difference = record["places"]["relative"].get("difference")
    if difference is not None:
        rows.append(("own less dense, by place in the concept", ""))
        names = ("first token", *("inside" for _ in difference[1:-1]), "last token")
        rows += [(f"  {name}", cell(row, 4, "+")) for name, row in zip(names, difference)]
    width = max(len(name) for name, _ in rows)
    return "\n".join([f"{record['run_id']}", *(f"{name.ljust(width)}  {value}".rstrip() for name, value in rows)])
