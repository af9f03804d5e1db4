"""One run: train(config, run_dir) -> Result. Everything it says is a file of the run directory.

    run.json            the whole config            env.json         code, versions, machine
    metrics.jsonl       one line a log interval     checkpoints/     the newest two, atomic
    result.json         written last: its presence is what "finished" means

A line of metrics.jsonl holds, over the steps since the line before: `loss_nats`, `boundary_rate` (F, the share of tokens
that were boundaries), `boundary_prob` (G, the mean of p), `tokens_per_concept` (1/F); and at its step: `step`, `tokens`, `lr`,
`tokens_per_s`, `grad_norm`, and `boundary_offset`, what the controller adds to the score (in logits) before it decides, null
without a controller. F, G and the controller are those of the global batch, over all micro-batches and ranks.

A run is a function of its config: data order and boundary draws depend on (seed, step, position) alone, and a run that was
killed continues from its last checkpoint to the same bits (CPU, same number of threads).
"""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from dlcm.config import SCHEMA_VERSION, RunConfig
from dlcm.distributed import current_ranks
from dlcm.errors import UserError
from dlcm.micro_batch import shares, with_micro_batch
from dlcm.record import read_json, run_lock, write_json
from dlcm.result import Result as Result
from dlcm.result import load_result as load_result
from dlcm.shards import Corpus
from dlcm.trainer import Progress as Progress
from dlcm.trainer import StopTraining as StopTraining
from dlcm.trainer import Trainer


def train(
    config: RunConfig,
    run_dir: Path | str,
    *,
    on_step: Callable[[Progress], None] | None = None,
    guard: Callable[[], None] = lambda: None,
    micro_batch_tokens: int | None = None,
    trunk: Path | None = None,
    keep: Collection[int] = (),
) -> Result:
    """Train one run, or continue it, or return what it found.

    Args:
        config: the run.
        run_dir: its directory; made if absent. A finished run is not touched.
        on_step: called after every step; may raise `StopTraining`.
        guard: called before every write into the directory; may raise to end a process that must not write any more.
        micro_batch_tokens: tokens of one forward pass in place of the config's, where memory does not suffice: the
            global batch and the run stay the same, up to rounding.
        trunk: directory of a longer run that is the same up to where this one decays, and has kept its state there: the run
            goes on from it, unless it has begun already (`dlcm.trunk`).
        keep: steps, none beyond the last stable one, whose state is kept for shorter runs.

    Returns:
        The result, with status `finished`, or `diverged` with the reason: divergence is a result, not an error.

    Raises:
        UserError: the directory holds another run, the corpus is missing, the tokenizer does not fit the model.
        RunBusyError: another process is training this run.
    """
    run_dir = Path(run_dir)
    executed = with_micro_batch(config, micro_batch_tokens)
    ranks = current_ranks()
    shares(config, ranks.world_size)  # refuses a batch that the ranks cannot share
    with contextlib.ExitStack() as stack:

        def claim() -> bool:
            stack.enter_context(run_lock(run_dir))
            guard()
            _claim(config, run_dir)
            return (run_dir / "result.json").exists()

        if ranks.on_main(claim):
            return load_result(run_dir)
        trainer = Trainer(config, run_dir, executed=executed, guard=guard, ranks=ranks, trunk=trunk, keep=keep)
        return trainer.run(on_step)


def step_seconds(config: RunConfig, corpus: Corpus) -> Iterator[float]:
    """Take the training steps of a run one by one, for measurements: nothing is written, and there is no last one.

    The ranks of a process group take them together.

    Args:
        config: the run; longer than what is measured, because its learning rate is scheduled for its own steps alone.
        corpus: what batches are drawn from; its tokenizer must fit the model.

    Yields:
        Wall seconds of each step, the drawing of its batch and the optimizer included. A step ends by reading results of
        its last operations, so on a GPU too the time is that of the work, not of its launch.
    """
    trainer = Trainer(config, Path(), corpus, ranks=current_ranks())
    while True:
        started = time.perf_counter()
        trainer.train_step()
        trainer.step += 1
        yield time.perf_counter() - started


def _claim(config: RunConfig, run_dir: Path) -> None:
    """Write `run.json`, or check that the directory already belongs to this very config."""
    path = run_dir / "run.json"
    if path.exists():
        if read_json(path).get("run_id") != config.run_id:
            raise UserError(f"{path}: belongs to another run; choose a new run directory")
        return
    write_json(path, {"schema": SCHEMA_VERSION, "run_id": config.run_id, "config": config.model_dump(mode="json")})
