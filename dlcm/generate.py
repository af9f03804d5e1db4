"""Continue texts with a trained model: incremental decoding, sampling, stop strings, text as it comes.

B rows of a batch, T tokens of the longest prompt, V vocabulary.
"""

import codecs
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dlcm.boundary import uniform_draws
from dlcm.errors import UserError
from dlcm.model import Model
from dlcm.opened import open_run
from dlcm.tokens import Tokenizer

# Prompts are read this many tokens at a time: the masks of a chunk grow with its length times that of what came before.
_CHUNK = 512

OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when to stop.

    Attributes:
        max_tokens: new tokens of each text, at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: draw from the smallest set of likeliest tokens whose probability is at least this (Holtzman et al. 2020).
        seed: of the draws; a draw depends on (seed, index of the text, number of the token) alone.
        stop: texts that end a continuation; they are not part of it.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value, fits, range_ in (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or more"),
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or above"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, up to 1"),
            ("stop", self.stop, all(self.stop), "texts that are not empty"),
        ):
            if not fits:
                raise UserError(f"{name}: {value!r}; expected {range_}")


@dataclass(frozen=True)
class Completion:
    """One continuation.

    Attributes:
        text: without the prompt and without the stop string.
        n_tokens: tokens that were drawn, the last included even if it only completed a stop string or ended the text.
        reason: what ended it: a stop string, the model's end of text, or `max_tokens`.
        tokens_per_concept: realised R over prompt and continuation; 1 for a dense model.
    """

    text: str
    n_tokens: int
    reason: Literal["stop", "end", "length"]
    tokens_per_concept: float


@torch.no_grad()
def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    sampling: Sampling,
    *,
    on_text: OnText | None = None,
    autocast: torch.autocast | None = None,
) -> list[Completion]:
    """Continue every prompt, all in one batch; a text does not depend on the others beside it.

    Args:
        model: in evaluation mode.
        tokenizer: the one it was trained with.
        prompts: texts or token ids; each is put behind an end of text, as a training document is.
        sampling: how.
        on_text: called with (index, new text) as text becomes final: whole characters, nothing of a stop string.
        autocast: context of the forward passes.
    """
    device = next(model.parameters()).device
    encoded = [tokenizer.encode(p).tolist() if isinstance(p, str) else list(p) for p in prompts]
    texts = [_Text(i, tokenizer, sampling, on_text) for i in range(len(prompts))]
    open_rows = list(texts)
    with autocast or torch.autocast(device.type, enabled=False):
        decoder = _Decoder(model, [[tokenizer.eot_id, *ids] for ids in encoded], device)
        while open_rows:
            chosen_B = _choose(decoder.logits_BV, sampling, open_rows)
            going = []
            for row, (text, token) in enumerate(zip(open_rows, chosen_B.tolist())):
                if text.add(token):
                    text.tokens_per_concept = decoder.tokens_per_concept(row)
                else:
                    going.append(row)
            open_rows = [open_rows[row] for row in going]
            if open_rows:
                decoder.step(chosen_B, going)
    return [text.completion() for text in texts]


class _Decoder:
    """The model, its cache, and the logits of the next token of every row."""

    def __init__(self, model: Model, prompts: list[list[int]], device: torch.device) -> None:
        self.model, self.cache = model, model.new_cache(len(prompts))
        longest = max(map(len, prompts), default=0)
        lengths_B = torch.tensor([len(ids) for ids in prompts], device=device)
        tokens_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in prompts], device=device)
        for start in range(0, longest, _CHUNK):
            here_B = (lengths_B - start).clamp(0, _CHUNK)
            logits_BtV = model(tokens_BT[:, start : start + _CHUNK], cache=self.cache, lengths=here_B).logits
            last_BV = logits_BtV[torch.arange(len(prompts), device=device), (here_B - 1).clamp(min=0)]
            self.logits_BV = torch.where((here_B > 0)[:, None], last_BV, self.logits_BV) if start else last_BV

    def step(self, tokens_B: Tensor, rows: list[int]) -> None:
        """Give the rows their next tokens; the others are dropped."""
        if len(rows) < tokens_B.numel():
            rows_B = torch.tensor(rows, device=tokens_B.device)
            self.cache.select(rows_B)
            tokens_B = tokens_B[rows_B]
        self.logits_BV = self.model(tokens_B[:, None], cache=self.cache).logits[:, 0]

    def tokens_per_concept(self, row: int) -> float:
        """Realised R of a row so far."""
        n_segments = self.cache.n_segments_B[row]
        return 1.0 if self.model.config.is_dense else float(self.cache.n_tokens_B[row] / n_segments)


class _Text:
    """One continuation as it grows: bytes become characters, characters wait while a stop string may have begun."""

    def __init__(self, index: int, tokenizer: Tokenizer, sampling: Sampling, on_text: OnText | None) -> None:
        self.index, self._sampling, self._on_text = index, sampling, on_text
        self._bytes, self._eot_id = tokenizer.token_bytes(), tokenizer.eot_id
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text, self._sent = "", 0
        self._reason: Literal["stop", "end", "length"] | None = None
        self.n_tokens, self.tokens_per_concept = 0, 1.0

    def add(self, token: int) -> bool:
        """Add a token. Returns whether the continuation is complete."""
        self.n_tokens += 1
        if token == self._eot_id:
            self._reason = "end"
        else:
            # An embedding may have more rows than the tokenizer has tokens.
            new = self._bytes[token] if token < len(self._bytes) else b""
            self._text += self._decoder.decode(new)
            if self.n_tokens == self._sampling.max_tokens:
                self._reason = "length"
        if self._reason:
            self._text += self._decoder.decode(b"", final=True)
        found = [at for at in map(self._text.find, self._sampling.stop) if at >= 0]
        if found:
            self._text, self._reason = self._text[: min(found)], "stop"
        self._emit()
        return self._reason is not None

    def _emit(self) -> None:
        """Send what no stop string can take back any more."""
        end = len(self._text)
        if self._reason is None:
            end -= max((_overlap(self._text, stop) for stop in self._sampling.stop), default=0)
        if end > self._sent:
            if self._on_text is not None:
                self._on_text(self.index, self._text[self._sent : end])
            self._sent = end

    def completion(self) -> Completion:
        """What came out."""
        assert self._reason is not None
        return Completion(self._text, self.n_tokens, self._reason, self.tokens_per_concept)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _choose(logits_BV: Tensor, sampling: Sampling, texts: list[_Text]) -> Tensor:
    """The next token of every row: the likeliest, or one drawn by inverting the distribution at a keyed uniform number."""
    logits_BV = logits_BV.double()
    if sampling.temperature == 0:
        return logits_BV.argmax(1)
    # The sum runs over the tokens from likely to unlikely, so that top-p is a bound on where the number may fall.
    prob_BV, token_BV = (logits_BV / sampling.temperature).softmax(1).sort(dim=1, descending=True, stable=True)
    cumulative_BV = prob_BV.cumsum(1)
    kept_B = (cumulative_BV < sampling.top_p).sum(1).clamp(max=prob_BV.shape[1] - 1)
    mass_B1 = cumulative_BV.gather(1, kept_B[:, None])
    draws = [uniform_draws(sampling.seed, text.index, torch.tensor([text.n_tokens])) for text in texts]
    target_B1 = torch.stack(draws).to(mass_B1.device) * mass_B1
    drawn_B1 = torch.minimum(torch.searchsorted(cumulative_BV, target_B1, right=True), kept_B[:, None])
    return token_BV.gather(1, drawn_B1)[:, 0]


def generate_from_run(
    run_dir: Path | str, prompts: Sequence[str], sampling: Sampling, *, on_text: OnText | None = None
) -> list[Completion]:
    """`generate` with the newest checkpoint of a run, on the GPU where there is one.

    Raises:
        UserError: no trained run, or a corpus whose tokenizer is not the one the run was trained with.
    """
    run = open_run(run_dir)
    return generate(run.model, run.tokenizer, prompts, sampling, on_text=on_text, autocast=run.autocast)
