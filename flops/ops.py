"""FLOPs and parameters of each operation: the one convention of this project.

- A multiply-add is 2 FLOPs. Figures are those of the forward pass; training is 3x forward (`TRAINING_FACTOR`), because the
  backward pass computes two products of the same size for each forward one. Recomputation under activation
  checkpointing is not counted.
- Attention scores are counted as work that has to be computed: the causal half of the square, `S = L²/2` query-key pairs
  (the diagonal's extra L/2 is left out, as is usual). The full square is counted beside it, since dense kernels and
  operator counters take it.
- Norms, softmax, rotary embedding, activation functions, residual sums, means over segments, gathers and the cosine of
  the boundary score are not counted: they are linear in width, below a percent of the rest.
- An embedding lookup costs nothing; the logits always cost, tied or not.

Symbols: L tokens, M concepts (M = L / R at the realised R), d token width, D concept width, h query heads of size a, g
key-value heads, f hidden width of the SwiGLU, V vocabulary. Each function is plain arithmetic on its arguments: integers
give exact counts, real numbers and numpy arrays give the continuous relaxation that the optimum search needs.
"""

from typing import TypeVar

Number = TypeVar("Number")  # int, float or numpy array; one kind per call

TRAINING_FACTOR = 3
SMOOTHER_WIDTH = 4  # taps of the causal convolution over concepts (dlcm.concepts)


def causal_pairs(length):
    """Query-key pairs of causal self-attention over `length` positions: S = L²/2."""
    return length * length / 2


def square_pairs(length):
    """Query-key pairs that a dense kernel computes: L²."""
    return length * length


def cross_pairs(n_tokens, n_concepts, replicated: bool = False):
    """Query-key pairs of token-to-concept attention under its mask.

    Token t of segment j sees j of the M concepts (the null concept and those of the j - 1 segments before it), so that the
    mean over tokens is M/2 and S = L·M/2. Concept replication repeats each concept over its segment and attends
    causally among tokens: S = L²/2.
    """
    return n_tokens * (n_tokens if replicated else n_concepts) / 2


def attention_projections(length, d, h, g, a):
    """FLOPs of Q, K, V and output: 2·L·d·(h·a) for each of Q and O, 2·L·d·(g·a) for each of K and V: 2·L·d·a(2h + 2g)."""
    return 2 * length * d * a * (2 * h + 2 * g)


def attention_scores(pairs, h, a):
    """FLOPs of the scores and of the weighted sum of values: 2·h·a for each pair, twice: 4·h·a·S."""
    return 4 * h * a * pairs


def swiglu(length, d, f):
    """FLOPs of gate, up and down: three products of 2·L·d·f: 6·L·d·f."""
    return 6 * length * d * f


def boundary(length, d, d_scan):
    """FLOPs of W_q and W_k of the learned boundary score (eq 5): two products of 2·L·d·d_scan."""
    return 4 * length * d * d_scan


def pooling(n_concepts, d, D):
    """FLOPs of W_up on the pooled states (eq 7): 2·M·d·D. The mean itself is not counted."""
    return 2 * n_concepts * d * D


def smoothing(n_concepts, D):
    """FLOPs of the causal depthwise convolution over concepts: 2 x 4 taps per channel: 8·M·D."""
    return 2 * SMOOTHER_WIDTH * n_concepts * D


def cross_projections(n_tokens, n_concepts, d, D, h, g, a):
    """FLOPs of the cross-attention's Q and O on tokens, 2·L·d·(h·a) each, and K and V on concepts, 2·M·D·(g·a) each."""
    return 4 * n_tokens * d * h * a + 4 * n_concepts * D * g * a


def logits(length, d, vocab_size):
    """FLOPs of the unembedding: 2·L·d·V."""
    return 2 * length * d * vocab_size


def layer(length, pairs, d, h, g, a, f):
    """FLOPs of one transformer layer: projections, scores over `pairs`, SwiGLU."""
    return attention_projections(length, d, h, g, a) + attention_scores(pairs, h, a) + swiglu(length, d, f)


def layer_parameters(d, h, g, a, f):
    """Parameters of one layer: two norms 2d, Q and O 2·d·h·a, K and V 2·d·g·a, QK-norm 2a, SwiGLU 3·d·f; no biases."""
    return 2 * d + d * a * (2 * h + 2 * g) + 2 * a + 3 * d * f


def cross_parameters(d, D, h, g, a):
    """Parameters of one cross-attention: query norm d, Q and O 2·d·h·a, K and V 2·D·g·a, QK-norm 2a."""
    return d + 2 * d * h * a + 2 * D * g * a + 2 * a


def boundary_parameters(d, d_scan):
    """Parameters of the learned boundary score: W_q and W_k, 2·d·d_scan."""
    return 2 * d * d_scan


def concept_side_parameters(d, D, smoothed: bool, with_null: bool):
    """Parameters between the two levels: W_up d·D, norm behind the backbone D, smoother 4·D and null concept D if any."""
    return d * D + D + (SMOOTHER_WIDTH * D if smoothed else 0 * D) + (D if with_null else 0 * D)


def embedding_parameters(vocab_size, d, tied: bool = False):
    """Parameters of embedding and unembedding: 2·V·d, or V·d where they share one matrix."""
    return vocab_size * d * (1 if tied else 2)
