"""The cost function that belongs to a results file: that of the sweep it was collected from."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis.data import Convention, find_results, numeric_column, read_table
from analysis.search import Cost
from dlcm.errors import UserError

if TYPE_CHECKING:
    from dlcm.config import RunConfig
    from sweeps.plan import Plan
    from sweeps.shapes import ShapeRule


def cost_of_results(path: str | Path, *, vocab_size: int | None = None) -> Cost:
    """cost(N, D, R, P) under the shape rule, window and vocabulary of a sweep; N counts non-embedding parameters.

    Args:
        path: a sweep folder or the results file in it; or results that stand alone, together with `vocab_size`.
        vocab_size: vocabulary of the models, where the sweep's own folder is not at hand; its default shape rule holds then.

    Raises:
        UserError: there is no sweep beside the results and no `vocab_size`, or its runs differ in vocabulary or window.
    """
    from sweeps.smooth_cost import cost_function

    results = find_results(path)
    folder = results.parent
    if vocab_size is None and not (folder / "plan.parquet").exists():
        raise UserError(
            f"{results}: stands apart from its sweep (no plan.parquet beside it), so shapes cannot be priced; "
            "give the sweep folder, or the vocabulary with vocab_size= (--vocab-size)"
        )
    if vocab_size is not None:
        lengths = numeric_column(read_table(results), "seq_len", str(results))
        return cost_function(vocab_size=vocab_size, seq_len=_only(lengths, "seq_len", str(results)))
    from sweeps.store import load_sweep

    sweep = load_sweep(folder)
    return _cost_of_runs([run.config for run in sweep.runs], sweep.spec.shape, str(folder))


def cost_of_plan(plan: "Plan") -> Cost:
    """cost(N, D, R, P) under the shape rule, window and vocabulary of a plan; N counts non-embedding parameters.

    Raises:
        UserError: its runs differ in vocabulary or window.
    """
    return _cost_of_runs([run.config for run in plan.runs], plan.sweep.shape, plan.sweep.where)


def _cost_of_runs(configs: Sequence["RunConfig"], rule: "ShapeRule", where: str) -> Cost:
    from sweeps.shapes import Parts
    from sweeps.smooth_cost import cost_function

    vocabulary = _only([c.model.vocab_size for c in configs], "model.vocab_size", where)
    seq_len = _only([c.data.seq_len for c in configs], "data.seq_len", where)
    typical = next((c for c in configs if not c.model.is_dense), configs[0])
    return cost_function(vocab_size=vocabulary, seq_len=seq_len, rule=rule, parts=Parts.of(typical.model.model_dump()))


def require_priced(convention: Convention) -> None:
    """The shape rule prices non-embedding parameters, with causal attention halved.

    Raises:
        UserError: N or C were loaded under another convention.
    """
    if convention.n != "non_embedding" or convention.c != "causal":
        raise UserError(
            "the cost function counts N without embeddings and C causal-halved; "
            "load the results with n='non_embedding', c='causal'"
        )


def _only(values: object, name: str, where: str) -> int:
    distinct = np.unique(np.asarray(values))
    if len(distinct) != 1:
        raise UserError(
            f"{where}: runs differ in {name} ({', '.join(f'{v:g}' for v in distinct[:4])}); "
            "their cost is no function of N, D, R, P alone"
        )
    return int(distinct[0])
