"""Which runs, and getting them run: sweep files, shapes, plans, launching, collecting."""

from typing import TYPE_CHECKING

from dlcm.lazy import lazy_exports

if TYPE_CHECKING:
    from sweeps.collect import collect as collect
    from sweeps.launch import launch as launch
    from sweeps.plan import Plan as Plan
    from sweeps.plan import PlannedRun as PlannedRun
    from sweeps.plan import plan as plan
    from sweeps.smooth_cost import cost_function as cost_function
    from sweeps.spec import Sweep as Sweep

lazy_exports(
    __name__,
    {
        "Sweep": "sweeps.spec",
        "Plan": "sweeps.plan",
        "PlannedRun": "sweeps.plan",
        "plan": "sweeps.plan",
        "cost_function": "sweeps.smooth_cost",
        "launch": "sweeps.launch",
        "collect": "sweeps.collect",
    },
)
