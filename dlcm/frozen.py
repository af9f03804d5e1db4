"""What every config is built on."""

import pydantic


class Frozen(pydantic.BaseModel):
    """A frozen config that refuses unknown keys."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
