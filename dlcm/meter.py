"""MFU while a run trains. What a model costs is not known here: a package above registers a meter for it.

A meter is an entry point of the group `dlcm.meters`: called with the config of a run and its environment (`env.json`), it gives
a function from tokens per second and tokens per concept to MFU, or None where no peak of the device is known. A meter that
fails is left out with a warning: a figure to watch must not cost a run.
"""

import sys
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from dlcm.config import RunConfig

Meter = Callable[[float, float], float]
"""(tokens per second over all devices, tokens per concept) -> MFU, the share of the peak FLOP/s."""


def load_meter(config: RunConfig, environment: Mapping[str, Any]) -> Meter | None:
    """The meter of a run on the device that its environment names; None where none is registered or the peak is not known."""
    for point in entry_points(group="dlcm.meters"):
        try:
            meter = point.load()(config, environment)
        except Exception as error:
            print(f"warning: meter {point.value} is left out ({type(error).__name__}: {error})", file=sys.stderr)
            continue
        if meter is not None:
            return meter
    return None
