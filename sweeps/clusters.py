"""Where runs run: the schedulers that there are, named clusters of a user's file, and what is asked of them.

    # ~/.config/dlcm/clusters.yaml, or the file that DLCM_CLUSTERS names
    jupiter: {partition: gpu, account: my-project, setup: [module load cuda], max_time: "1-00:00:00"}
    box: {scheduler: local, gpus: 1, concurrency: 4}

`--cluster jupiter` then takes those settings. The later of these wins: the defaults, the named cluster, the `cluster` block of
the sweep file, the command line.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dlcm.errors import UserError, nearest, parse, user_path
from dlcm.yaml_io import load_yaml
from sweeps.spec import ClusterConfig

Scheduler = Literal["local", "slurm", "debug"]
SCHEDULERS: tuple[Scheduler, ...] = ("local", "slurm", "debug")


@dataclass(frozen=True)
class Target:
    """A cluster to submit to.

    Attributes:
        name: as the user named it.
        scheduler: what is spoken to.
        config: every setting, resolved.
    """

    name: str
    scheduler: Scheduler
    config: ClusterConfig


def clusters_file() -> Path:
    """The user's file of named clusters; it need not exist."""
    given = os.environ.get("DLCM_CLUSTERS")
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return user_path(given or f"{base}/dlcm/clusters.yaml", "DLCM_CLUSTERS" if given else "XDG_CONFIG_HOME")


def resolve_target(name: str, spec: ClusterConfig, settings: Mapping[str, Any] | None = None) -> Target:
    """The cluster of a name, with what the sweep file and the command line say of it.

    Args:
        name: `local`, `slurm`, `debug`, or a name in the user's file.
        spec: the `cluster` block of the sweep; what it leaves to its default does not count.
        settings: fields of `ClusterConfig` from the command line.

    Raises:
        UserError: no such cluster, an unknown setting, a value that its field refuses.
    """
    named: dict[str, Any] = {}
    scheduler: Any = name
    if name not in SCHEDULERS:
        path, known = clusters_file(), _named_clusters()
        if name not in known:
            told = f"neither {', '.join(SCHEDULERS)} nor a name in {path}"
            raise UserError(f"--cluster {name}: no such cluster ({told}){nearest(name, [*SCHEDULERS, *known])}")
        named = dict(known[name])
        scheduler = named.pop("scheduler", "slurm")
        if scheduler not in SCHEDULERS:
            raise UserError(f"{path}: {name}.scheduler = {scheduler!r}; give {' or '.join(SCHEDULERS)}")
        parse(ClusterConfig, named, f"{path}: {name}")  # a fault is told with its file
    values = {**named, **spec.model_dump(include=spec.model_fields_set), **(settings or {})}
    return Target(name, scheduler, parse(ClusterConfig, values, "cluster"))


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` of the command line as settings; values are read as YAML.

    Raises:
        UserError: not a pair, or no such key.
    """
    import yaml

    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair}: give KEY=VALUE, such as partition=gpu")
        if key not in ClusterConfig.model_fields:
            raise UserError(f"--set {pair}: no setting {key!r} of a cluster{nearest(key, ClusterConfig.model_fields)}")
        try:
            # 4:00:00 is a time here, not a number to the base of sixty.
            settings[key] = text if key in ("time", "max_time") else yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--set {pair}: {text!r} is not a value") from None
    return settings


def _named_clusters() -> Mapping[str, Mapping[str, Any]]:
    path = clusters_file()
    if not path.exists():
        if os.environ.get("DLCM_CLUSTERS"):
            raise UserError(f"{path}: no such file; DLCM_CLUSTERS names it")
        return {}
    data = load_yaml(path)
    if not isinstance(data, Mapping) or not all(isinstance(entry, Mapping) for entry in data.values()):
        raise UserError(f"{path}: expected a mapping of cluster names to settings, such as `gpu: {{partition: a100}}`")
    return data
