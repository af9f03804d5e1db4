"""Two independent counters against the closed form: torch's FlopCounterMode, and fvcore. The only importer of fvcore.

Both count what the kernels compute on one document with injected boundaries, so the closed form is brought to their
conventions first, term by term (`expected`):

- attention is counted as a full square, because the kernels compute it so (`reference` backend, whose scores are plain
  matrix products that both counters know; both see scaled-dot-product attention as zero on a CPU);
- the null concept is one more row for the V projection of each cross-attention, work that vanishes beside that of M concepts
  and that the closed form leaves out;
- the smoother is elementwise arithmetic, which neither counts;
- fvcore counts multiply-adds, half of our FLOPs, and is doubled here; its einsum handle rounds to three digits and is
  replaced by the exact product of the index ranges.

After that the figures must be equal, exactly, for every component.
"""

import logging
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dlcm.config import ModelConfig
from dlcm.errors import UserError
from dlcm.model import build_model
from flops.count import COMPONENTS, count, parameters

# Above this a forward pass on a CPU takes too long and too much memory for a check.
MAX_PARAMETERS = 200_000_000

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


@dataclass(frozen=True)
class Checked:
    """One component under the closed form and under both counters, in FLOPs of one forward pass.

    Attributes:
        component: name, as in `count`.
        closed_form: causal halved, as the project counts.
        expected: the closed form under the counters' conventions.
        torch: what FlopCounterMode counted.
        fvcore: twice what fvcore counted in multiply-adds.
    """

    component: str
    closed_form: float
    expected: float
    torch: float
    fvcore: float

    @property
    def agrees(self) -> bool:
        """Whether both counters give the expected figure exactly."""
        return self.torch == self.expected == self.fvcore


@dataclass(frozen=True)
class CheckedParameters:
    """All parameters: closed form against the built model."""

    closed_form: int
    built: int

    @property
    def agrees(self) -> bool:
        """Whether they are equal."""
        return self.closed_form == self.built


def check(config: ModelConfig, seq_len: int = 64) -> tuple[list[Checked], CheckedParameters]:
    """Build the model of `config` on the CPU, run it under each counter, and compare with the closed form.

    Args:
        config: DLCM or dense, small enough to run on a CPU.
        seq_len: tokens of the one document; a boundary is injected at every floor(R)-th token.

    Returns:
        FLOPs by component, and parameters; both with `agrees`.

    Raises:
        UserError: the model is too large to run here.
    """
    n_parameters = parameters(config).total
    if n_parameters > MAX_PARAMETERS:
        raise UserError(
            f"a check runs the model on the CPU, and {n_parameters:,} parameters are above {MAX_PARAMETERS:,}; "
            "check a smaller model of the same kind: the formulas are the same"
        )
    # Zero-parameter differences between backends are tested elsewhere; this one has no fused kernel that hides its work.
    model = build_model(config.model_copy(update={"attention_backend": "reference"})).eval()
    tokens = torch.arange(seq_len) % config.vocab_size
    boundaries = None if config.is_dense else torch.arange(seq_len) % max(int(config.compression_target), 1) == 0
    n_concepts = seq_len if boundaries is None else int(boundaries.sum())
    closed = count(config, documents=[seq_len], concepts=[n_concepts]).components
    expected = _expected(config, seq_len, n_concepts)
    by_torch, by_fvcore = _with_torch(model, tokens, boundaries), _with_fvcore(model, tokens, boundaries)
    if boundaries is not None:
        # Injected boundaries bypass the detector. Its own work comes from a pass that detects, and for fvcore, which
        # cannot trace decisions that depend on data, from its projections alone.
        by_torch["boundary"] = _with_torch(model, tokens, None)["boundary"]
        states = torch.zeros(seq_len, config.d_token)
        scans = [module for module in model.boundary.modules() if isinstance(module, nn.Linear)]
        by_fvcore["boundary"] = sum(2 * _fvcore(scan, (states,)).total() for scan in scans)
    rows = [Checked(name, closed[name], expected[name], by_torch[name], by_fvcore[name]) for name in COMPONENTS]
    return rows, CheckedParameters(n_parameters, sum(weight.numel() for weight in model.parameters()))


def _expected(config: ModelConfig, seq_len: int, n_concepts: int) -> dict[str, float]:
    """The closed form under the counters' conventions (see the head of this file)."""
    c, square = config, count(config, documents=[seq_len], concepts=[n_concepts]).full_square
    assert square is not None  # only the twin itself has none
    parts = dict(square.components)
    parts["smoothing"] = 0.0
    if not c.is_dense and c.pooling == "mean":
        parts["cross_attention"] += c.n_cross_attentions * 2 * c.d_concept * c.n_kv_heads_token * c.d_head
    return parts


class _Logits(nn.Module):
    """The model as a function of tensors to one tensor, which is what a trace can hold."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, boundaries: Tensor | None = None) -> Tensor:
        return self.model(tokens, boundaries=boundaries).logits


def _with_torch(model: nn.Module, tokens: Tensor, boundaries: Tensor | None) -> dict[str, float]:
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        _Logits(model)(tokens, boundaries)
    found = {path.removeprefix("_Logits.model."): sum(n.values()) for path, n in counter.get_flop_counts().items()}
    return _by_component(found, counter.get_total_flops())


def _with_fvcore(model: nn.Module, tokens: Tensor, boundaries: Tensor | None) -> dict[str, float]:
    inputs = (tokens,) if boundaries is None else (tokens, boundaries)
    found = {path.removeprefix("model."): 2.0 * n for path, n in _fvcore(_Logits(model), inputs).by_module().items()}
    return _by_component(found, found[""])


def _fvcore(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """A finished fvcore analysis, which counts multiply-adds."""
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
            analysis.total()  # traces, once; the counts are kept
    finally:
        log.setLevel(level)
    return analysis


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
