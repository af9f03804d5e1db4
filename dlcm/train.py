"""One run: train(config, run_dir) -> Result. Everything it says is a file of the run directory.

    run.json            the whole config            env.json         code, versions, machine
    metrics.jsonl       one line a log interval     checkpoints/     the newest two, the last good one; atomic
    result.json         written last: its presence is what "finished" means

A line of metrics.jsonl holds, over the steps since the line before: `loss_nats`, `boundary_rate` (F, the share of tokens
that were boundaries), `boundary_prob` (G, the mean of p), `tokens_per_concept` (1/F); and at its step: `step`, `tokens`, `lr`,
`tokens_per_s`, `mfu` (null where no peak of the device is known), `grad_norm`, `rms_embedding`, `rms_encoder`, `rms_concepts`,
`rms_decoder` (root mean square of the activations behind each part, null for parts that a dense model lacks), and
`boundary_offset`, what the controller adds to the score (in logits) before it decides, null without a controller. F, G and the
controller are those of the global batch, over all micro-batches and ranks.

A run is a function of its config: data order and boundary draws depend on (seed, step, position) alone, and a run that was
killed continues from its last checkpoint to the same bits (CPU, same number of threads).
"""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from dlcm.compiling import choose_compile, keep_compiled
from dlcm.config import SCHEMA_VERSION, RunConfig
from dlcm.distributed import Ranks, current_ranks, device_of
from dlcm.errors import UserError
from dlcm.micro_batch import shares, with_micro_batch
from dlcm.mixture import Mixture
from dlcm.progress import Progress as Progress
from dlcm.progress import StopTraining as StopTraining
from dlcm.record import read_json, remove_drafts, run_lock, write_json
from dlcm.result import Result as Result
from dlcm.result import load_result as load_result
from dlcm.shards import Corpus, open_corpus
from dlcm.tracking import check_trackers
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
    trackers: Sequence[str] = (),
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
        trackers: `tensorboard`, `wandb`: where metrics are mirrored to (`dlcm.tracking`).

    Returns:
        The result, with status `finished`, or `diverged` with the reason: divergence is a result, not an error.

    Raises:
        UserError: the directory holds another run, the corpus is missing, the tokenizer does not fit the model, a tracker is
            not installed.
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
            for folder in (run_dir, run_dir / "checkpoints", run_dir / "branches"):
                remove_drafts(folder)
            _claim(config, run_dir)
            return (run_dir / "result.json").exists()

        if ranks.on_main(claim):
            return load_result(run_dir)
        check_trackers(trackers)
        compiled = _compiled(executed, run_dir, ranks)
        how: dict[str, Any] = {"trunk": trunk, "keep": keep, "compiled": compiled, "trackers": trackers}
        return Trainer(config, run_dir, executed=executed, guard=guard, ranks=ranks, **how).run(on_step)


def _compiled(config: RunConfig, run_dir: Path, ranks: Ranks) -> bool:
    """Whether this run compiles its stacks: all ranks measure together, and rank 0 decides."""
    if config.train.compile is True:
        keep_compiled()
    device, name = device_of(ranks)

    def measure(compiled: bool, n_steps: int) -> list[float]:
        return list(islice(step_seconds(config, open_corpus(config.data), compiled=compiled, ranks=ranks), n_steps))

    return choose_compile(config, run_dir, device.type, name, measure, ranks.tell, ranks.world_size)


def step_seconds(
    config: RunConfig, corpus: Corpus | Mixture, *, compiled: bool | None = None, ranks: Ranks | None = None
) -> Iterator[float]:
    """Take the training steps of a run one by one, for measurements: nothing is written, and there is no last one.

    The ranks of a process group take them together.

    Args:
        config: the run; longer than what is measured, because its learning rate is scheduled for its own steps alone.
        corpus: what batches are drawn from; its tokenizer must fit the model.
        compiled: whether the stacks are compiled; only where the config says `compile: true` by default.
        ranks: the processes of the run, each of which must take the same steps.

    Yields:
        Wall seconds of each step, the drawing of its batch and the optimizer included. A step ends by reading results of
        its last operations, so on a GPU too the time is that of the work, not of its launch.
    """
    compiled = config.train.compile is True if compiled is None else compiled
    trainer = Trainer(config, Path(), corpus, compiled=compiled, ranks=ranks)
    with trainer.loader:
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
