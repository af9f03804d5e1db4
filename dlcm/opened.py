"""A trained run, opened to be used: its model, text and tokenizer, on the GPU where there is one."""

from dataclasses import dataclass
from pathlib import Path

import torch

from dlcm.build import Progress
from dlcm.checkpoint import check_corpus, load_config, load_trained
from dlcm.config import RunConfig
from dlcm.errors import UserError
from dlcm.mixture import Mixture
from dlcm.model import Model
from dlcm.shards import Corpus, open_corpus
from dlcm.tokens import Tokenizer


@dataclass(frozen=True)
class OpenRun:
    """A run with the weights of its newest checkpoint.

    Attributes:
        run_dir: its directory.
        config: its config.
        model: in evaluation mode.
        corpus: the text it was trained on.
        checkpoint: name of the file that the weights came from.
        autocast: context of forward passes, in the precision that it was trained in.
    """

    run_dir: Path
    config: RunConfig
    model: Model
    corpus: Corpus | Mixture
    checkpoint: str
    autocast: torch.autocast

    @property
    def tokenizer(self) -> Tokenizer:
        """The one that it was trained with."""
        return self.corpus.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


def open_run(run_dir: Path | str, progress: Progress | None = None) -> OpenRun:
    """Open a run.

    Args:
        run_dir: its directory.
        progress: told about a corpus that has to be tokenized first.

    Raises:
        UserError: no trained run, or text or a tokenizer that are not those that it was trained with.
    """
    run_dir = Path(run_dir)
    corpus = open_corpus(load_config(run_dir).data, progress)
    check_corpus(run_dir, corpus)
    return open_model(run_dir, corpus)


def open_model(run_dir: Path, corpus: Corpus | Mixture) -> OpenRun:
    """Open a run whose text is open already.

    Raises:
        UserError: no trained run, or a tokenizer that knows tokens which the model does not.
    """
    model, config, checkpoint = load_trained(run_dir)
    if corpus.tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{run_dir}: data.tokenizer {config.data.tokenizer!r} has {corpus.tokenizer.vocab_size} tokens here, the model "
            f"{config.model.vocab_size}: the corpus is not the one that the run was trained on"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=config.train.is_bf16(device))
    return OpenRun(run_dir, config, model.to(device), corpus, checkpoint, autocast)
