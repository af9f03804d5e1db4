"""Two independent counters against the closed form: torch's FlopCounterMode, and fvcore. The only importer of fvcore.

Both count what the kernels compute on one document with injected boundaries, so the closed form is brought to their
conventions first, term by term (`expected`):

- attention is counted as a full square, because the kernels compute it so (`reference` backend, whose scores are plain
  matrix products that both counters know; each sees scaled-dot-product attention as zero on a CPU);
- the null concept is one key more than there are concepts: its K and V projections and L scores for each
  cross-attention, work that the closed form leaves out as it vanishes with M;
- the smoother is elementwise arithmetic, which neither counts;
- fvcore counts multiply-adds, half of our FLOPs; it is doubled here.

After that the figures must be equal, exactly, for every component.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dlcm.config import ModelConfig
from dlcm.errors import UserError
from flops import ops
from flops.count import COMPONENTS, count, parameters

if TYPE_CHECKING:
    import torch

# Above this a forward pass on a CPU takes too long and too much memory for a check.
MAX_PARAMETERS = 200_000_000

# Component of each module of dlcm.model.Model, by its path; the first prefix that fits decides.
_MODULES = (
    ("embedding", "embedding"),
    ("encoder", "encoder"),
    ("boundary", "boundary"),
    ("concepts.w_up", "pooling"),
    ("concepts.blocks", "backbone"),
    ("decoder.*.cross", "cross_attention"),
    ("decoder", "decoder"),
    ("unembedding", "head"),
)


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
    """Parameters by group: closed form against the built model."""

    group: str
    closed_form: int
    built: int

    @property
    def agrees(self) -> bool:
        """Whether they are equal."""
        return self.closed_form == self.built


def check(config: ModelConfig, seq_len: int = 64) -> tuple[list[Checked], list[CheckedParameters]]:
    """Build the model of `config` on the CPU, run it once under each counter, and compare with the closed form.

    Args:
        config: DLCM or dense, small enough to run on a CPU.
        seq_len: tokens of the one document; boundaries are injected every floor(R) tokens.

    Returns:
        FLOPs by component and parameters by group; both with `agrees`.

    Raises:
        UserError: the model is too large to run here.
    """
    import torch

    from dlcm.model import build_model

    n_parameters = parameters(config).total
    if n_parameters > MAX_PARAMETERS:
        raise UserError(
            f"a check runs the model on the CPU, and {n_parameters:,} parameters are above {MAX_PARAMETERS:,}; "
            "check a smaller model of the same kind: the formulas are the same"
        )
    model = build_model(config.model_copy(update={"attention_backend": "reference"})).eval()
    tokens = torch.arange(seq_len) % config.vocab_size
    boundaries = None if config.is_dense else torch.arange(seq_len) % max(int(config.compression_target), 1) == 0
    n_concepts = seq_len if boundaries is None else int(boundaries.sum())
    expected = _expected(config, seq_len, n_concepts)
    closed = count(config, documents=[seq_len], concepts=[n_concepts]).components
    by_torch = _count_with_torch(model, tokens, boundaries)
    by_fvcore = _count_with_fvcore(model, tokens, boundaries)
    rows = [Checked(name, closed[name], expected[name], by_torch[name], by_fvcore[name]) for name in COMPONENTS]
    return rows, _check_parameters(config, model)


def _expected(config: ModelConfig, seq_len: int, n_concepts: int) -> dict[str, float]:
    """The closed form under the counters' conventions (see the head of this file)."""
    c, square = config, count(config, documents=[seq_len], concepts=[n_concepts]).full_square
    assert square is not None  # only the twin itself has none
    parts = dict(square.components)
    parts["smoothing"] = 0.0
    if not c.is_dense:
        null = ops.cross_projections(0, 1, c.d_token, c.d_concept, c.n_heads_token, c.n_kv_heads_token, c.d_head)
        null += ops.attention_scores(seq_len, c.n_heads_token, c.d_head)
        parts["cross_attention"] += c.n_cross_attentions * null
    return parts


def _count_with_torch(
    model: "torch.nn.Module", tokens: "torch.Tensor", boundaries: "torch.Tensor | None"
) -> dict[str, float]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        _Both(model)(tokens, boundaries)
    total = {path: sum(ops_of.values()) for path, ops_of in counter.get_flop_counts().items()}
    # Paths start with the class of the outermost module, then its attribute: _Both.model.encoder.0 ...
    counts = {path.removeprefix("_Both.model."): n for path, n in total.items() if path.startswith("_Both.model.")}
    return _by_component(counts, total.get("Global", 0))


def _count_with_fvcore(
    model: "torch.nn.Module", tokens: "torch.Tensor", boundaries: "torch.Tensor | None"
) -> dict[str, float]:
    import logging

    import torch
    from fvcore.nn import FlopCountAnalysis

    # The trace of data-dependent shapes warns on every line of it; the boundaries are fixed, so they do not matter here.
    for name in ("fvcore.nn.jit_analysis", "fvcore.nn.jit_handles"):
        logging.getLogger(name).setLevel(logging.ERROR)
    inputs = (tokens,) if boundaries is None else (tokens, boundaries)
    import warnings

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        # Norms, and what else is linear in width, are outside the convention of `flops.ops`.
        analysis = FlopCountAnalysis(_Both(model), inputs).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.set_op_handle(**dict.fromkeys(_UNCOUNTED, None))
        total = {path.removeprefix("model."): 2 * n for path, n in analysis.by_module().items()}
    return _by_component({path: n for path, n in total.items() if path}, total.get("", 0))


# Operators that fvcore knows and that our convention leaves out.
_UNCOUNTED = ("aten::layer_norm", "aten::rms_norm", "aten::mean")


def _by_component(counts: Mapping[str, float], total: float) -> dict[str, float]:
    """Sum module counts by component; modules inside modules are counted once.

    Raises:
        AssertionError: the parts do not sum to the whole, i.e. work was done outside the modules listed in `_MODULES`.
    """
    parts: dict[str, float] = dict.fromkeys(COMPONENTS, 0.0)
    for path, flops in counts.items():
        steps = path.split(".")
        if component := _component_of(steps):
            parts[component] += flops
        elif len(steps) == 3 and steps[0] == "decoder":
            parts["decoder"] += flops if steps[2] == "block" else 0
    assert sum(parts.values()) == total, f"counted {total} in all but {sum(parts.values())} by component"
    return parts


def _component_of(steps: list[str]) -> str | None:
    raise NotImplementedError


class _Both:
    pass
