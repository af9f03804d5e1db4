"""What `dlcm flops table` counts: the models of sweep files, of sweep directories, of runs and of configs. No torch."""

from collections.abc import Mapping
from pathlib import Path

from dlcm.config import RunConfig
from flops.table import Subject, load_subject


def load_subjects(path: Path) -> list[Subject]:
    """Everything at `path` that has a cost per token.

    Of a sweep file each model once: runs that differ in seed, rate or length cost the same per token, and the first names them.
    Of a sweep directory every run, at its realised R once it is finished. Else one: a run folder, or a config file.

    Args:
        path: sweep file, sweep directory, run folder, run.json, or config file.

    Raises:
        UserError: nothing there that can be counted, a faulty sweep, or a key that no config has.
    """
    if (path / "plan.parquet").exists():
        from sweeps.store import load_sweep

        return [
            load_subject(run.path) if (run.path / "run.json").exists() else _planned(run.config, run.run_id)
            for run in load_sweep(path).runs
        ]
    if path.suffix in (".yaml", ".yml"):
        from dlcm.yaml_io import load_yaml

        data = load_yaml(path)
        if isinstance(data, Mapping) and ("axes" in data or "base" in data):
            return _of_sweep(path)
    return [load_subject(path)]


def _of_sweep(path: Path) -> list[Subject]:
    from sweeps.plan import plan
    from sweeps.spec import Sweep

    found = {}
    for run in plan(Sweep.from_yaml(path)).runs:
        found.setdefault((run.config.model, run.config.data.seq_len), _planned(run.config, run.run_id))
    return list(found.values())


def _planned(config: RunConfig, run_id: str) -> Subject:
    return Subject(run_id, config.model, config.data.seq_len, config.tokens)
