"""What a configuration costs: FLOPs and parameters in closed form, counters that check them, and what a device makes of it."""

from typing import TYPE_CHECKING

from dlcm.lazy import lazy_exports

if TYPE_CHECKING:
    from flops.count import FlopCount as FlopCount
    from flops.count import FlopCounts as FlopCounts
    from flops.count import ParamCount as ParamCount
    from flops.count import count as count
    from flops.count import count_many as count_many
    from flops.count import parameters as parameters
    from flops.hardware import ACCELERATORS as ACCELERATORS
    from flops.hardware import Estimate as Estimate
    from flops.hardware import Hardware as Hardware
    from flops.hardware import estimate as estimate
    from flops.inference import decode as decode
    from flops.inference import prefill as prefill
    from flops.memory import Memory as Memory
    from flops.memory import memory as memory

lazy_exports(
    __name__,
    {
        **dict.fromkeys(("FlopCount", "FlopCounts", "ParamCount", "count", "count_many", "parameters"), "flops.count"),
        **dict.fromkeys(("ACCELERATORS", "Estimate", "Hardware", "estimate"), "flops.hardware"),
        **dict.fromkeys(("decode", "prefill"), "flops.inference"),
        **dict.fromkeys(("Memory", "memory"), "flops.memory"),
    },
)
