"""Checkpoints: written whole or not at all, resumed exactly, refused where they belong to another config."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dlcm.config import SCHEMA_VERSION, RunConfig
from dlcm.errors import UserError, parse
from dlcm.record import read_json, write_atomic

if TYPE_CHECKING:
    from dlcm.mixture import Mixture
    from dlcm.model import Model
    from dlcm.shards import Corpus

# A checkpoint that turns out unreadable (a disk that filled, a lost block) costs one interval, not the run.
N_KEPT = 2


def save_checkpoint(
    run_dir: Path, step: int, config: RunConfig, state: dict[str, Any], good_step: int | None = None
) -> Path:
    """Write `checkpoints/step-<step>.pt` atomically; delete all but the newest `N_KEPT` and that of `good_step`."""
    buffer = io.BytesIO()
    torch.save({"schema": SCHEMA_VERSION, "config_hash": config.hash, "step": step, **state}, buffer)
    path = checkpoint_path(run_dir, step)
    write_atomic(path, buffer.getvalue())
    for old in checkpoint_paths(run_dir)[N_KEPT:]:
        if good_step is None or old != checkpoint_path(run_dir, good_step):
            old.unlink()
    return path


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the state after `step` steps is saved."""
    return run_dir / "checkpoints" / f"step-{step:08d}.pt"


def checkpoint_paths(run_dir: Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    return sorted((run_dir / "checkpoints").glob("step-*.pt"), reverse=True)


def load_checkpoint(run_dir: Path, config: RunConfig, *, mapped: bool = False) -> dict[str, Any] | None:
    """The newest readable checkpoint to go on from, or None where there is none yet.

    Args:
        run_dir: of the run.
        config: of the run.
        mapped: leave the tensors in the file until they are read: the ranks of a machine share its pages, and none reads all.

    Raises:
        UserError: checkpoints are there but none can be read, or they belong to another config.
    """
    found = _newest_readable(run_dir, config, mapped)
    return None if found is None else found[1]


def _newest_readable(run_dir: Path, config: RunConfig, mapped: bool) -> tuple[Path, dict[str, Any]] | None:
    paths = checkpoint_paths(run_dir)
    faults = []
    for path in paths:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # torch raises many types for a damaged file
            faults.append(f"{path.name}: {type(error).__name__}")
            continue
        if state.get("schema") != SCHEMA_VERSION or state.get("config_hash") != config.hash:
            raise UserError(
                f"{path}: written for another config or version; use a new run directory or delete the checkpoints"
            )
        return path, state
    if faults:
        raise UserError(
            f"{run_dir / 'checkpoints'}: no readable checkpoint ({'; '.join(faults)}); delete them to start this run again"
        )
    return None


def load_config(run_dir: Path) -> RunConfig:
    """The config in `run.json`.

    Raises:
        UserError: no such run, or a config of another version.
    """
    path = run_dir / "run.json"
    record = read_json(path)
    if record.get("schema") != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema {record.get('schema')!r}, this version reads {SCHEMA_VERSION}; use the version in env.json"
        )
    return parse(RunConfig, record.get("config"), f"{path}: config")


def corpus_record(corpus: "Corpus | Mixture") -> dict[str, Any]:
    """What `env.json` says of the text: fingerprints of content and tokenizer, and of the text of each source of a mixture."""
    texts = getattr(corpus, "texts", None)
    record = {"fingerprint": corpus.fingerprint, "tokenizer": corpus.tokenizer.fingerprint}
    return record if texts is None else {**record, "sources": dict(texts)}


def check_corpus(run_dir: Path, corpus: "Corpus | Mixture") -> None:
    """Refuse to go on with, or to evaluate, a run on other text or another tokenizer than it was trained on.

    Raises:
        UserError: the fingerprints in `env.json` are not those of `corpus`.
    """
    path = run_dir / "env.json"
    recorded = read_json(path).get("corpus") if path.exists() else None
    found = corpus_record(corpus)
    differing = [key for key, value in found.items() if recorded and recorded.get(key) != value]
    if not recorded or not differing:
        return
    sources, before = found.get("sources", {}), recorded.get("sources") or {}
    changed = [name for name, text in sources.items() if before.get(name) != text]
    place = "data.corpus"
    # With a given tokenizer, another one changes every fingerprint; a trained one changes with the text of any source.
    if "tokenizer" in differing and len(changed) in (0, len(sources)):
        what = "tokenizer"
    else:
        what, place = "text", ", ".join(f"data.mixture.{name}" for name in changed) or place
    raise UserError(
        f"{path}: the {what} of {place} is not the one this run was trained with (it changed since, or this is "
        "another Python version); restore it, or train anew in another directory"
    )


class Trained(NamedTuple):
    """The model of a run in evaluation mode, its config, and the name of the file that the weights came from."""

    model: "Model"
    config: RunConfig
    checkpoint: str


def load_trained(run_dir: Path) -> Trained:
    """The model of a run with the weights of its newest readable checkpoint; of a finished run, of its last one.

    Raises:
        UserError: the run has no config or no checkpoint, or it has finished and its last checkpoint cannot be read: the one
            before has other weights and another threshold than the result was measured with.
    """
    from dlcm.model import Model

    config = load_config(run_dir)
    found = _newest_readable(run_dir, config, mapped=False)
    if found is None:
        raise UserError(f"{run_dir}: no checkpoint yet; train the run first")
    (path, state), result = found, run_dir / "result.json"
    ended = read_json(result) if result.exists() else {}
    if ended.get("status") == "finished" and ended.get("step") != state["step"]:
        raise UserError(
            f"{checkpoint_path(run_dir, int(ended.get('step') or 0))}: missing or damaged, and the result was measured with it; "
            f"delete {result} and train the run again: it goes on from {path.name}"
        )
    model = Model(config.model)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise UserError(
            f"{run_dir}: its weights do not fit this version of the model ({error}); use the commit in env.json"
        ) from None
    return Trained(model.eval(), config, path.name)
