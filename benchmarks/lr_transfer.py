"""Does the best learning rate stay in place over the widths? Stores and draws what `dlcm analyze lr` finds in finished sweeps.

    dlcm sweep submit sweeps/recipes/lr_transfer.yaml
    python benchmarks/lr_transfer.py runs/lr_transfer [more results...] [--assert]

`--assert` fails where under muP the best rate moves by more than one step of the grid (x1.5).
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.data import find_results, read_table
from analysis.lr import analyse_transfer, format_transfer, save_transfer, transfer_json
from benchmarks.common import environment, format_table, write_result

FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "lr_transfer.png"


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a size and parametrization."""
    rows = []
    for curve in sorted(found["curves"], key=lambda c: (c["parametrization"], c["n"])):
        interval = curve["interval"]
        rows.append(
            {
                "": {"mup": "muP"}.get(curve["parametrization"], curve["parametrization"]),
                "parameters": curve["n"],
                "width": curve["d_token"],
                "runs": len(curve["runs"]),
                "best rate": f"{curve['best']:.3g}" + ("" if curve["inside"] else " (edge of the grid)"),
                "95%": "not known" if interval is None else f"{interval[0]:.2g} to {interval[1]:.2g}",
                "least mean loss, nats": f"{min(mean for mean in curve['means'].values() if mean is not None):.3f}",
            }
        )
    return rows


def main() -> None:
    """Read, print, store, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results of one sweep or of several, taken together")
    parser.add_argument("--assert", dest="must", action="store_true")
    options = parser.parse_args()
    frame = pd.concat([read_table(find_results(path)) for path in options.results], ignore_index=True)
    transfer = analyse_transfer(frame, ", ".join(map(str, options.results)))
    found = transfer_json(transfer)
    print(format_transfer(transfer))
    print(format_table(table(found)))
    commits = sorted({str(commit) for commit in frame["commit"].dropna()})
    about = {
        "environment": environment("cpu"),
        "code_of_runs": commits,
        "verdict": format_transfer(transfer).splitlines()[-1],
    }
    print(f"-> {write_result('lr_transfer', {**about, 'rows': table(found), **found})}")
    with tempfile.TemporaryDirectory() as folder:
        save_transfer(transfer, Path(folder))
        shutil.copy(Path(folder) / "lr_transfer.png", FIGURE)
    print(f"-> {FIGURE}")
    if options.must and transfer.transfers is not True:
        raise SystemExit("error: the best rate moves by more than one step")


if __name__ == "__main__":
    main()
