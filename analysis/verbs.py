"""What the verbs of `dlcm analyze` share: loading, progress, printing. Nothing heavy is imported at the top."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable

    from analysis.convention import NConvention
    from analysis.data import ResultsData

FIGURES = (".png", ".svg", ".pdf")


def load(
    results: Path,
    columns: str | None = None,
    where: str | None = None,
    exclude: list[str] | None = None,
    drop: int = 0,
    n: str | None = None,
) -> "ResultsData":
    """The rows that a verb works on: mapped, chosen, and without what the user leaves out, with reasons."""
    from analysis.columns import parse_columns
    from analysis.data import load_results
    from analysis.exclude import exclude_by_text

    mapping = parse_columns(columns) if columns else None
    data = load_results(results, n=cast("NConvention | None", n), columns=mapping)
    data = data.select(where) if where else data
    return exclude_by_text(data, exclude or []).drop_largest_losses(drop)


def check_figure(option: str, path: Path | None) -> None:
    """Refuse a figure's file before the work is done, not after.

    Raises:
        UserError: no figure can be written with that suffix.
    """
    from dlcm.errors import UserError

    if path is not None and path.suffix not in FIGURES:
        raise UserError(
            f"{option} {path}: figures are written as {', '.join(FIGURES)}; give the file one of these endings"
        )


class progress:
    """`with progress() as tell`: a spinner with the current step on a terminal, a plain line a step otherwise; on stderr."""

    def __enter__(self) -> "Callable[[str], None]":
        import sys

        from rich.console import Console

        console = Console(stderr=True)
        self._status = console.status("") if console.is_terminal else None
        if self._status is None:
            return lambda line: print(line, file=sys.stderr, flush=True)
        self._status.start()
        return self._status.update

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()


def show(what: str | dict[str, Any]) -> None:
    """Print text, or a mapping as JSON."""
    import json

    print(what if isinstance(what, str) else json.dumps(what, indent=2))
