"""A plan as a table for people: rich on a terminal, aligned text elsewhere, CSV."""

import io
from typing import Any

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
        f"{run.flops_train_planned:.3g}",
        f"{100 * run.budget_share:.2f}%",
    )


def format_plan(plan: Plan, *, limit: int | None = None) -> str:
    """The plan as aligned text, with a line of totals under it.

    Args:
        plan: from `plan`.
        limit: show that many runs at most, and say how many were left out.
    """
    shown = plan.runs[:limit]
    rows = [_COLUMNS, *(plan_cells(run) for run in shown)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(
            cell.ljust(w) if name in _LEFT else cell.rjust(w) for cell, w, name in zip(row, widths, _COLUMNS)
        ).rstrip()
        for row in rows
    ]
    if len(shown) < len(plan):
        lines.append(f"... and {len(plan) - len(shown)} more")
    return "\n".join([*lines, summary(plan)])


def rich_table(plan: Plan) -> Any:
    """The plan as a rich table."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=True)
    for run in plan.runs:
        table.add_row(*plan_cells(run))
    return table


def summary(plan: Plan) -> str:
    """Totals in one line."""
    n_dense = sum(run.config.model.is_dense for run in plan.runs)
    runs = f"{len(plan)} run{'s' * (len(plan) != 1)} ({len(plan) - n_dense} dlcm, {n_dense} dense)"
    return (
        f"{runs}: {short_count(plan.tokens)} tokens, {plan.flops:.3g} training FLOPs at the planned R. "
        "N: non-embedding parameters; P: backbone's share of N; R: tokens per concept."
    )


def format_csv(plan: Plan) -> str:
    """Every column of `Plan.to_frame` as CSV."""
    buffer = io.StringIO()
    plan.to_frame().to_csv(buffer, index=False)
    return buffer.getvalue()


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON: totals, and every run with its row, design and whole config."""
    from sweeps.plan import plan_row

    return {
        "sweep": plan.sweep.name,
        "n_runs": len(plan),
        "tokens": plan.tokens,
        "flops_train_planned": plan.flops,
        "runs": [
            {**plan_row(run, plan.sweep.name), "design": dict(run.design), "config": run.config.model_dump(mode="json")}
            for run in plan.runs
        ],
    }
