"""Accuracy of a trained run: `evaluate(run_dir, tasks)` measures with lm-evaluation-harness and writes `eval/<task>.json`.

lm-eval, which takes seconds to import, is imported when there is something to measure. Nothing is fetched from a network.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dlcm.checkpoint import check_corpus, checkpoint_paths, load_config
from dlcm.config import RunConfig
from dlcm.corpus_task import corpus_task
from dlcm.errors import UserError
from dlcm.mixture import Mixture, parts_of
from dlcm.provenance import commit_in_words
from dlcm.record import read_json, write_json
from dlcm.shards import Corpus, open_corpus
from dlcm.tasks import EvalTask, TaskWord, check_tasks, expand_tasks, jsonl_task, parse_task

if TYPE_CHECKING:
    from dlcm.harness import HarnessModel

RESULT_SCHEMA = 2
_PACKAGES = ("dlcm-scaling", "lm_eval", "torch", "tokenizers")

OnProgress = Callable[[str, int, int], None]
"""Called with what is done, the requests answered and the requests in all."""


@dataclass(frozen=True)
class TaskResult:
    """The content of `eval/<task>.json`. Standard errors are those of a mean over independent items.

    Attributes:
        task: its name.
        source: where its items are from.
        n: items.
        n_shot: answered questions in each prompt.
        shots: items that those are taken from, in order; an item that is among them has the next one in its own place.
        n_truncated: items whose prompt was longer than the model can read and lost its beginning.
        acc: share of items whose right answer has the largest log-likelihood given the prompt; in the task `corpus` the
            largest gain over its log-likelihood without it (`dlcm.corpus_task.corpus_task` says why); of a last word the share
            that the model writes by itself.
        acc_norm: share of items whose right answer has the largest log-likelihood per byte; none for a last word.
        bits_per_byte: mean over items of -log2 p(right answer | prompt) / bytes of the right answer, delimiter not counted.
        chance: expected accuracy of guessing.
        constant: accuracy of giving the answer of one place always, the best one; where answers are letters, a model that knows
            nothing often does just that.
        task_hash: of prompts, answers and scoring; equal hashes are the same test, item by item.
        max_length: tokens that the model reads, end of text included.
        checkpoint: file that the weights came from.
        versions: of what took part.
        correct: a digit an item, 1 where `acc` counts it as right: two runs of one `task_hash` are compared item by item.
        correct_norm: the same of `acc_norm`.
        item_bits_per_byte: bits per byte of each item to four digits, separated by blanks.
    """

    task: str
    source: str
    n: int
    n_shot: int
    shots: tuple[int, ...]
    n_truncated: int
    acc: float
    acc_stderr: float | None
    acc_norm: float | None
    acc_norm_stderr: float | None
    bits_per_byte: float | None
    bits_per_byte_stderr: float | None
    chance: float
    constant: float
    task_hash: str
    max_length: int
    checkpoint: str
    versions: dict[str, str]
    correct: str
    correct_norm: str | None
    item_bits_per_byte: str
    schema: int = RESULT_SCHEMA


@dataclass(frozen=True)
class _Asked:
    """What is asked of one run: the tasks, and what a result that still holds would have to say.

    Attributes:
        run_dir: directory of the run.
        tasks: with their items.
        max_length: tokens that the model reads.
        checkpoint: file of the weights, the newest.
    """

    run_dir: Path
    tasks: tuple[EvalTask, ...]
    max_length: int
    checkpoint: str

    def path(self, task: EvalTask) -> Path:
        """Where the result of a task stands."""
        return self.run_dir / "eval" / f"{task.name}.json"

    def known(self, task: EvalTask) -> TaskResult | None:
        """An earlier result, where it is of the same test and weights; a damaged or foreign file is measured again."""
        try:
            record = read_json(self.path(task))
            told = [record[key] for key in ("schema", "task_hash", "max_length", "checkpoint")]
            if told != [RESULT_SCHEMA, task.hash, self.max_length, self.checkpoint]:
                return None
            fields: dict[str, Any] = {**record, "shots": tuple(record["shots"]), "constant": task.constant}
            return TaskResult(**fields)
        except (UserError, KeyError, TypeError):
            return None


def evaluate(
    run_dir: Path | str,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    force: bool = False,
    progress: OnProgress | None = None,
) -> list[TaskResult]:
    """Evaluate a run's newest checkpoint and write `eval/<task>.json` for each task.

    All tasks are answered in one pass over their requests. A task that was evaluated before, with the same items and the same
    checkpoint, is read back instead.

    Args:
        run_dir: directory of a trained run.
        tasks: words as `dlcm.tasks` has them: `corpus`, paths of .jsonl files (.gz, .zst too), `lm-eval:NAME`, suites.
        limit: items of each task, at most.
        force: evaluate anew.
        progress: told how far it is.

    Raises:
        UserError: unknown task, malformed row (file:line), no trained run, or a corpus that is not there.
    """
    run_dir = Path(run_dir)
    config, corpus = _open(run_dir, tasks, limit)
    asked = _asked(run_dir, tasks, limit, config, corpus)
    results = {task.name: None if force else asked.known(task) for task in asked.tasks}
    open_tasks = [task for task in asked.tasks if results[task.name] is None]
    if open_tasks:
        lm, checkpoint = _load_lm(run_dir, corpus)
        for result in _measure(lm, open_tasks, replace(asked, checkpoint=checkpoint), progress):
            results[result.task] = result
    return [result for task in asked.tasks if (result := results[task.name]) is not None]


@dataclass(frozen=True)
class Pending:
    """What `evaluate` would measure of a run.

    Attributes:
        tasks: the words of tasks that were not measured yet, or on other items, or with other weights.
        n_tokens: tokens to read, about: as many as their characters make in the training text.
    """

    tasks: tuple[str, ...]
    n_tokens: int


def pending(run_dir: Path | str, tasks: Sequence[str], *, limit: int | None = None, force: bool = False) -> Pending:
    """Which of the tasks `evaluate` would measure, without measuring them. Arguments and errors are those of `evaluate`."""
    run_dir, words = Path(run_dir), expand_tasks(tasks)
    config, corpus = _open(run_dir, words, limit)
    asked = _asked(run_dir, words, limit, config, corpus)
    chosen = [(word, task) for word, task in zip(words, asked.tasks) if force or asked.known(task) is None]
    parts = parts_of(corpus)
    tokens_per_byte = sum(p.corpus.train.n_tokens for p in parts) / sum(p.corpus.train.n_bytes for p in parts)
    n_characters = sum(task.n_characters for _, task in chosen)
    return Pending(tuple(word for word, _ in chosen), round(tokens_per_byte * n_characters))


def _open(run_dir: Path, tasks: Sequence[str], limit: int | None) -> tuple[RunConfig, Corpus | Mixture]:
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit}; expected 1 or more items")
    check_tasks(tasks)
    config = load_config(run_dir)
    corpus = open_corpus(config.data)
    check_corpus(run_dir, corpus)
    return config, corpus


def _asked(
    run_dir: Path, words: Sequence[str], limit: int | None, config: RunConfig, corpus: Corpus | Mixture
) -> _Asked:
    loaded = tuple(_load_task(parse_task(word), corpus, limit) for word in expand_tasks(words))
    checkpoint = next((path.name for path in checkpoint_paths(run_dir)), "")
    return _Asked(run_dir, loaded, config.data.seq_len, checkpoint)


def format_results(results: Sequence[TaskResult]) -> str:
    """A table with one line a task, standard errors behind ±; below it what was cut."""

    def cell(value: float | None, error: float | None, scale: float = 1.0, digits: int = 1) -> str:
        if value is None:
            return "not finite"
        return f"{value * scale:.{digits}f}" + (f" ± {error * scale:.{digits}f}" if error is not None else "")

    rows = [("task", "items", "acc %", "acc_norm %", "chance %", "constant %", "bits per byte")]
    for r in results:
        norm = "-" if r.correct_norm is None else cell(r.acc_norm, r.acc_norm_stderr, 100)
        accuracies = cell(r.acc, r.acc_stderr, 100), norm, f"{100 * r.chance:.1f}", f"{100 * r.constant:.1f}"
        rows.append((r.task, str(r.n), *accuracies, cell(r.bits_per_byte, r.bits_per_byte_stderr, 1, 3)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(part.ljust(width) for part, width in zip(row, widths)).rstrip() for row in rows]
    cut = [f"{r.task}: {r.n_truncated} of {r.n} prompts" for r in results if r.n_truncated]
    if cut:
        length = max(r.max_length for r in results)
        lines.append(
            f"longer than the {length} tokens that the model reads, their beginning left out: {', '.join(cut)}"
        )
    return "\n".join(lines)


# Runs of a sweep are asked the same: what was read for one serves the next.
_loaded: dict[tuple[Any, ...], EvalTask] = {}
_MAX_LOADED = 64


def _load_task(task: TaskWord, corpus: Corpus | Mixture, limit: int | None) -> EvalTask:
    key: tuple[Any, ...] = (task.word, limit)
    if task.kind == "corpus":
        key += (corpus.fingerprint, *(part.weight for part in parts_of(corpus)))
    elif task.kind == "file":
        written = Path(task.target).stat()
        key += (str(Path.cwd()), written.st_mtime_ns, written.st_size)
    if key not in _loaded:
        if len(_loaded) >= _MAX_LOADED:
            _loaded.clear()
        _loaded[key] = _read_task(task, corpus, limit)
    return _loaded[key]


def _read_task(task: TaskWord, corpus: Corpus | Mixture, limit: int | None) -> EvalTask:
    if task.kind == "corpus":
        return corpus_task(corpus, limit)
    if task.kind == "file":
        return jsonl_task(Path(task.target), limit, task.n_shot)
    from dlcm.lm_eval_tasks import lm_eval_task

    return lm_eval_task(task.target, limit, task.n_shot)


def _load_lm(run_dir: Path, corpus: Corpus | Mixture) -> tuple["HarnessModel", str]:
    """The model for lm-eval, and the name of the file that its weights came from."""
    from dlcm.harness import HarnessModel
    from dlcm.opened import open_model

    run = open_model(run_dir, corpus)
    return HarnessModel(run.model, run.tokenizer, run.config.data.seq_len, autocast=run.autocast), run.checkpoint


def _measure(
    lm: "HarnessModel", tasks: Sequence[EvalTask], asked: _Asked, progress: OnProgress | None
) -> Iterator[TaskResult]:
    """Measure tasks in one pass of the model, and write their results."""
    from lm_eval.evaluator import evaluate as run_harness

    from dlcm.harness import HarnessTask

    lm.on_progress = (lambda done, total: progress("evaluating", done, total)) if progress else (lambda *_: None)
    wrapped: Any = {task.name: HarnessTask(task) for task in tasks}
    # With bootstrap_iters = 0 lm-eval would leave out the closed-form errors as well.
    answer = cast("dict[str, Any]", run_harness(lm, wrapped, bootstrap_iters=1, log_samples=True))
    versions = {name: _version(name) for name in _PACKAGES} | {"commit": commit_in_words()}
    for task in tasks:
        scores, samples = answer["results"][task.name], answer["samples"][task.name]
        fields: dict[str, Any] = {}
        for name in ("acc", "acc_norm", "bits_per_byte"):
            fields[name] = _finite(scores.get(f"{name},none"))
            fields[f"{name}_stderr"] = _finite(scores.get(f"{name}_stderr,none"))
        norm = "".join(str(int(sample["acc_norm"])) for sample in samples) if "acc_norm" in samples[0] else None
        result = TaskResult(
            task=task.name,
            source=task.source,
            n=len(task.items),
            n_shot=task.n_shot,
            shots=task.shots,
            n_truncated=len(lm.truncated[task.name]),
            chance=task.chance,
            constant=task.constant,
            task_hash=task.hash,
            max_length=asked.max_length,
            checkpoint=asked.checkpoint,
            versions=versions,
            correct="".join(str(int(sample["acc"])) for sample in samples),
            correct_norm=norm,
            item_bits_per_byte=" ".join(f"{sample['bits_per_byte']:.4g}" for sample in samples),
            **fields,
        )
        write_json(asked.path(task), asdict(result))
        yield result


def _finite(value: Any) -> float | None:
    """A number, or None where there is none: lm-eval writes 'N/A' for the error of a single item."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
