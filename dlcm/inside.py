"""A text as a trained model reads it: where its concepts begin, how likely that was, and what each token costs in nats.

Beside the boundaries of the model stand those of a control: every R tokens, at the R that the model realises on the same text,
so that both have as many concepts. The loss under the control is that of the same weights, with its boundaries injected. They
were trained with other boundaries: the difference says what *these* weights lose, not what a model of fixed stride would.

A text longer than the model was trained to look back on is read in windows that overlap by half: every token is scored once,
with at least half a window before it. What is reported of a token, its boundary too, is from the window that scored it.

Shape legend: T tokens of the text, the end of text that opens it included; w tokens of a window.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dlcm.config import BoundaryConfig
from dlcm.model import Model
from dlcm.opened import OpenRun
from dlcm.spans import Spans, token_spans

Array = np.ndarray

# Tokens of one forward pass.
_BATCH_TOKENS = 8_192


@dataclass(frozen=True)
class Inside:
    """A text under one run. Element 0 of each array is the end of text that opens it, which is read and not predicted.

    Attributes:
        run_id: of the run.
        checkpoint: file that the weights came from.
        boundary: the detector and its target; None for a dense model, which has no concepts.
        seq_len: tokens that the model was trained to look back on.
        spans: the text and its tokens.
        nats_T: -ln p of each token given all before it; NaN for element 0.
        begins_T: bool, whether a concept begins; None for a dense model.
        prob_T: p_t in [0, 1]; None for a dense model.
        threshold: p at which a concept begins; None where boundaries are not decided by one.
        control_T: bool, whether a concept of the control begins; None for a dense model, and for one of fixed stride, which is
            its own control.
        control_nats_T: `nats_T` under the boundaries of the control.
        vocab_size: of the model; a uniform guess costs its logarithm.
    """

    run_id: str
    checkpoint: str
    boundary: BoundaryConfig | None
    seq_len: int
    spans: Spans
    nats_T: Array
    begins_T: Array | None
    prob_T: Array | None
    threshold: float | None
    control_T: Array | None
    control_nats_T: Array | None
    vocab_size: int

    @property
    def n_tokens(self) -> int:
        """Tokens that are read, the end of text that opens the text included."""
        return len(self.nats_T)

    @property
    def n_concepts(self) -> int | None:
        """Concepts; None for a dense model."""
        return None if self.begins_T is None else int(self.begins_T.sum())

    @property
    def tokens_per_concept(self) -> float | None:
        """R on this text; None for a dense model."""
        return None if self.n_concepts is None else self.n_tokens / self.n_concepts

    @property
    def loss_nats(self) -> float | None:
        """Nats per predicted token; None for an empty text."""
        return _mean(self.nats_T[1:])

    @property
    def control_loss_nats(self) -> float | None:
        """The same under the boundaries of the control; None without one."""
        return None if self.control_nats_T is None else _mean(self.control_nats_T[1:])

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per UTF-8 byte of the text; None for an empty text."""
        n_bytes = len(self.spans.text.encode())
        return float(self.nats_T[1:].sum()) / math.log(2) / n_bytes if n_bytes else None

    @property
    def shared(self) -> dict[str, int] | None:
        """Boundaries behind the first: of the model and the control at once (`both`), and of one of them alone."""
        if self.begins_T is None or self.control_T is None:
            return None
        model_T, control_T = self.begins_T[1:], self.control_T[1:]
        found = {"both": model_T & control_T, "model": model_T & ~control_T, "control": control_T & ~model_T}
        return {name: int(where.sum()) for name, where in found.items()}

    @property
    def concept_T(self) -> Array | None:
        """int64, number of the concept of each token, from 0; None for a dense model."""
        return None if self.begins_T is None else self.begins_T.cumsum() - 1


def look_inside(run: OpenRun, text: str) -> Inside:
    """Read a text with a run.

    Raises:
        UserError: the text is not valid Unicode.
    """
    spans = token_spans(run.tokenizer, text)
    ids_T = np.append(run.tokenizer.eot_id, spans.ids_T)
    model, seq_len = run.model, run.config.data.seq_len
    own = _read(model, ids_T, seq_len, run.autocast)
    boundary, control_T, control_nats_T, begins_T, prob_T = run.config.model.boundary, None, None, None, None
    if boundary is not None:
        begins_T, prob_T = own.begins_T, own.prob_T
        if boundary.detector != "fixed":
            control_T = fixed_stride(np.arange(len(ids_T)), len(ids_T) / max(int(begins_T.sum()), 1))
            control_nats_T = _read(model, ids_T, seq_len, run.autocast, control_T).nats_T
    return Inside(
        run_id=run.config.run_id,
        checkpoint=run.checkpoint,
        boundary=boundary,
        seq_len=seq_len,
        spans=spans,
        nats_T=own.nats_T,
        begins_T=begins_T,
        prob_T=prob_T,
        threshold=_threshold(model),
        control_T=control_T,
        control_nats_T=control_nats_T,
        vocab_size=run.config.model.vocab_size,
    )


def fixed_stride(position_T: Array, ratio: float) -> Array:
    """Whether a concept begins where one begins every `ratio` tokens, for any real ratio >= 1; always at position 0.

    floor(t / R) grows by one each R tokens on average: the rule of the detector `fixed`.

    Args:
        position_T: position of each token in its sequence, from 0.
        ratio: R.
    """
    return (position_T == 0) | (np.floor(position_T / ratio) > np.floor((position_T - 1) / ratio))


def reading_windows(n_tokens: int, seq_len: int) -> Iterator[tuple[int, int, int]]:
    """The windows that a text is read in: (start, end, first token that is scored here).

    One where the text fits; else each starts half a window after the one before, and scores what that did not.
    """
    width = max(seq_len, 2)  # a token is scored where the one before it is read
    step, scored = width // 2, 0
    for start in range(0, max(n_tokens, 1), step):
        end = min(start + width, n_tokens)
        yield start, end, scored
        scored = end
        if end == n_tokens:
            return


@dataclass(frozen=True)
class _Reading:
    nats_T: Array
    begins_T: Array
    prob_T: Array


@torch.no_grad()
def _read(
    model: Model, ids_T: Array, seq_len: int, autocast: torch.autocast, boundaries_T: Array | None = None
) -> _Reading:
    """Read tokens in windows, several to one forward pass; with the model's own boundaries or with injected ones."""
    device = next(model.parameters()).device
    n_tokens = len(ids_T)
    found = _Reading(np.full(n_tokens, np.nan), np.ones(n_tokens, bool), np.ones(n_tokens))
    for batch in _batches(list(reading_windows(n_tokens, seq_len))):
        places = np.concatenate([np.arange(start, end) for start, end, _ in batch])
        lengths = [end - start for start, end, _ in batch]
        firsts = np.cumsum([0, *lengths])
        injected = None
        if boundaries_T is not None:
            injected = boundaries_T[places]
            injected[firsts[:-1]] = True  # no window begins inside a concept
        # The last token of a window predicts nothing here; any target does for it.
        targets = np.append(ids_T, 0)[places + 1]
        with autocast:
            out = model(
                _tensor(ids_T[places], device),
                cu_seqlens=_tensor(firsts, device),
                boundaries=None if injected is None else _tensor(injected, device),
                targets=_tensor(targets, device),
            )
        assert out.nats is not None
        nats, begins, prob = (x.cpu().numpy() for x in (out.nats.double(), out.boundaries, out.boundary_prob.double()))
        for (start, end, scored), first in zip(batch, firsts.tolist()):
            here = slice(first + scored - start, first + end - start)
            found.begins_T[scored:end], found.prob_T[scored:end] = begins[here], prob[here]
            known = max(scored, 1)  # the token before it is in this window too
            found.nats_T[known:end] = nats[first + known - start - 1 : first + end - start - 1]
    return found


def _batches(windows: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    per_batch = max(_BATCH_TOKENS // (windows[0][1] - windows[0][0] or 1), 1)
    for i in range(0, len(windows), per_batch):
        yield windows[i : i + per_batch]


def _tensor(array: Array, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _threshold(model: Model) -> float | None:
    """The probability from which on a concept begins: s + o >= 0 is p >= sigmoid(-o)."""
    if model.config.boundary is None or model.config.boundary.detector not in ("learned", "cosine"):
        return None
    return float(torch.sigmoid(-model.boundary.offset_threshold))


def _mean(values: Array) -> float | None:
    return float(values.mean()) if values.size else None
