"""What a configuration costs: FLOPs and parameters in one closed form, and the counters that check it."""

from typing import TYPE_CHECKING

from dlcm.lazy import lazy_exports

if TYPE_CHECKING:
    from flops.count import FlopCount as FlopCount
    from flops.count import ParamCount as ParamCount
    from flops.count import count as count
    from flops.count import parameters as parameters

lazy_exports(__name__, dict.fromkeys(("FlopCount", "ParamCount", "count", "parameters"), "flops.count"))
