"""What a run found: the content of `result.json`."""

from dataclasses import dataclass
from pathlib import Path

from dlcm.config import SCHEMA_VERSION
from dlcm.errors import UserError
from dlcm.record import read_json


@dataclass(frozen=True)
class Result:
    """The content of `result.json`; None where the run diverged.

    Attributes:
        loss_nats: validation loss, nats per token.
        bits_per_byte: the same in bits per UTF-8 byte.
        tokens_per_concept: realised R on the validation set, under the calibrated threshold that the loss is measured with.
        tokens_per_concept_train: realised R in training, over the last tenth of the steps.
        tokens_per_concept_uncalibrated: what R on the validation set would be under a threshold set on training text.
        epochs: how often the training split was gone through; of a mixture, the source that was gone through most often.
        params: counts by group.
        wall_s: seconds of training, checkpoints and the calibration of the threshold included, without the final validation and
            without those of a trunk; of a start that was killed, up to its last checkpoint.
        domains: the validation set by content, source code and prose apart, as in `dlcm.validation.Validation`; None also
            where an earlier version trained the run.
        epochs_by_source: the same of each source of a mixture; None without one.
        sources: what was measured of each source of a mixture, as in `dlcm.validation.Validation`; None without one.
        micro_batch_tokens: tokens of one forward pass where it was set; smaller than in the config after
            an out-of-memory failure.
        loss_nats_stable: validation loss where the decay of `wsd` begins, in nats per token (L_stable of eq 23); None where it
            was not asked for (`train.measure_stable`).
        trunk: run that it has its first steps from (`dlcm.trunk`); None where it was trained alone.
        trunk_tokens: tokens of those steps.
        trunk_wall_s: seconds that they took there.
        last_good_step: of a diverged run, the newest checkpoint that was saved while the loss was near its lowest; None where
            there is none.
    """

    run_id: str
    status: str
    step: int
    tokens: int
    loss_nats: float | None
    bits_per_byte: float | None
    tokens_per_concept: float | None
    tokens_per_concept_train: float | None
    tokens_per_concept_uncalibrated: float | None
    epochs: float
    params: dict[str, int]
    wall_s: float
    device: str
    reason: str | None = None
    domains: dict[str, dict[str, float | int | None]] | None = None
    epochs_by_source: dict[str, float] | None = None
    sources: dict[str, dict[str, float | int]] | None = None
    micro_batch_tokens: int | None = None
    loss_nats_stable: float | None = None
    trunk: str | None = None
    trunk_tokens: int = 0
    trunk_wall_s: float = 0.0
    last_good_step: int | None = None
    schema: int = SCHEMA_VERSION


def load_result(run_dir: Path) -> Result:
    """Read `result.json` of a finished run.

    Raises:
        UserError: absent, damaged, or of another schema.
    """
    path = run_dir / "result.json"
    record = read_json(path)
    if record.get("schema") != SCHEMA_VERSION:
        raise UserError(f"{path}: schema {record.get('schema')!r}, this version reads {SCHEMA_VERSION}")
    try:
        return Result(**record)
    except TypeError as error:
        raise UserError(f"{path}: {error}; delete it and submit the run again") from None
