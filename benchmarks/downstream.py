"""How far do curves of accuracy over loss reach? `python benchmarks/downstream.py --data FILE`.

On the public models of Gadre et al. (2024, arXiv 2403.08540), a CSV with `training_set`, `params`, `tokens`, `loss_c4` and
`acc_<task>`, a curve is fitted for each training set and task to the smaller models alone, and predicts the accuracy of the
largest at its measured loss. No law of the loss takes part: what is off is the curve's.

Recorded are the mean of the errors and of their sizes, in points of accuracy, how often the 95% interval holds the accuracy, and
how often a note warned where it does not, and how often the interval of either form holds it (`predict_either`). Tasks whose
accuracy does not move with the loss get no curve, and are counted.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import ResultsData, fit_downstream
from analysis.accuracy_law import LINKS, Link
from benchmarks.common import environment, format_table, write_result

# task: accuracy of guessing, items
TASKS = {
    "arc_easy": (0.25, 2376),
    "arc_challenge": (0.25, 1172),
    "boolq": (0.5, 3270),
    "commonsense_qa": (0.2, 1221),
    "copa": (0.5, 100),
    "hellaswag_zeroshot": (0.25, 10042),
    "lambada_openai": (0.0, 5153),
    "openbook_qa": (0.25, 500),
    "piqa": (0.5, 1838),
    "winogrande": (0.5, 1267),
}
"""Four to two answers of which one is right; for LAMBADA a word, which is not guessed."""
LIMITS = (1e9, 2e9)
REFITS = 400


def predict(frame: pd.DataFrame, task: str, limit: float, link: Link) -> dict[str, Any] | None:
    """The largest model of one training set, predicted by the models below `limit` parameters; None where there is no curve."""
    chance, items = TASKS[task]
    small, large = frame[frame["params"] < limit], frame.loc[frame["params"].idxmax()]
    data = ResultsData.from_arrays(
        N=small["params"],
        D=small["tokens"],
        loss=small["loss_c4"],
        acc_it=small[f"acc_{task}"].to_numpy(),
        n_it=float(items),
    )
    curve = fit_downstream(data, "it", chance=chance, link=link, n_bootstrap=REFITS)
    if not curve.moves:
        return None
    low, high = curve.predict_interval(large["loss_c4"])
    lowest, highest = curve.predict_either(large["loss_c4"])
    measured = float(large[f"acc_{task}"])
    return {
        "task": task,
        "models": len(small),
        "measured": measured,
        "predicted": float(curve.predict(large["loss_c4"])),
        "low": float(low),
        "high": float(high),
        "held": bool(low <= measured <= high),
        "lowest": float(lowest),
        "highest": float(highest),
        "held by either": bool(lowest <= measured <= highest),
        "notes": list(curve.notes),
    }


def summary(found: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """One row of the table."""
    given = [f for f in found if f is not None]
    errors = 100 * np.array([f["predicted"] - f["measured"] for f in given])
    missed = [f for f in given if not f["held"]]
    return {
        "predictions": len(given),
        "no curve": len(found) - len(given),
        "mean error, points": float(errors.mean()),
        "mean size of it": float(np.abs(errors).mean()),
        "held by the 95% interval": len(given) - len(missed),
        "missed with a note": sum(bool(f["notes"]) for f in missed),
        "held by that of either form": sum(f["held by either"] for f in given),
    }


def main() -> None:
    """Fit, predict and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CSV of the models, see above")
    args = parser.parse_args()
    frame = pd.read_csv(args.data)
    rows, predictions = [], []
    parts = [(name, part, task) for name, part in frame.groupby("training_set") for task in TASKS]
    for limit in LIMITS:
        size = {"models below": f"{limit / 1e9:g}B"}
        found = {link: [predict(part, task, limit, link) for _, part, task in parts] for link in LINKS}
        rows += [{**size, "link": link, **summary(of_link)} for link, of_link in found.items()]
        predictions += [
            {"training_set": name, "link": link, "limit": limit, **f}
            for link, of_link in found.items()
            for (name, *_), f in zip(parts, of_link)
            if f is not None
        ]
    print(format_table(rows))
    about = {"environment": environment("cpu"), "models": len(frame), "refits": REFITS}
    print(f"-> {write_result('downstream', {**about, 'rows': rows, 'predictions': predictions})}")


if __name__ == "__main__":
    main()
