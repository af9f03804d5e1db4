"""Where concepts begin: the detectors, the decision, the ratio loss, and the controller that holds the rate.

Every detector gives a score s_t in logits, which only depends on tokens up to t. The decision is

    sampled (training):   b_t = [u_t < sigmoid((s_t + o_sample) / temperature)],   u_t uniform, keyed by (seed, step, token)
    threshold (otherwise): b_t = [s_t + o_threshold >= 0]

With both offsets zero these are the paper's rules: Bernoulli(p_sharp) in training, p_t >= 1/2 at inference. Training and
inference disagree about the rate under those rules, because most p lie close to 1/2, so the two offsets are held apart,
each by its own statistic (`BoundaryDetector.control`).

Shape legend: T packed tokens, W token width, S scan width, V vocabulary.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dlcm.concepts import Sequences
from dlcm.config import BoundaryConfig
from dlcm.layers import Linear

# Cosines are kept this far from +-1, so that a score is at most about 14 logits in fp32.
_COSINE_MARGIN = 1e-6
# Share of the newest batch quantile in the running threshold: a lag of some seven steps.
_QUANTILE_RATE = 0.15

# Above any vocabulary, so that (position, token) pairs have keys of their own.
_POSITION_STRIDE = 1 << 24
# Share of the newest batch in the running slope of the rate.
_SLOPE_RATE = 0.05
# Logits that the sampling offset moves at most in one step.
_LARGEST_STEP = 0.5
_MASK_64 = (1 << 64) - 1


@dataclass(frozen=True)
class Boundaries:
    """Decisions and statistics of one forward pass.

    Attributes:
        decision_T: b_t.
        prob_T: p_t = sigmoid(s_t); one at the first token of every document.
        score_T: s_t in logits, infinite at the first token of every document; None without a score (fixed, delimiter).
        sharp_prob_T: probability that the training decision draws from, or None.
    """

    decision_T: Tensor
    prob_T: Tensor
    score_T: Tensor | None = None
    sharp_prob_T: Tensor | None = None


def uniform_draws(seed: int, step: int, position_T: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), a pure function of (seed, step, position): no generator state to lose or to reorder.

    The mixing function is the finaliser of SplitMix64 (Steele, Lea & Flood 2014) on a key that separates its arguments.
    """
    key = _mix_int(_mix_int(seed) ^ (step & _MASK_64))
    mixed_T = _mix(position_T.to(torch.int64) * _signed(0x9E3779B97F4A7C15) + _signed(key))
    # The upper 53 bits, centred in their cell: never 0 and never 1.
    return (_shift_right(mixed_T, 11).double() + 0.5) * 2.0**-53


def _signed(x: int) -> int:
    x &= _MASK_64
    return x - (1 << 64) if x >> 63 else x


def _mix_int(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)


def _shift_right(x: Tensor, n: int) -> Tensor:
    """Logical shift of int64, whose own shift repeats the sign bit."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


@dataclass(frozen=True)
class RateStatistics:
    """The sums that F and G are made of, over the global batch: all tokens of all micro-batches of all ranks.

    Attributes:
        n_boundaries: float64, sum of b.
        prob: G, float64; its value is global, its gradient that of the part it was made from, times the number of ranks.
        n_tokens: float64, number of tokens.
        n_ranks: processes that the sums were taken over.
    """

    n_boundaries: Tensor
    prob: Tensor
    n_tokens: Tensor
    n_ranks: int = 1

    @property
    def rate(self) -> Tensor:
        """F, the share of boundaries; no gradient."""
        return self.n_boundaries / self.n_tokens

    def through(self, prob_sum: Tensor) -> "RateStatistics":
        """The same statistics, with the gradient of G with respect to the part whose sum of p is `prob_sum`.

        The gradients of the parts of one rank add up. Those of the ranks are averaged, as data-parallel training does, so
        each is multiplied by their number; the average then is the exact gradient, however unequal the ranks' tokens are.
        """
        part = prob_sum.double() * self.n_ranks / self.n_tokens
        return replace(self, prob=self.prob.detach() + (part - part.detach()))


def global_statistics(
    n_boundaries: Tensor | float,
    prob_sum: Tensor,
    n_tokens: int,
    group: dist.ProcessGroup | None = None,
) -> RateStatistics:
    """Sums over the tokens of this process -> statistics of the global batch. Every rank of the group must call it.

    Args:
        n_boundaries: boundaries here.
        prob_sum: sum of p here; its gradient is kept.
        n_tokens: tokens here.
        group: processes that share a batch; by default torch's default group where one is initialised, else this process
            alone.
    """
    parts = (n_boundaries, prob_sum.detach(), n_tokens)
    sums_3 = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=prob_sum.device) for x in parts])
    n_ranks = _n_ranks(group)
    if n_ranks > 1:
        dist.all_reduce(sums_3, group=group)
    boundaries, prob, tokens = sums_3.unbind()
    return RateStatistics(boundaries, prob / tokens, tokens, n_ranks).through(prob_sum)


def gather_scores(scores_T: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Scores of all ranks one after the other, the same on every rank; `group` as in `global_statistics`."""
    n_ranks = _n_ranks(group)
    if n_ranks == 1:
        return scores_T
    counts = [torch.zeros(1, dtype=torch.int64, device=scores_T.device) for _ in range(n_ranks)]
    dist.all_gather(counts, torch.tensor([scores_T.numel()], device=scores_T.device), group=group)
    longest = max(int(count) for count in counts)
    padded = [scores_T.new_empty(longest) for _ in range(n_ranks)]
    dist.all_gather(padded, F.pad(scores_T, (0, longest - scores_T.numel())), group=group)
    return torch.cat([part[: int(count)] for part, count in zip(padded, counts)])


def _n_ranks(group: dist.ProcessGroup | None) -> int:
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


def ratio_loss(statistics: RateStatistics, ratio: float) -> Tensor:
    """The ratio loss (eq 10): R^2 / (R - 1) (F - 1/R)(G - 1/R), of the global batch.

    This equals R / (R - 1) [(R - 1) F G + (1 - F)(1 - G)] - 1. It is a saddle, not a distance: -1 at (F, G) = (0, 1).

    Args:
        statistics: F and G; only G carries a gradient.
        ratio: R > 1.
    """
    return ratio**2 / (ratio - 1.0) * (statistics.rate - 1.0 / ratio) * (statistics.prob - 1.0 / ratio)


class BoundaryDetector(nn.Module):
    """Scores, decides, and keeps the boundary rate at 1/R. One class; the detectors differ in their score alone."""

    offset_sample: Tensor
    offset_threshold: Tensor
    rate_slope: Tensor
    delimiters_V4: Tensor

    def __init__(self, config: BoundaryConfig, d_token: int, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.ratio = config.compression_ratio
        if config.detector == "learned":
            self.w_q = Linear(d_token, config.d_scan, side="token")
            self.w_k = Linear(d_token, config.d_scan, side="token")
        self.register_buffer("offset_sample", torch.zeros(()))
        self.register_buffer("offset_threshold", torch.zeros(()))
        self.register_buffer("rate_slope", torch.ones(()))
        if config.detector.startswith("delimiter"):
            # Rows: token ends one, starts one, holds one inside, always followed by a boundary. Filled from the tokenizer.
            self.register_buffer("delimiters_V4", torch.zeros(vocab_size, 4, dtype=torch.bool))

    @property
    def temperature(self) -> float:
        """Of the sharpening; a constant score is not sharpened."""
        return 1.0 if self.config.detector == "random" else self.config.temperature

    @property
    def samples(self) -> bool:
        """Whether decisions in training are drawn rather than thresholded."""
        return self.config.detector == "random" or (
            self.config.detector == "learned" and self.config.decision == "sample"
        )

    @property
    def is_controlled(self) -> bool:
        """Whether the controller moves the offsets: only scores that are compared with something can be moved."""
        return self.config.control == "bias" and self.config.detector in ("learned", "cosine", "random")

    @property
    def controlled_offset(self) -> float | None:
        """What the controller adds to the scores, in logits, where training decides; None without a controller."""
        return float(self._deciding_offset) if self.is_controlled else None

    @property
    def _deciding_offset(self) -> Tensor:
        return self.offset_sample if self.samples else self.offset_threshold

    def forward(self, h_TW: Tensor, tokens_T: Tensor, packing: Sequences, draws_T: Tensor | None = None) -> Boundaries:
        """Decide the boundaries of packed tokens.

        Args:
            h_TW: encoder states.
            tokens_T: token ids; delimiters and the random control at inference read them.
            packing: documents, packed whole or the next part of each.
            draws_T: uniform numbers for the sampled decision of training; None decides by threshold.
        """
        detector, first_T = self.config.detector, packing.is_first_T
        if detector == "fixed":
            return self._certain(self._every_r(packing.position_T), first_T)
        if detector.startswith("delimiter"):
            return self._certain(self._after_delimiters(tokens_T, packing), first_T)
        score_T = self._score(h_TW, tokens_T, packing).masked_fill(first_T, math.inf)
        prob_T = score_T.sigmoid()
        sharp_T = ((score_T + self.offset_sample) / self.temperature).sigmoid()
        if detector == "random" and draws_T is None:
            draws_T = self._draws_from_text(tokens_T, packing)
        if self.samples and draws_T is not None:
            decision_T = draws_T.to(sharp_T.dtype) < sharp_T.detach()
        else:
            decision_T = score_T.detach() + self.offset_threshold >= 0
        return Boundaries(decision_T, prob_T, score_T, sharp_T)

    def _certain(self, decision_T: Tensor, first_T: Tensor) -> Boundaries:
        decision_T = decision_T | first_T
        return Boundaries(decision_T, decision_T.float())

    def _every_r(self, position_T: Tensor) -> Tensor:
        # floor(t / R) grows by one each R tokens on average, for any real R.
        index_T = position_T.double()
        return (index_T / self.ratio).floor() > ((index_T - 1) / self.ratio).floor()

    def _after_delimiters(self, tokens_T: Tensor, packing: Sequences) -> Tensor:
        ends_T, starts_T, inside_T, always_T = self.delimiters_V4[tokens_T].unbind(1)
        before_T2 = packing.previous(torch.stack([ends_T, always_T], dim=1).to(torch.uint8)).bool()
        return (before_T2[:, 0] & starts_T) | inside_T | before_T2[:, 1]

    def _draws_from_text(self, tokens_T: Tensor, packing: Sequences) -> Tensor:
        # At inference the random control must be causal and repeatable: a function of the position and of the token.
        return uniform_draws(0, 0, packing.position_T * _POSITION_STRIDE + tokens_T)

    def _score(self, h_TW: Tensor, tokens_T: Tensor, packing: Sequences) -> Tensor:
        """s_t = logit(p_t) = log(1 - cos) - log(1 + cos), with p_t = (1 - cos(q_{t-1}, k_t)) / 2 (eqs 5, 6)."""
        if self.config.detector == "random":
            return h_TW.new_full(tokens_T.shape, -math.log(self.ratio - 1.0), dtype=_wide(h_TW.dtype))
        with torch.autocast(h_TW.device.type, enabled=False):
            wide_TW = h_TW.to(_wide(h_TW.dtype))
            if self.config.detector == "learned":
                q_TS, k_TS = self.w_q(wide_TW), self.w_k(wide_TW)
            else:
                q_TS = k_TS = wide_TW
            cosine_T = F.cosine_similarity(packing.previous(q_TS), k_TS, dim=1, eps=1e-8)
            cosine_T = cosine_T.clamp(-1 + _COSINE_MARGIN, 1 - _COSINE_MARGIN)
            return torch.log1p(-cosine_T) - torch.log1p(cosine_T)

    @torch.no_grad()
    def control(self, rate: Tensor | float, scores_T: Tensor, *, first_step: bool = False) -> None:
        """Move the offsets after a step towards a boundary rate of 1/R.

        The offset that decides in training is under integral control, o -= gain (F - 1/R) / (dF/do), with the slope known
        from the scores: one loop for every detector, ratio and spread of scores. It leaves no standing error, and with a
        gain of one the errors of successive batches cancel: the mean over n steps is off by what one batch is off, over n.
        Where training samples, the threshold has no such feedback; it follows the running 1/R quantile of the scores, and
        `calibrate` sets it without lag or noise at the end.

        Args:
            rate: F, the share of boundaries among the tokens of the global batch at this step.
            scores_T: scores of the global batch (`Boundaries.score_T`).
            first_step: start both offsets at the quantile instead of moving them there.
        """
        quantile = self._threshold(scores_T)
        if not self.is_controlled or quantile is None:
            return
        slope = self._running_slope(scores_T, first_step)
        if first_step and self.config.detector != "random":
            self.offset_threshold.copy_(-quantile)
            self.offset_sample.copy_(-quantile)
            return
        step = self.config.control_gain * (rate - 1.0 / self.ratio) / slope
        deciding = self._deciding_offset
        deciding -= step.clamp(-_LARGEST_STEP, _LARGEST_STEP)
        if self.samples:
            self.offset_threshold.lerp_(-quantile, _QUANTILE_RATE)

    @torch.no_grad()
    def calibrate(self, scores_T: Tensor) -> None:
        """Set what decides at inference so that a share 1/R of these scores, of the text R shall hold on, is a boundary."""
        if self.config.detector == "random":
            n_first = int(torch.isinf(scores_T).sum())
            rest = (scores_T.numel() / self.ratio - n_first) / max(scores_T.numel() - n_first, 1)
            if rest > 0:
                self.offset_sample.fill_(math.log(rest / (1.0 - rest)) + math.log(self.ratio - 1.0))
            return
        quantile = self._threshold(scores_T)
        if quantile is not None:
            self.offset_threshold.copy_(-quantile)

    def _running_slope(self, scores_T: Tensor, first_step: bool) -> Tensor:
        """dF/do of the rate in training, averaged over steps.

        Averaged, because the slope of one batch rises with its rate: dividing by it would weigh low rates more than high
        ones, and hold the harmonic mean of the rates instead of the mean.
        """
        if self.samples:
            sharp_T = ((scores_T + self.offset_sample) / self.temperature).sigmoid()
            slope = (sharp_T * (1.0 - sharp_T)).mean() / self.temperature
        else:
            above, below = self._threshold(scores_T, 0.75), self._threshold(scores_T, 1.25)
            if above is None or below is None:
                return self.rate_slope
            slope = 0.5 / self.ratio / (above - below).clamp(min=1e-6)
        self.rate_slope.lerp_(slope.to(self.rate_slope.dtype), 1.0 if first_step else _SLOPE_RATE)
        # Where no score is near the threshold the slope says nothing: a bounded step in the right direction follows.
        return self.rate_slope.clamp(min=1e-3)

    def _threshold(self, scores_T: Tensor, factor: float = 1.0) -> Tensor | None:
        """A threshold that a share `factor` / R of the scores reaches; None where first tokens alone are as many.

        It lies midway between two scores, so that rounding elsewhere does not flip the token that it was read from.
        """
        n = round(factor * scores_T.numel() / self.ratio)
        if not 1 <= n < scores_T.numel():
            return None
        threshold = scores_T.topk(n + 1).values[-2:].mean().to(self.offset_threshold.dtype)
        return threshold if torch.isfinite(threshold) else None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def delimiter_table(token_bytes: list[bytes], vocab_size: int, granularity: str) -> Tensor:
    """Which tokens end, start or hold a word or a sentence.

    A word begins at a letter, digit or non-ASCII byte after any other byte (the rule of SpaceByte, read from the front); a
    sentence begins at the white space after `.`, `!` or `?`, and after a line feed. A token that holds such a beginning
    inside is a boundary itself, so every decision depends only on the token and the one before it.

    Args:
        token_bytes: the bytes of each token id; empty for special tokens.
        vocab_size: rows of the table, at least `len(token_bytes)`.
        granularity: `word` or `sentence`.

    Returns:
        bool (V, 4): ends one, starts one, holds a beginning inside, is always followed by a beginning.
    """
    table_V4 = torch.zeros(vocab_size, 4, dtype=torch.bool)
    for i, text in enumerate(token_bytes):
        if not text:
            continue
        if granularity == "word":
            word = [chr(b).isalnum() if b < 128 else True for b in text]
            inside = any(not a and b for a, b in zip(word, word[1:]))
            table_V4[i] = torch.tensor([not word[-1], word[0], inside, False])
        else:
            inside = any(a in b".!?" and chr(b).isspace() for a, b in zip(text, text[1:])) or b"\n" in text[:-1]
            table_V4[i] = torch.tensor([text[-1] in b".!?", chr(text[0]).isspace(), inside, text[-1:] == b"\n"])
    return table_V4
