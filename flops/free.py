"""Operations that cost nothing by convention (`flops.ops`), each with the reason: what the counters may pass over, and no more.

Names are those of the operators that torch executes (`FREE`) and of those that a trace records for fvcore (`FVCORE_FREE`). An
operation that is in neither list and that a counter does not know makes `dlcm flops check` fail.
"""

from collections.abc import Mapping

_MOVES = "makes, moves, selects or reshapes numbers and computes none"
_ELEMENTWISE = "one step an element: linear in width, where products are quadratic"
_REDUCES = "sums, means, norms and softmax over rows: linear in width"
_LOOKS_UP = "an embedding lookup costs nothing, by convention"


def _listed(*, moves: str, elementwise: str, reduces: str, looks_up: str) -> Mapping[str, str]:
    groups = {_MOVES: moves, _ELEMENTWISE: elementwise, _REDUCES: reduces, _LOOKS_UP: looks_up}
    return {name: reason for reason, names in groups.items() for name in names.split()}


_TORCH = _listed(
    moves="""_local_scalar_dense _to_copy _unsafe_view alias arange cat clone copy_ detach empty empty_like expand fill_
    full full_like index index_put index_select lift_fresh masked_fill masked_fill_ new_empty new_full new_zeros
    nonzero ones ones_like permute repeat_interleave scalar_tensor select select_backward slice slice_backward
    split squeeze stack t transpose unbind uniform_ unsqueeze view where zeros zeros_like""",
    elementwise="""__rshift__ add add_ bitwise_and bitwise_not bitwise_or bitwise_xor clamp clamp_min_ cos div eq floor ge gt le
    log log1p logical_and_ lt mul neg pow rsqrt sigmoid sigmoid_backward silu silu_backward sin sub sub_""",
    reduces="""_fused_rms_norm _fused_rms_norm_backward _log_softmax _log_softmax_backward_data _softmax
    _softmax_backward_data all cumsum index_add index_add_ linalg_vector_norm mean nll_loss_backward
    nll_loss_forward sum""",
    looks_up="embedding embedding_dense_backward",
)  # fmt: skip
FREE: Mapping[str, str] = {f"aten.{name}": reason for name, reason in _TORCH.items()}

_TRACED = _listed(
    moves="""Int ScalarImplicit arange cat chunk detach diff expand flatten full index masked_fill new_full new_zeros
    nonzero numel ones_like repeat_interleave select size slice squeeze stack to unbind unflatten unsqueeze view
    where zeros zeros_like""",
    elementwise="""__and__ __or__ add bitwise_not clamp cos div eq floor floor_divide ge gt log log1p lt mul neg pow sigmoid silu
    sin sub""",
    reduces="cosine_similarity cumsum index_add index_add_ rms_norm softmax sum",
    looks_up="embedding",
)  # fmt: skip
FVCORE_FREE: Mapping[str, str] = {f"aten::{name}": reason for name, reason in _TRACED.items()}
