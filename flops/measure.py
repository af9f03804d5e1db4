"""Two independent counters against the closed form: torch's FlopCounterMode, and fvcore. The only importer of fvcore.

Both count matrix products as they are executed, here by the `reference` backend, whose attention is plain matrix products too
(fused kernels both count as zero on a CPU). The model is built on `meta`: shapes without numbers, so that billions of parameters
are checked without memory; only what decides shapes, the packing and the injected boundaries, is real.

**Nothing is zero in silence.** Every operation that runs is either counted or in the list of free ones (`FREE`, `FVCORE_FREE`),
with the reason beside it; any other makes the check fail with its name.

The closed form is brought to the counters' conventions by listed differences (`Difference`), after which all three must be equal,
exactly, for every component:

- attention is a full square for them, over everything that is packed;
- the null concept is one more row for the V projection of each cross-attention, which the closed form leaves out;
- the smoother is elementwise arithmetic, which they do not count;
- fvcore counts multiply-adds, half of our FLOPs, and is doubled; its einsum handle, which rounds to three digits, is replaced by
  the exact product of the index ranges;
- boundaries are injected, because a trace cannot hold decisions that depend on data; the detector runs beside the model on
  states of the same shape.

Training is forward and backward under torch's counter (fvcore traces no backward pass). The backward pass computes two products
for each forward one, without exception: the first layer's input is the embedding, which is trained, and the detector's states
need a gradient too. So training must be three times the forward pass under the same conventions, in total: a backward pass runs
outside of the modules, and is not told apart by component.
"""

import logging
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from dlcm.boundary import BoundaryDetector
from dlcm.concepts import Packing
from dlcm.config import ModelConfig
from dlcm.errors import UserError
from dlcm.model import Model
from flops import ops
from flops.checked import Check, Checked, CheckedParameters, Difference
from flops.components import checked_ratio
from flops.count import COMPONENTS, FlopCount, count, parameters
from flops.free import FREE, FVCORE_FREE

# What `dlcm flops check` builds where no config is given: grouped heads, unequal widths, every component present.
EXAMPLES = {
    "dlcm": ModelConfig(
        kind="dlcm",
        vocab_size=512,
        d_token=64,
        d_concept=96,
        d_head=16,
        n_encoder_layers=2,
        n_concept_layers=3,
        n_decoder_layers=2,
        n_heads_token=4,
        n_kv_heads_token=2,
        n_heads_concept=6,
        n_kv_heads_concept=3,
        d_ff_token=176,
        d_ff_concept=256,
    ),
    "dense": ModelConfig(
        kind="dense", vocab_size=512, d_token=64, d_head=16, n_encoder_layers=4, n_heads_token=4, d_ff_token=176
    ),
}

# Modules of dlcm.model.Model by path, and the component that their work belongs to. Together they do all the work.
_MODULES = {
    r"encoder\.\d+": "encoder",
    r"boundary": "boundary",
    r"concepts\.w_up": "pooling",
    r"concepts\.blocks\.\d+": "backbone",
    r"decoder\.\d+\.cross": "cross_attention",
    r"decoder\.\d+\.block\.(attention|ff)": "decoder",
    r"unembedding": "head",
}


def check(
    config: ModelConfig,
    seq_len: int = 64,
    *,
    tokens_per_concept: float | None = None,
    documents: Sequence[int] | None = None,
) -> Check:
    """Compare the closed form with both counters on the model of `config`, of any size.

    Args:
        config: DLCM or dense.
        seq_len: tokens of the one document, unless `documents` is given.
        tokens_per_concept: R of the injected boundaries, which come every R tokens of a document; the target by default.
        documents: lengths of documents that are packed; they replace `seq_len`.

    Raises:
        UserError: too few tokens; an operation that is neither counted nor listed as free; work in an unknown module.
    """
    lengths = [seq_len] if documents is None else [n for n in documents if n]
    probe = _Probe(config, lengths, checked_ratio(config, tokens_per_concept))
    concepts = probe.n_concepts
    if sum(concepts) < 2:
        raise UserError(
            f"a check needs two tokens and two concepts, got {sum(lengths)} and {sum(concepts)}: torch executes products of "
            "one row as elementwise operations, which no counter sees; give a longer sequence"
        )
    closed = count(config, documents=lengths, concepts=concepts)
    differences = _differences(config, closed, lengths, concepts)
    listed = {name: sum(d.flops for d in differences if d.component == name) for name in COMPONENTS}
    by_torch, by_fvcore = _with_torch(probe), _with_fvcore(probe)
    rows = tuple(
        Checked(name, closed.components[name], listed[name], by_torch[name], by_fvcore[name]) for name in COMPONENTS
    )
    factor = ops.TRAINING_FACTOR
    training = Checked("total", closed.training, factor * sum(listed.values()), _training_with_torch(probe), None)
    return Check(rows, training, CheckedParameters(parameters(config).total, probe.n_parameters), differences)


def count_with_torch(config: ModelConfig, seq_len: int) -> float:
    """Forward FLOPs of one document as torch's counter finds them on the model on meta: what a count costs without a closed form.

    Args:
        config: DLCM or dense.
        seq_len: tokens of the document.
    """
    return sum(_with_torch(_Probe(config, [seq_len], config.compression_target)).values())


def _differences(
    config: ModelConfig, closed: FlopCount, lengths: Sequence[int], concepts: Sequence[float]
) -> tuple[Difference, ...]:
    """What the counters count otherwise (see the head of this file), each with its amount; none that is zero."""
    c, square = config, closed.full_square
    assert square is not None  # only the twin itself has none
    found = []
    for name in ("encoder", "backbone", "cross_attention", "decoder"):
        added = square.components[name] - closed.components[name]
        found.append(Difference(name, added, "attention as full squares: they do not know that half of it is masked"))
    n, m = sum(lengths), sum(concepts)
    tokens = ops.square_pairs(n) - sum(ops.square_pairs(x) for x in lengths)
    between = ops.square_pairs(m) - sum(ops.square_pairs(x) for x in concepts)
    across = n * m - sum(x * y for x, y in zip(lengths, concepts))
    packed = "one mask over all documents that are packed: the reference backend computes what lies between them too"
    for name, pairs, heads, layers in (
        ("encoder", tokens, c.n_heads_token, c.n_encoder_layers),
        ("backbone", between, c.n_heads_concept, c.n_concept_layers),
        ("cross_attention", across, c.n_heads_token, c.n_cross_attentions),
        ("decoder", tokens, c.n_heads_token, c.n_decoder_layers),
    ):
        found.append(Difference(name, layers * ops.attention_scores(pairs, heads, c.d_head), packed))
    if c.pooling == "mean":
        null = c.n_cross_attentions * 2 * c.d_concept * c.n_kv_heads_token * c.d_head
        found.append(Difference("cross_attention", null, "V of the null concept: one row more than there are concepts"))
    smoother = -closed.components["smoothing"]
    found.append(Difference("smoothing", smoother, "the smoother is elementwise arithmetic, which they do not count"))
    return tuple(d for d in found if d.flops)


class _Probe(nn.Module):
    """The model on meta, and beside it its detector on real states, as one function without inputs that depend on data."""

    def __init__(self, config: ModelConfig, lengths: Sequence[int], ratio: float) -> None:
        super().__init__()
        with torch.device("meta"):
            self.model = Model(config.model_copy(update={"attention_backend": "reference"}))
        self.n_parameters = sum(weight.numel() for weight in self.model.parameters())
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        position_T = Packing(self.cu_seqlens).position_T.double()
        self.tokens = torch.zeros(len(position_T), dtype=torch.int64)
        self.boundaries = (position_T / ratio).floor() > ((position_T - 1) / ratio).floor()
        self.n_concepts = [int(part.sum()) for part in self.boundaries.split(list(lengths))]
        if config.is_dense:
            self.n_concepts = list(lengths)
        if config.boundary is not None:
            # Real, because autocast, which the detector steps out of, knows no meta device; it is small whatever the model.
            self.model.boundary = BoundaryDetector(config.boundary, config.d_token, config.vocab_size)

    def forward(self, tokens: Tensor, boundaries: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        packing = Packing(self.cu_seqlens)
        dense = self.model.config.is_dense
        output = self.model(tokens, cu_seqlens=packing.cu_seqlens_S1, boundaries=None if dense else boundaries)
        if dense:
            return output.logits, output.boundary_prob
        return output.logits, self.model.boundary(states, tokens, packing).prob_T

    def inputs(self, needs_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, boundaries and states of the detector."""
        width = self.model.config.d_token
        return self.tokens, self.boundaries, torch.zeros(len(self.tokens), width, requires_grad=needs_gradient)


class _ToMeta(TorchDispatchMode):
    """Lets real tensors (positions, indices, masks) meet those on meta: they are replaced by their shapes there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        if any(x.is_meta for x in tensors) and not all(x.is_meta for x in tensors):
            args, kwargs = tree_map(_shape_only, (args, kwargs))
        return func(*args, **kwargs)


def _shape_only(x: Any) -> Any:
    return torch.empty_like(x, device="meta") if isinstance(x, Tensor) and not x.is_meta else x


class NamedOperations(TorchDispatchMode):
    """Remembers which operations run that torch's counter does not count and that are not listed as free."""

    def __init__(self) -> None:
        super().__init__()
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if packet not in flop_registry and str(packet) not in FREE:
            self.unknown.add(str(packet))
        return func(*args, **(kwargs or {}))


def _with_torch(probe: _Probe) -> dict[str, float]:
    counter, seen = FlopCounterMode(display=False), NamedOperations()
    # The mode entered last sees an operation first: inputs go to meta, then are counted, then executed and remembered.
    with torch.no_grad(), seen, counter, _ToMeta():
        probe(*probe.inputs(needs_gradient=False))
    _refuse(seen.unknown, "torch's counter")
    found = {path.removeprefix("_Probe.model."): sum(n.values()) for path, n in counter.get_flop_counts().items()}
    return _by_component(found, counter.get_total_flops())


def _training_with_torch(probe: _Probe) -> float:
    counter, seen = FlopCounterMode(display=False), NamedOperations()
    with seen, counter, _ToMeta():
        logits, prob_T = probe(*probe.inputs(needs_gradient=True))
        loss = nn.functional.cross_entropy(logits, probe.tokens)
        torch.autograd.backward([loss, prob_T.sum()] if prob_T.requires_grad else [loss])
    _refuse(seen.unknown, "torch's counter")
    return float(counter.get_total_flops())


def _with_fvcore(probe: _Probe) -> dict[str, float]:
    with _ToMeta():
        analysis = analyse(probe, probe.inputs(needs_gradient=False))
    found = {path.removeprefix("model."): 2.0 * n for path, n in analysis.by_module().items()}
    return _by_component(found, found[""])


def analyse(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """A finished fvcore analysis, which counts multiply-adds.

    Raises:
        UserError: the trace holds an operation that is neither counted nor listed as free.
    """
    from fvcore.nn import FlopCountAnalysis

    log = logging.getLogger("fvcore.nn.jit_analysis")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # Tracing warns at each shape that depends on data; the data are fixed here.
            warnings.simplefilter("ignore")
            analysis = FlopCountAnalysis(module, inputs)
            analysis.set_op_handle("aten::einsum", _einsum_multiply_adds)
            # In place of fvcore's own list of what costs nothing, which is longer and gives no reasons.
            analysis._ignored_ops = set(FVCORE_FREE)
            analysis.total()  # traces, once; the counts are kept
    finally:
        log.setLevel(level)
    _refuse(set(analysis.unsupported_ops()), "fvcore")
    return analysis


def _refuse(unknown: set[str], counter: str) -> None:
    if unknown:
        raise UserError(
            f"{counter} has no count for {', '.join(sorted(unknown))}: an operation that may cost FLOPs must not count as "
            "zero; list it in flops/free.py with the reason if it is free, else give it a formula"
        )


def _einsum_multiply_adds(inputs: list[Any], _outputs: list[Any]) -> int:
    """Product of the ranges of all indices of an einsum over two operands: one multiply-add for each combination."""
    equation = inputs[0].toIValue()
    operands = [value.type().sizes() for value in inputs[1].node().inputs()]
    ranges: dict[str, int] = {}
    for names, sizes in zip(equation.split("->")[0].replace(" ", "").split(","), operands):
        ranges |= dict(zip(names, sizes))
    return math.prod(ranges.values())


def _by_component(found: Mapping[str, float], total: float) -> dict[str, float]:
    """Counts by module, summed by component.

    Raises:
        UserError: the components do not sum to the whole: the model does work in a module that `_MODULES` does not list.
    """
    parts: dict[str, float] = dict.fromkeys(COMPONENTS, 0.0)
    for path, flops in found.items():
        for pattern, component in _MODULES.items():
            if re.fullmatch(pattern, path):
                parts[component] += flops
    if sum(parts.values()) != total:
        raise UserError(
            f"the counter found {total:,.0f} FLOPs, of which {sum(parts.values()):,.0f} lie in known modules; "
            "bring flops/measure.py up to date with dlcm/model.py"
        )
    return parts
