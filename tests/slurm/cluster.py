"""A SLURM cluster on the loopback interface, for tests: no systemd, no configuration of the machine is used.

    python -m tests.slurm.cluster --nodes 3 --gpus 1 --accounting   # prints how to use it, stops it on Ctrl-C

The daemons run in the foreground as children of this process, with a folder of their own for keys, state and logs, so
that stopping is ending our own children. Needs root (slurmd starts jobs) and the packages slurmctld, slurmd,
slurm-client and munge; accounting needs slurmdbd and mariadb-server as well.

Three kinds of failure, because SLURM treats them differently:

    kill_node(name)             slurmd dies, its jobs run on; after SlurmdTimeout the node is down and they are requeued
    kill_node(name, jobs=True)  the machine dies: slurmd and everything that its jobs started
    down_node(name)             the controller gives the node up at once and requeues its jobs
"""

import argparse
import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
ACCOUNTING_PROGRAMS = ("mariadbd", "mariadb-install-db", "mariadb", "slurmdbd", "sacct", "sacctmgr")
# A node that does not answer for so long is down, and its jobs are requeued.
SLURMD_TIMEOUT_S = 6
_START_S = 30.0
# Debian keeps the daemons where only root's PATH looks.
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def why_not() -> str | None:
    """Why no cluster can be started here; None where it can."""
    if os.geteuid() != 0:
        return "slurmd needs root"
    if absent := _absent(PROGRAMS):
        return f"{absent} not installed (apt-get install slurmctld slurmd slurm-client munge)"
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "nothing"
    if not address.startswith("127."):
        return f"the host name resolves to {address}, not to loopback (add '127.0.0.1 {socket.gethostname()}' to /etc/hosts)"
    return None


def why_no_accounting() -> str | None:
    """Why no cluster with `accounting` can be started here; None where it can."""
    if reason := why_not():
        return reason
    if absent := _absent(ACCOUNTING_PROGRAMS):
        return f"{absent} not installed (apt-get install mariadb-server slurmdbd)"
    return None


def _absent(programs: tuple[str, ...]) -> str:
    return ", ".join(name for name in programs if shutil.which(name, path=_PATH) is None)


@dataclass
class LoopbackCluster:
    """One controller and the nodes node1 to nodeN. `environment` is what a client needs.

    Attributes:
        folder: Keys, configuration, state and logs.
        cpus: CPUs of each node, whatever the machine has.
        nodes: How many slurmd run.
        memory_mb: Memory of each node, which jobs then share and are killed for exceeding; None leaves it uncounted.
        gpus: Pretended GPUs of each node: jobs get CUDA_VISIBLE_DEVICES, and nothing behind it.
        max_array_size: One more than the highest index of a job array; None is SLURM's own 1001.
        preemption: A second partition, `urgent`, whose jobs push those of `test` back into the queue.
        accounting: Run MariaDB and slurmdbd, so that sacct answers.
    """

    folder: Path
    cpus: int = 2
    nodes: int = 1
    memory_mb: int | None = None
    gpus: int = 0
    max_array_size: int | None = None
    preemption: bool = False
    accounting: bool = False
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.config = self.folder / "slurm.conf"
        self.names = [f"node{i + 1}" for i in range(self.nodes)]
        self.environment = {**os.environ, "SLURM_CONF": str(self.config), "PATH": _PATH}

    def start(self) -> None:
        """Start all daemons, and wait until every node takes jobs.

        Raises:
            RuntimeError: a daemon ended, or a node is not ready in time; the end of its log is in the message.
        """
        for name in ("state", "spool", "log", "run", "gpu"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        # Clients of other users read the configuration and talk to munge.
        for public in (self.folder, self.folder / "run"):
            public.chmod(0o755)
        controller, database, *ports = _free_ports(2 + self.nodes)
        self.config.write_text(self._config_text(controller, database, ports))
        self.config.chmod(0o644)
        for i in range(self.gpus):
            # SLURM insists on a device.
            (self.folder / "gpu" / f"gpu{i}").symlink_to("/dev/null")
        devices = f"Name=gpu File={self.folder}/gpu/gpu[0-{self.gpus - 1}]\n" if self.gpus else ""
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\n{devices}")
        self._start_munge()
        if self.accounting:
            self._start_accounting(database)
        self._daemon("slurmctld", ["slurmctld", "-D", "-f", str(self.config)])
        self._wait("the controller", lambda: self._answers(["scontrol", "ping"], "UP"))
        for name in self.names:
            self._start_slurmd(name)
        self._wait("a node", lambda: set(self.node_states().values()) == {"idle"})

    def stop(self) -> None:
        """Cancel all jobs, then end the daemons, last started first, and whatever outlived a killed node."""
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self.client(["scancel", "--state=PENDING"], ["scancel", "--state=RUNNING"])
            # A job on a node without slurmd does not end.
            deadline = time.monotonic() + (
                15.0 if all(f"slurmd-{name}" in self._daemons for name in self.names) else 0.0
            )
            while time.monotonic() < deadline and self.client(["squeue", "-h"]).strip():
                time.sleep(0.2)
        for process in reversed(self._daemons.values()):
            process.terminate()
            try:
                process.wait(timeout=10.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._daemons.clear()
        for name in self.names:
            self._kill_jobs(name)

    def client(self, *commands: list[str], user: str | None = None) -> str:
        """Run client commands, as root or as `user`, and return what they print."""
        identity = self.as_user(user) if user else {"env": self.environment}
        answers = [
            subprocess.run(c, **identity, capture_output=True, text=True, timeout=20, check=True).stdout
            for c in commands
        ]
        return "".join(answers)

    def as_user(self, name: str = "nobody") -> dict[str, Any]:
        """Arguments of subprocess.run that make it a client of another account, with a home folder that it can write.

        SLURM needs the account's number only, not its shell or its home, so that `nobody` will do.
        """
        account = pwd.getpwnam(name)
        home = self.folder / "home" / name
        home.mkdir(parents=True, exist_ok=True)
        os.chown(home, account.pw_uid, account.pw_gid)
        env = {**self.environment, "HOME": str(home), "USER": name, "LOGNAME": name, "SHELL": "/bin/sh"}
        return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": [], "env": env, "cwd": home}

    def sbatch(self, script: str, *options: str, user: str | None = None) -> str:
        """Submit a line of shell and return the job's id. Its output goes to `<id>.out` in the submitter's home."""
        home = self.as_user(user)["cwd"] if user else self.folder
        command = ["sbatch", "--parsable", f"--chdir={home}", "--output=%A.out", *options, "--wrap", script]
        return self.client(command, user=user).strip()

    def node_states(self) -> dict[str, str]:
        """SLURM's word for each node: idle, mixed, allocated, down; with a `*` when slurmd does not answer."""
        lines = self.client(["sinfo", "-h", "-N", "-o", "%N|%T"]).splitlines()
        return dict(line.strip().split("|", 1) for line in lines)

    def job_states(self) -> dict[str, str]:
        """SLURM's word for each job, array tasks one by one, ended ones included (for five minutes)."""
        lines = self.client(["squeue", "-h", "-r", "-t", "all", "-o", "%i|%T"]).splitlines()
        return dict(line.strip().split("|", 1) for line in lines)

    def requeue(self, job_id: str) -> None:
        """Put a running job back into the queue. It waits for its credential to expire, eleven seconds."""
        self.client(["scontrol", "requeue", job_id])

    def signal(self, job_id: str, name: str, *, batch: bool = False) -> None:
        """Send a signal to the steps of a job, as a time limit's warning does, or to its batch script."""
        self.client(["scancel", f"--signal={name}", *(["--batch"] if batch else []), job_id])

    def kill_node(self, name: str, *, jobs: bool = False) -> None:
        """SIGKILL a slurmd, and with `jobs` everything that runs on its node, as when the machine loses power."""
        process = self._daemons.pop(f"slurmd-{name}")
        process.kill()
        process.wait()
        if jobs:
            self._kill_jobs(name)

    def down_node(self, name: str) -> None:
        """Have the controller give a node up: its jobs are requeued at once. `start_node` brings it back."""
        self.client(["scontrol", "update", f"nodename={name}", "state=down", "reason=test"])

    def start_node(self, name: str) -> None:
        """Bring a node back, and wait until it takes jobs."""
        if f"slurmd-{name}" in self._daemons:
            with contextlib.suppress(subprocess.CalledProcessError):  # it may be back already
                self.client(["scontrol", "update", f"nodename={name}", "state=resume"])
        else:
            # A node that was away for less than SlurmdTimeout looks well before its new slurmd has registered.
            before = self._registered(name)
            self._start_slurmd(name)
            self._wait(f"{name}'s slurmd", lambda: self._registered(name) != before)
        self._wait(name, lambda: self.node_states()[name] in ("idle", "mixed", "allocated"))

    def _registered(self, name: str) -> str:
        words = self.client(["scontrol", "--oneliner", "show", "node", name]).split()
        return next(word for word in words if word.startswith("SlurmdStartTime="))

    def _kill_jobs(self, name: str) -> None:
        for pid in _processes_of(self.folder, name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _start_slurmd(self, name: str) -> None:
        self._daemon(f"slurmd-{name}", ["slurmd", "-D", "-f", str(self.config), "-N", name])

    def _start_munge(self) -> None:
        key, run, log = self.folder / "munge.key", self.folder / "run", self.folder / "log"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        options = {
            "origin": "127.0.0.1",
            "key-file": key,
            "socket": run / "munge",
            "pid-file": run / "munged.pid",
            "log-file": log / "munged.log",
            "seed-file": run / "munge.seed",
        }
        self._daemon("munged", ["munged", "--foreground", "--force", *(f"--{k}={v}" for k, v in options.items())])
        self._wait("munge", lambda: (run / "munge").exists())

    def _start_accounting(self, port: int) -> None:
        data, conf = self.folder / "db", self.folder / "slurmdbd.conf"
        # Nobody but root may reach the database, and not over the network.
        data.mkdir(mode=0o700)
        sock = self.folder / "db.sock"
        base = ["--no-defaults", "--user=root", f"--datadir={data}"]
        install = ["mariadb-install-db", *base, "--auth-root-authentication-method=socket", "--skip-test-db"]
        subprocess.run(install, env=self.environment, capture_output=True, timeout=60, check=True)
        small = ["--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M", "--innodb-lock-wait-timeout=900"]
        self._daemon("mariadbd", ["mariadbd", *base, f"--socket={sock}", "--skip-networking", *small])
        create = [
            "mariadb",
            "--no-defaults",
            f"--socket={sock}",
            "-e",
            "CREATE DATABASE IF NOT EXISTS slurm; SELECT 'up'",
        ]
        self._wait("the database", lambda: self._answers(create, "up"))
        settings = {
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self.folder / 'run' / 'munge'}",
            "CommunicationParameters": "NoInAddrAny",
            "DbdHost": _host(),
            "DbdAddr": "127.0.0.1",
            "DbdPort": port,
            "SlurmUser": "root",
            "StorageType": "accounting_storage/mysql",
            "StorageHost": "localhost",
            "StorageUser": "root",
            "StorageLoc": "slurm",
            "PidFile": self.folder / "run" / "slurmdbd.pid",
            "LogFile": self.folder / "log" / "slurmdbd.log",
        }
        conf.touch(mode=0o600)  # slurmdbd refuses one that others can read
        conf.write_text(_lines(settings))
        self._daemon("slurmdbd", ["slurmdbd", "-D"], MYSQL_UNIX_PORT=str(sock))
        self._wait("slurmdbd", lambda: self._answers(["sacctmgr", "-i", "add", "cluster", "loopback"], "loopback"))

    def _config_text(self, controller: int, database: int, ports: list[int]) -> str:
        folder = self.folder
        settings: dict[str, object] = {
            "ClusterName": "loopback",
            "SlurmctldHost": f"{_host()}(127.0.0.1)",
            "SlurmctldPort": controller,
            "SlurmUser": "root",
            "AuthType": "auth/munge",
            # A requeued job waits until its old credential has expired: the default is two minutes.
            "AuthInfo": f"socket={folder / 'run' / 'munge'},cred_expire=10",
            "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool" / "%n",
            "SlurmctldPidFile": folder / "run" / "slurmctld.pid",
            "SlurmdPidFile": folder / "run" / "slurmd-%n.pid",
            "SlurmctldLogFile": folder / "log" / "slurmctld.log",
            "SlurmdLogFile": folder / "log" / "slurmd-%n.log",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            "SchedulerParameters": "sched_interval=2,bf_interval=2,batch_sched_delay=0",
            "SlurmdParameters": "config_overrides",
            "SlurmdTimeout": SLURMD_TIMEOUT_S,
            "ReturnToService": 2,
            "KillWait": 2,
            "MpiDefault": "none",
            "GresTypes": "gpu",
        }
        if self.memory_mb is not None:
            settings |= {
                "SelectTypeParameters": "CR_CPU_Memory",
                "DefMemPerCPU": max(self.memory_mb // self.cpus, 1),
                "JobAcctGatherType": "jobacct_gather/linux",
                "JobAcctGatherFrequency": "task=1",
                "JobAcctGatherParams": "OverMemoryKill",
            }
        if self.max_array_size is not None:
            settings["MaxArraySize"] = self.max_array_size
        if self.accounting:
            settings |= {
                "AccountingStorageType": "accounting_storage/slurmdbd",
                "AccountingStorageHost": "127.0.0.1",
                "AccountingStoragePort": database,
                "AccountingStoragePass": folder / "run" / "munge",
            }
        partitions = ["PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP"]
        if self.preemption:
            settings |= {"PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE"}
            partitions.append(
                "PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP"
            )
        share = f"CPUs={self.cpus} RealMemory={self.memory_mb or 1024}" + (
            f" Gres=gpu:{self.gpus}" if self.gpus else ""
        )
        nodes = [
            f"NodeName={name} NodeHostname={_host()} NodeAddr=127.0.0.1 Port={port} {share}"
            for name, port in zip(self.names, ports)
        ]
        return _lines(settings) + "\n".join([*nodes, *partitions]) + "\n"

    def _daemon(self, name: str, command: list[str], **environment: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment | environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL
            )

    def _answers(self, command: list[str], word: str) -> bool:
        with contextlib.suppress(subprocess.SubprocessError):
            return word in self.client(command)
        return False

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_S
        while not ready():
            ended = [name for name, process in self._daemons.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "\n".join(
                    f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}"
                    for path in (self.folder / "log").iterdir()
                )
                raise RuntimeError(f"{what} did not come up{f', {ended[0]} ended' if ended else ''}\n{logs}")
            time.sleep(0.1)


def _processes_of(folder: Path, node: str) -> list[int]:
    """What the jobs on a node left running: its slurmstepd, known by the log, and their children, by the environment."""
    log = str(folder / "log" / f"slurmd-{node}.log")
    marks = {f"SLURM_CONF={folder / 'slurm.conf'}".encode(), f"SLURMD_NODENAME={node}".encode()}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            step = (process / "comm").read_text().startswith("slurmstepd")
            if (step and any(str(fd.readlink()) == log for fd in (process / "fd").iterdir())) or marks <= set(
                (process / "environ").read_bytes().split(b"\0")
            ):
                found.append(int(process.name))
    return found


def _host() -> str:
    return socket.gethostname().split(".")[0]


def _lines(settings: dict[str, object]) -> str:
    return "".join(f"{key}={value}\n" for key, value in settings.items())


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def loopback_cluster(**options: Any) -> Iterator[LoopbackCluster]:
    """A running LoopbackCluster of these options. Its folder is short, as a socket's path may have 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    cluster = LoopbackCluster(folder, **options)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Start a cluster and keep it until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.cluster", description="A SLURM cluster on loopback.")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs of each node")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--memory-mb", type=int, help="memory of each node, counted and enforced")
    parser.add_argument("--gpus", type=int, default=0, help="pretended GPUs of each node")
    parser.add_argument("--max-array-size", type=int)
    parser.add_argument("--preemption", action="store_true", help="add the partition `urgent`")
    parser.add_argument("--accounting", action="store_true", help="run MariaDB and slurmdbd, for sacct")
    options = parser.parse_args()
    if reason := why_no_accounting() if options.accounting else why_not():
        sys.exit(f"no SLURM here: {reason}")
    with loopback_cluster(**vars(options)) as cluster, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={cluster.config}\nCtrl-C stops it", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
