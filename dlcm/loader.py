"""Batches ahead of time: while a step computes, a thread draws the batch of the next one.

A batch is a function of the step, so what was drawn ahead is what would have been drawn in place.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from dlcm.config import RunConfig
from dlcm.mixture import Mixture
from dlcm.shards import Batch, Corpus


class Loader:
    """Training batches by step; a context, whose thread ends with it.

    Args:
        corpus: drawn from.
        config: of the run.
    """

    def __init__(self, corpus: Corpus | Mixture, config: RunConfig) -> None:
        self._corpus, self._config = corpus, config
        self._thread = ThreadPoolExecutor(1, "loader")
        self._ahead: tuple[int, Future[Batch]] | None = None

    def batch(self, step: int) -> Batch:
        """The batch of a step; that of the step behind it, if the run has one, is begun.

        Raises:
            UserError: the corpus is shorter than one window.
        """
        if self._ahead is not None and self._ahead[0] == step:
            batch = self._ahead[1].result()
        else:
            batch = self._draw(step)
        more = step + 1 < self._config.n_steps
        self._ahead = (step + 1, self._thread.submit(self._draw, step + 1)) if more else None
        return batch

    def _draw(self, step: int) -> Batch:
        train, seq_len = self._config.train, self._config.data.seq_len
        return self._corpus.train.batch(step, seed=self._config.seed, batch_tokens=train.batch_tokens, seq_len=seq_len)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
