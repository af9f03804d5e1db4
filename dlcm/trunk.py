"""One trunk, many budgets: what a run keeps on its way so that shorter runs can go on from it.

Under warm-up, stable rate and decay, with a warm-up in tokens, two runs that differ in length alone are the same run up to
where the shorter one begins to decay (`RunConfig.n_stable_steps`): weights, moments, controller, sums, to the bit. So the
longest run of a family keeps its state at those steps, in `branches/step-<step>.pt` of its directory, with the lines of its log
up to there, and each shorter one trains its decay only, from a first checkpoint of its own. What comes out is the run that it
would have been alone; `result.json` says what it had from whom.
"""

import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dlcm.config import SCHEMA_VERSION, RunConfig
from dlcm.errors import UserError
from dlcm.record import read_metrics, write_atomic
from dlcm.tally import Tally


class UnusableBranchError(UserError):
    """The state that a longer run kept cannot be read; the run can still be trained alone."""


def branch_path(run_dir: Path, step: int) -> Path:
    """Where a run keeps its state after `step` steps for shorter runs."""
    return run_dir / "branches" / f"step-{step:08d}.pt"


def save_branch(run_dir: Path, step: int, config: RunConfig, state: Mapping[str, Any], wall_s: float) -> None:
    """Keep the state of a run after `step` steps.

    Args:
        run_dir: of the run.
        step: no later than the last stable step.
        config: of the run.
        state: `model`, `optimizer` and `tally`, as in a checkpoint.
        wall_s: seconds that led there.

    Raises:
        ValueError: beyond the stable steps, where runs of other lengths differ.
    """
    if step > config.n_stable_steps:
        raise ValueError(f"step {step} is beyond the {config.n_stable_steps} stable steps of {config.run_id}")
    buffer = io.BytesIO()
    head = {"schema": SCHEMA_VERSION, "trunk": config.trunk, "run_id": config.run_id, "step": step, "wall_s": wall_s}
    # The trunk's own log is cut back when it is resumed from an earlier step: the lines that lead here stay with the state.
    metrics = [row for row in read_metrics(run_dir / "metrics.jsonl") if row["step"] <= step]
    torch.save({**head, "metrics": metrics, **state}, buffer)
    write_atomic(branch_path(run_dir, step), buffer.getvalue())


def load_branch(trunk_dir: Path, config: RunConfig, *, mapped: bool = False) -> dict[str, Any]:
    """The state that a run of this config begins its decay from, as a checkpoint of it; `mapped` as for `load_checkpoint`.

    Beside what a checkpoint has there are `metrics`, the lines of the log that lead there.

    Raises:
        UserError: not kept, or of a run that is not the same up to there; `UnusableBranchError` where it is damaged.
    """
    path = branch_path(trunk_dir, config.n_stable_steps)
    if not path.exists():
        raise UserError(f"{path}: not there; the longer run has not kept its state at this step")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many types for a damaged file
        raise UnusableBranchError(
            f"{path}: damaged ({type(error).__name__}); delete it, and the run is trained alone"
        ) from None
    if state.get("schema") != SCHEMA_VERSION or state.get("trunk") != config.trunk:
        raise UserError(f"{path}: kept by a run that is not the same up to this step; delete it")
    if "metrics" not in state:
        raise UnusableBranchError(f"{path}: kept by an earlier version; delete it, and the run is trained alone")
    tally = Tally(**state["tally"])
    tally.trunk, tally.trunk_tokens = state["run_id"], state["step"] * config.train.batch_tokens
    tally.trunk_wall_s, tally.wall_s = tally.trunk_wall_s + state["wall_s"], 0.0
    tally.good_step = None  # a checkpoint of the trunk; this run has none yet
    return {**state, "tally": asdict(tally)}
