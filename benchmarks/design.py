"""Does a proposed design know the best P better than the full grid of equal cost? `python benchmarks/design.py [--assert]`

Proposals are made once, from the shipped prior. Then laws are planted that differ from it in every constant, each sweep is
simulated 200 times under each, refitted with the law that the runs support, and the optimum of each refit searched: the
designer does not know the law that it is judged by. Laws whose best P lies outside the range of the sweep are drawn anew:
there both designs only find the edge.
"""

import argparse
import dataclasses
import statistics

import numpy as np

from analysis import laws
from analysis.cost import cost_of_plan
from analysis.expect import design_of, expect, search_box
from analysis.prior import Prior, default_prior
from analysis.proposal import propose
from analysis.search import Search
from benchmarks.common import RESULTS, environment, format_table, write_result
from sweeps import Sweep

N_LAWS = 24
CASES = (("allocation", 1e19, 1e21), ("allocation", 1e20, 1e23))
_INSIDE = 0.05


def plant(rng: np.random.Generator) -> Prior:
    """A law around the default: exponents by 15%, amplitudes by 30%, the concept term and g more widely."""
    base = default_prior()
    values = dict(base.values)
    for name in ("d1", "d2", "a"):
        factor = float(np.exp(rng.normal(0, 0.15)))
        # The amplitude follows, so that the term keeps its size at a hundred million parameters or two billion tokens.
        scale = 2e9 if name == "a" else 1e8
        amplitude = {"d1": "A_t", "d2": "A_c", "a": "A_d"}[name]
        values[amplitude] *= scale ** (values[name] * (factor - 1)) * float(np.exp(rng.normal(0, 0.3)))
        values[name] *= factor
    values["A_c"] *= float(np.exp(rng.normal(0, 0.5)))
    values["g"] = float(rng.uniform(0.02, 0.3))
    values["E0"] *= float(np.exp(rng.normal(0, 0.1)))
    return dataclasses.replace(base, values=values, source="planted")


def compare(recipe: str, budget: float, target: float, n_laws: int) -> list[dict[str, float]]:
    """One row a planted law: interval of P and of N under the proposal over that under the grid."""
    template = Sweep.from_yaml(f"sweeps/recipes/{recipe}.yaml")
    proposal = propose(template, default_prior(), budget=budget, target=target, n=20)
    cost, grid, design = cost_of_plan(proposal.grid), design_of(proposal.grid, "dlcm"), design_of(proposal.plan, "dlcm")
    law = proposal.expected.law
    rng, rows = np.random.default_rng(0), []
    ranges = {name: (float(grid.values(name).min()), float(grid.values(name).max())) for name in "RP"}
    while len(rows) < n_laws:
        planted = plant(rng)
        box = search_box(grid, planted, cost, target, ranges)
        best = Search(laws.COMPRESSION_AWARE, cost, target, box).minimise(planted.values)
        low, high = ranges["P"]
        if not low + _INSIDE < best[3] < high - _INSIDE:
            continue
        found = {
            name: expect(data, planted, cost, target, law=law, box=box, seed=len(rows))
            for name, data in (("grid", grid), ("design", design))
        }
        row = {"law": len(rows) + 1, "best_P": float(best[3]), "best_N": float(best[0]), "g": planted.values["g"]}
        for name in "PN":
            quantities = {key: e[name] for key, e in found.items()}
            row[f"{name}_interval_grid"] = quantities["grid"].width
            row[f"{name}_interval_design"] = quantities["design"].width
            row[f"{name}_interval_ratio"] = quantities["design"].width / quantities["grid"].width
            row[f"{name}_scatter_ratio"] = quantities["design"].spread / quantities["grid"].spread
        rows.append(row)
    costs = {"flops_grid": proposal.grid.flops, "flops_design": proposal.plan.flops}
    counts = {"runs_grid": len(proposal.grid), "runs_design": len(proposal.plan)}
    print(f"\n{recipe}, budget {budget:.3g} FLOPs, target {target:.3g}: {costs | counts}")
    print(format_table(rows))
    return [{**row, **costs, **counts} for row in rows]


def main() -> None:
    """Compare, record, and with --assert hold the claim."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assert", dest="check", action="store_true", help="fail where the claim does not hold")
    parser.add_argument("--laws", type=int, default=N_LAWS, help="planted laws of each case")
    args = parser.parse_args()
    cases = []
    for recipe, budget, target in CASES:
        rows = compare(recipe, budget, target, args.laws)
        summary = {
            "recipe": recipe,
            "budget_flops": budget,
            "target_flops": target,
            "n_laws": len(rows),
            "narrower_P": sum(row["P_interval_ratio"] < 1 for row in rows),
            "narrower_N": sum(row["N_interval_ratio"] < 1 for row in rows),
            "median_P_interval_ratio": statistics.median(row["P_interval_ratio"] for row in rows),
            "median_P_scatter_ratio": statistics.median(row["P_scatter_ratio"] for row in rows),
            "median_N_interval_ratio": statistics.median(row["N_interval_ratio"] for row in rows),
        }
        print({k: round(v, 3) if isinstance(v, float) and v < 100 else v for k, v in summary.items()})
        cases.append({**summary, "rows": rows})
    write_result("design", {"environment": environment("cpu"), "cases": cases})
    print(f"written: {RESULTS / 'design.json'}")
    if args.check:
        for case in cases:
            assert case["median_P_interval_ratio"] < 1, case
            assert case["narrower_P"] >= 0.75 * case["n_laws"], case


if __name__ == "__main__":
    main()
