"""The DLCM model, the dense baseline, and how one run is trained and evaluated."""

from typing import TYPE_CHECKING

from dlcm.lazy import lazy_exports

if TYPE_CHECKING:
    from dlcm.config import BoundaryConfig as BoundaryConfig
    from dlcm.config import DataConfig as DataConfig
    from dlcm.config import ModelConfig as ModelConfig
    from dlcm.config import OptimConfig as OptimConfig
    from dlcm.config import RunConfig as RunConfig
    from dlcm.config import TrainConfig as TrainConfig
    from dlcm.errors import UserError as UserError
    from dlcm.evaluate import evaluate as evaluate
    from dlcm.model import build_model as build_model
    from dlcm.train import Result as Result
    from dlcm.train import train as train

_CONFIGS = ("BoundaryConfig", "DataConfig", "ModelConfig", "OptimConfig", "RunConfig", "TrainConfig")
lazy_exports(
    __name__,
    {
        **dict.fromkeys(_CONFIGS, "dlcm.config"),
        "UserError": "dlcm.errors",
        "build_model": "dlcm.model",
        "train": "dlcm.train",
        "Result": "dlcm.train",
        "evaluate": "dlcm.evaluate",
    },
)
