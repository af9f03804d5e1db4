"""What every config is built on."""

from typing import Annotated

import pydantic
from pydantic import Field

PositiveInt = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Frozen(pydantic.BaseModel):
    """A frozen config that refuses unknown keys."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
