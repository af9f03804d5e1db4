"""A plan as a table for people: rich on a terminal, aligned text elsewhere, CSV. With costs where they are known."""

import io
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any

from flops.hardware import Estimate, Hardware
from sweeps.costs import PlanCosts, cost_row, costs_json, format_costs, format_hours
from sweeps.plan import Plan, PlannedRun

_COLUMNS = ("run", "shape", "N", "P", "R", "tokens", "FLOPs", "share")
_LEFT = ("run", "shape")


def short_count(number: float) -> str:
    """A count to three digits with k, M, B or T behind it: 1234567 -> `1.23M`."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999,950 is 1.00M, not 1e+03k: the unit follows the rounded number.
        if float(f"{number:.3g}") >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def format_shape(run: PlannedRun) -> str:
    """Layers and widths: `1+2+1 x 64|80` is encoder + backbone + decoder at token width 64 and concept width 80."""
    model = run.config.model
    if model.is_dense:
        return f"{model.n_encoder_layers} x {model.d_token}"
    layers = f"{model.n_encoder_layers}+{model.n_concept_layers}+{model.n_decoder_layers}"
    return f"{layers} x {model.d_token}|{model.d_concept}"


def plan_cells(run: PlannedRun) -> tuple[str, ...]:
    """The cells of one run, in the order of the table's columns."""
    dense = run.config.model.is_dense
    return (
        run.run_id,
        format_shape(run),
        short_count(run.params.non_embedding),
        "-" if dense else f"{run.concept_share:.3f}",
        "-" if dense else f"{run.compression_target:g}",
        short_count(run.tokens),
        f"{run.flops_train_planned:.3g}{' +' if run.steps_shared else ''}",
        f"{100 * run.budget_share:.2f}%",
    )


def _columns(costs: PlanCosts | None) -> tuple[str, ...]:
    """Titles; those of costs only where something is known."""
    if costs is None or not costs.runs:
        return _COLUMNS
    found = costs.runs[0]
    device_hours = ("device-h",) if costs.hardware is not None and costs.hardware.n_devices > 1 else ()
    return (*_COLUMNS, "time", *device_hours, "memory", *(("price",) if found.price is not None else ()))


def _cells(costs: PlanCosts | None, found: Estimate | None) -> tuple[str, ...]:
    """The cells of `_columns` behind those of the run."""
    if costs is None or costs.hardware is None or found is None:
        return ()
    device_hours = (f"{found.device_hours:,.3g}",) if costs.hardware.n_devices > 1 else ()
    memory = f"{found.memory.total / 1e9:.3g} GB{'' if found.fits else ' !'}"
    return (
        format_hours(found.hours),
        *device_hours,
        memory,
        *(() if found.price is None else (f"{found.price:,.2f}",)),
    )


def _with_estimates(plan: Plan, costs: PlanCosts | None) -> Iterator[tuple[PlannedRun, Estimate | None]]:
    estimates: Iterable[Estimate | None] = costs.runs if costs is not None and costs.runs else repeat(None)
    return zip(plan.runs, estimates)


def format_plan(plan: Plan, costs: PlanCosts | None = None, *, limit: int | None = None) -> str:
    """The plan as aligned text, with totals under it.

    Args:
        plan: from `plan`.
        costs: from `cost_plan`.
        limit: show that many runs at most, and say how many were left out.
    """
    columns = _columns(costs)
    shown = [(*plan_cells(run), *_cells(costs, found)) for run, found in _with_estimates(plan, costs)][:limit]
    rows = [columns, *shown]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = [
        "  ".join(
            cell.ljust(w) if name in _LEFT else cell.rjust(w) for cell, w, name in zip(row, widths, columns)
        ).rstrip()
        for row in rows
    ]
    if len(shown) < len(plan):
        lines.append(f"... and {len(plan) - len(shown)} more")
    return "\n".join([*lines, summary(plan, costs)])


def rich_table(plan: Plan, costs: PlanCosts | None = None) -> Any:
    """The plan as a rich table."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in _columns(costs):
        table.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=True)
    for run, found in _with_estimates(plan, costs):
        table.add_row(*plan_cells(run), *_cells(costs, found))
    return table


def summary(plan: Plan, costs: PlanCosts | None = None) -> str:
    """Totals in one line, and those of the costs below it."""
    n_dense = sum(run.config.model.is_dense for run in plan.runs)
    runs = f"{len(plan)} run{'s' * (len(plan) != 1)} ({len(plan) - n_dense} dlcm, {n_dense} dense)"
    line = (
        f"{runs}: {short_count(plan.tokens)} tokens, {plan.flops:.3g} training FLOPs at the planned R. "
        "N: non-embedding parameters; P: backbone's share of N; R: tokens per concept."
    )
    heads = {run.trunk_run for run in plan.runs if run.steps_shared}
    if heads:
        n = sum(run.steps_shared > 0 for run in plan.runs)
        trunks = f"{len(heads)} longer one{'s' * (len(heads) > 1)}"
        line += (
            f"\n{n} runs (+) branch from {trunks}: {plan.flops_marginal:.3g} FLOPs are trained, "
            f"{plan.flops / plan.flops_marginal:.2f}x less than alone; times and costs are of what each run trains itself."
        )
    told = format_costs(costs) if costs is not None else ""
    return f"{line}\n{told}" if told else line


def print_plan(plan: Plan, costs: PlanCosts | None = None) -> None:
    """Print the plan: rich on a terminal, aligned text elsewhere."""
    import sys

    if not sys.stdout.isatty():
        print(format_plan(plan, costs))
        return
    from rich.console import Console

    Console().print(rich_table(plan, costs))
    print(summary(plan, costs))


def format_csv(plan: Plan, costs: PlanCosts | None = None) -> str:
    """Every column of `Plan.to_frame`, and of `cost_row` where there are costs, as CSV."""
    import pandas as pd

    frame = plan.to_frame()
    if costs is not None and costs.hardware is not None:
        more = pd.DataFrame([cost_row(found, costs.hardware) for found in costs.runs])
        frame = pd.concat([frame, more], axis=1)
    buffer = io.StringIO()
    frame.to_csv(buffer, index=False)
    return buffer.getvalue()


def plan_json(plan: Plan, costs: PlanCosts | None = None) -> dict[str, Any]:
    """The plan as JSON: totals, costs, and every run with its row, design and whole config."""
    from sweeps.plan import plan_row

    def row(run: PlannedRun, found: Estimate | None) -> dict[str, Any]:
        hardware: Hardware | None = None if costs is None else costs.hardware
        more = {} if found is None or hardware is None else cost_row(found, hardware)
        told = {"design": dict(run.design), "config": run.config.model_dump(mode="json")}
        return {**plan_row(run, plan.sweep.name), **more, **told}

    return {
        "sweep": plan.sweep.name,
        "n_runs": len(plan),
        "tokens": plan.tokens,
        "flops_train_planned": plan.flops,
        "flops_train_marginal_planned": plan.flops_marginal,
        "costs": None if costs is None else costs_json(costs),
        "runs": [row(run, found) for run, found in _with_estimates(plan, costs)],
    }
