"""Trackers: what metrics.jsonl says, shown in TensorBoard or Weights & Biases as well.

The run directory stays the record; a tracker mirrors it and may be missing lines, never hold others. A tracker that fails on the
way (a full disk, a network that is down) is dropped with a warning: it must not cost a run. Both write below the run's directory:

    tensorboard/    event files: `tensorboard --logdir runs/<sweep>` shows all runs of a sweep
    wandb/          one folder a start; without an account (`WANDB_API_KEY`, or `wandb login`) or with `WANDB_MODE=offline`
                    nothing is sent, and `wandb sync runs/<sweep>/*/wandb/offline-run-*` does so later
"""

import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from dlcm.config import RunConfig
from dlcm.errors import UserError

TrackerName = Literal["tensorboard", "wandb"]
_PROJECT = "dlcm-scaling"
# Of result.json: what a table of runs is sorted by.
_SUMMARY = (
    "status",
    "loss_nats",
    "bits_per_byte",
    "tokens_per_concept",
    "tokens_per_concept_train",
    "epochs",
    "wall_s",
)


class Tracker(Protocol):
    """One place to mirror a run to."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take over the figures of one step."""

    def close(self, summary: Mapping[str, Any]) -> None:
        """End, with what the run found; empty where it was interrupted."""


def check_trackers(names: Iterable[str]) -> None:
    """Refuse trackers whose packages are not installed.

    Raises:
        UserError: with the name and the way out.
    """
    for name in names:
        if name not in _TRACKERS:
            raise UserError(f"track: unknown tracker {name!r}; known are {', '.join(_TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"track: {name} is not installed: pip install 'dlcm-scaling[track]', or leave it out")


class Tracking:
    """The trackers of a run, as a context; they are told every line of metrics.jsonl.

    Args:
        names: of `TrackerName`.
        config: the run.
        run_dir: its directory; its parent's name is the group that trackers show the runs of a sweep under.
        past: lines of metrics.jsonl that were there before this start.

    Raises:
        UserError: a tracker is not installed.
    """

    def __init__(
        self, names: Sequence[str], config: RunConfig, run_dir: Path, past: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        check_trackers(names)
        self._trackers: dict[str, Tracker] = {}
        self._summary: dict[str, Any] = {}
        for name in names:
            self._guarded(name, lambda name=name: self._trackers.update({name: _TRACKERS[name](config, run_dir, past)}))

    def log(self, row: Mapping[str, Any]) -> None:
        """Mirror a line of metrics.jsonl."""
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, lambda tracker=tracker: tracker.log(row["step"], _figures(row)))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Keep what the run found for the end."""
        self._summary = {key: result[key] for key in _SUMMARY if result.get(key) is not None}

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, lambda tracker=tracker: tracker.close(self._summary))

    def _guarded(self, name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # of foreign libraries, of any type
            self._trackers.pop(name, None)
            print(f"warning: {name} is left out from here on ({type(error).__name__}: {error})", file=sys.stderr)


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line, named as trackers group them; what was not measured is left out."""
    return {
        f"train/{key}": float(value)
        for key, value in row.items()
        if key != "step" and value is not None and math.isfinite(value)
    }


class _TensorBoard:
    def __init__(self, config: RunConfig, run_dir: Path, past: Sequence[Mapping[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run_dir / "tensorboard"
        again = any(folder.glob("events.*"))
        last = past[-1]["step"] if past else 0
        # What an interrupted start wrote beyond the checkpoint is written again.
        self._writer = SummaryWriter(str(folder), purge_step=last + 1 if again else None)
        self._step = last
        if not again:
            self._writer.add_text("config", f"```json\n{config.model_dump_json(indent=2)}\n```")
            for row in past:
                self.log(row["step"], _figures(row))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._step = step
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self, summary: Mapping[str, Any]) -> None:
        for key, value in summary.items():
            if not isinstance(value, str):
                self._writer.add_scalar(f"result/{key}", value, self._step)
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, config: RunConfig, run_dir: Path, past: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            group=run_dir.resolve().parent.name,
            name=config.run_id,
            id=config.run_id,
            dir=str(run_dir),
            config=config.model_dump(mode="json"),
            resume="allow",
            mode=None if _has_account() else "offline",
            settings=wandb.Settings(console="off", silent=True),
        )
        for row in past:
            if row["step"] >= self._run.starting_step:
                self.log(row["step"], _figures(row))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update({f"result/{key}": value for key, value in summary.items()})
        self._run.finish(exit_code=0 if summary else 1)


def _has_account() -> bool:
    """Whether `wandb` may be left to its own settings: it would ask at the terminal where it knows no account."""
    if "WANDB_MODE" in os.environ or "WANDB_API_KEY" in os.environ:
        return True
    netrc = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text(errors="replace")


_TRACKERS: dict[str, Callable[[RunConfig, Path, Sequence[Mapping[str, Any]]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
}
