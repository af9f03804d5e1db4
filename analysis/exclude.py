"""Exclusions as they are written on a command line."""

from collections.abc import Iterable

from analysis.data import ResultsData, near_run
from dlcm.errors import UserError


def exclude_by_text(data: ResultsData, texts: Iterable[str]) -> ResultsData:
    """Leave runs out: `CONDITION: reason` or `RUN_ID=reason`, one after the other.

    Raises:
        UserError: no reason, no such run, or a condition that holds nowhere.
    """
    for text in texts:
        run, sign, reason = (piece.strip() for piece in text.partition("="))
        if sign and run in data.run_ids:
            data = data.exclude([run], reason)
            continue
        condition, colon, reason = (piece.strip() for piece in text.partition(":"))
        if not colon:
            why = f"no usable run is called {run!r}{near_run(run, data.run_ids)}" if sign else "it has no reason"
            raise UserError(f"--exclude {text!r}: {why}; write 'loss > 4: outlier' or RUN_ID=reason")
        data = data.exclude(condition, reason)
    return data
