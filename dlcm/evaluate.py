"""Accuracy of a trained run: `evaluate(run_dir, tasks)` measures with lm-evaluation-harness and writes `eval/<task>.json`.

lm-eval, which takes seconds to import, is imported when there is something to measure. Nothing is fetched from a network.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dlcm.checkpoint import check_corpus, checkpoint_paths, load_config, load_trained
from dlcm.errors import UserError
from dlcm.mixture import Mixture
from dlcm.record import read_json, write_json
from dlcm.shards import Corpus, open_corpus
from dlcm.tasks import CORPUS_TASK, SCORING_VERSION, EvalTask, check_tasks, corpus_task, jsonl_task

if TYPE_CHECKING:
    from dlcm.harness import HarnessModel

RESULT_SCHEMA = 1
_PACKAGES = ("dlcm-scaling", "lm_eval", "torch", "tokenizers")

OnProgress = Callable[[str, int, int], None]
"""Called with the task, the requests done and the requests in all."""


@dataclass(frozen=True)
class TaskResult:
    """The content of `eval/<task>.json`. Standard errors are those of a mean over independent items.

    Attributes:
        task: its name.
        n: items.
        acc: share of items whose right answer has the largest log-likelihood given the query; in the task `corpus` the
            largest gain over its log-likelihood without it (`dlcm.tasks.corpus_task` says why).
        acc_norm: share of items whose right answer has the largest log-likelihood per byte.
        bits_per_byte: mean over items of -log2 p(right answer | query) / bytes of the right answer, delimiter not counted.
        chance: expected accuracy of guessing.
        task_hash: of items and scoring; equal hashes are the same test.
        checkpoint: file that the weights came from.
        versions: of what took part.
    """

    task: str
    n: int
    acc: float
    acc_stderr: float | None
    acc_norm: float
    acc_norm_stderr: float | None
    bits_per_byte: float | None
    bits_per_byte_stderr: float | None
    chance: float
    task_hash: str
    checkpoint: str
    versions: dict[str, str]
    n_shot: int = 0
    schema: int = RESULT_SCHEMA


def evaluate(
    run_dir: Path | str,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    force: bool = False,
    progress: OnProgress | None = None,
) -> list[TaskResult]:
    """Evaluate a run's newest checkpoint and write `eval/<task>.json` for each task.

    A task that was evaluated before, with the same items and the same checkpoint, is read back instead.

    Args:
        run_dir: directory of a trained run.
        tasks: `corpus`, or paths of .jsonl files (.gz, .zst too) with `query`, `choices`, `gold`.
        limit: items of each task, at most.
        force: evaluate anew.
        progress: told how far it is.

    Raises:
        UserError: unknown task, malformed row (file:line), no trained run, or a corpus that is not there.
    """
    run_dir = Path(run_dir)
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit}; expected 1 or more items")
    check_tasks(tasks)
    config = load_config(run_dir)
    corpus = open_corpus(config.data)
    check_corpus(run_dir, corpus)
    loaded = [_load_task(task, corpus, limit) for task in tasks]
    checkpoint = next((path.name for path in checkpoint_paths(run_dir)), "")
    results: list[TaskResult] = []
    lm: HarnessModel | None = None
    for task in loaded:
        path = run_dir / "eval" / f"{task.name}.json"
        task_hash = sha256(json.dumps([SCORING_VERSION, config.data.seq_len, task.hash]).encode()).hexdigest()
        done = None if force else _read_result(path, task_hash, checkpoint)
        if done is None:
            lm = lm or _load_lm(run_dir, corpus)
            done = _evaluate_task(lm, task, task_hash, checkpoint, progress)
            write_json(path, asdict(done))
        results.append(done)
    return results


def format_results(results: Sequence[TaskResult]) -> str:
    """A table with one line a task, standard errors behind ±."""

    def cell(value: float | None, error: float | None, scale: float = 1.0, digits: int = 1) -> str:
        if value is None:
            return "not finite"
        return f"{value * scale:.{digits}f}" + (f" ± {error * scale:.{digits}f}" if error is not None else "")

    rows = [("task", "items", "acc %", "acc_norm %", "chance %", "bits per byte")]
    for r in results:
        accuracies = cell(r.acc, r.acc_stderr, 100), cell(r.acc_norm, r.acc_norm_stderr, 100), f"{100 * r.chance:.1f}"
        rows.append((r.task, str(r.n), *accuracies, cell(r.bits_per_byte, r.bits_per_byte_stderr, 1, 3)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(part.ljust(width) for part, width in zip(row, widths)).rstrip() for row in rows)


def _load_task(task: str, corpus: Corpus | Mixture, limit: int | None) -> EvalTask:
    return corpus_task(corpus, limit) if task == CORPUS_TASK else jsonl_task(Path(task), limit)


def _load_lm(run_dir: Path, corpus: Corpus | Mixture) -> "HarnessModel":
    import torch

    from dlcm.harness import HarnessModel

    model, config = load_trained(run_dir)
    if corpus.tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{run_dir}: data.tokenizer {config.data.tokenizer!r} has {corpus.tokenizer.vocab_size} tokens here, the model "
            f"{config.model.vocab_size}: the corpus is not the one that the run was trained on"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=config.train.is_bf16(device))
    return HarnessModel(model.to(device), corpus.tokenizer, config.data.seq_len, autocast=autocast)


def _evaluate_task(
    lm: "HarnessModel", task: EvalTask, task_hash: str, checkpoint: str, progress: OnProgress | None
) -> TaskResult:
    from lm_eval.evaluator import evaluate as run_harness

    from dlcm.harness import HarnessTask

    lm.on_progress = (lambda done, total: progress(task.name, done, total)) if progress else (lambda *_: None)
    harness_task = HarnessTask(task)
    task_dict: Any = {task.name: harness_task}
    # With bootstrap_iters = 0 lm-eval would leave out the closed-form errors as well.
    answer = cast("dict[str, Any]", run_harness(lm, task_dict, bootstrap_iters=1, log_samples=False))
    scores: dict[str, Any] = answer["results"][task.name]
    fields: dict[str, Any] = {}
    for name, metric in harness_task.metrics.items():
        fields[name] = _finite(scores[f"{metric},none"])
        fields[f"{name}_stderr"] = _finite(scores[f"{metric}_stderr,none"])
    versions = {name: _version(name) for name in _PACKAGES}
    return TaskResult(
        task=task.name,
        n=len(task.items),
        chance=task.chance,
        task_hash=task_hash,
        checkpoint=checkpoint,
        versions=versions,
        **fields,
    )


def _finite(value: Any) -> float | None:
    """A number, or None where there is none: lm-eval writes 'N/A' for the error of a single item."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _read_result(path: Path, task_hash: str, checkpoint: str) -> TaskResult | None:
    """An earlier result, where it is of the same test and weights; a damaged or foreign file is measured again."""
    try:
        record = read_json(path)
        same = record["task_hash"] == task_hash and record["checkpoint"] == checkpoint
        return TaskResult(**record) if same and record["schema"] == RESULT_SCHEMA else None
    except (UserError, KeyError, TypeError):
        return None
