"""A SLURM cluster of one node on the loopback interface, for tests: no systemd, no configuration of the machine is used.

    python -m tests.slurm.cluster            # starts one, prints how to use it, and stops it on Ctrl-C

The daemons run in the foreground as children of this process, with a folder of their own for keys, state and logs, so
that stopping is ending our own children. Needs root (slurmd starts jobs) and the packages slurmctld, slurmd,
slurm-client and munge.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
_START_S = 30.0
# Debian keeps the daemons where only root's PATH looks.
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def why_not() -> str | None:
    """Why no cluster can be started here; None where it can."""
    if os.geteuid() != 0:
        return "slurmd needs root"
    if absent := [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]:
        return f"{', '.join(absent)} not installed (apt-get install slurmctld slurmd slurm-client munge)"
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "nothing"
    if not address.startswith("127."):
        return f"the host name resolves to {address}, not to loopback (add '127.0.0.1 {socket.gethostname()}' to /etc/hosts)"
    return None


class LoopbackCluster:
    """One controller, one node. `environment` is what a client needs."""

    def __init__(self, folder: Path, cpus: int = 2) -> None:
        self.folder, self.cpus = folder, cpus
        self.config = folder / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.config), "PATH": _PATH}
        self._daemons: list[tuple[str, subprocess.Popen[bytes]]] = []

    def start(self) -> None:
        """Start munge, controller and node, and wait until the node takes jobs.

        Raises:
            RuntimeError: a daemon ended, or the node is not ready in time; the end of its log is in the message.
        """
        for name in ("state", "spool", "log", "run"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        self.config.write_text(self._config_text())
        run, log = self.folder / "run", self.folder / "log"
        self._daemon(
            "munged",
            [
                "--foreground",
                "--force",
                "--origin=127.0.0.1",
                f"--key-file={key}",
                f"--socket={run / 'munge'}",
                f"--pid-file={run / 'munged.pid'}",
                f"--log-file={log / 'munged.log'}",
                f"--seed-file={run / 'munge.seed'}",
            ],
        )
        self._wait("munge", lambda: (run / "munge").exists())
        self._daemon("slurmctld", ["-D", "-f", str(self.config)])
        self._wait("the controller", lambda: self._answers(["scontrol", "ping"], "UP"))
        self.start_node()

    def start_node(self) -> None:
        """Start the node's daemon and wait until the node answers. Jobs that ran through its absence are taken up again."""
        self._daemon("slurmd", ["-D", "-f", str(self.config), "-N", "node1"])
        ready = ("idle", "mix", "alloc")
        self._wait("the node", lambda: any(self._answers(["sinfo", "-h", "-o", "%t"], word) for word in ready))

    def kill_node(self) -> None:
        """SIGKILL the node's daemon. The steps of its jobs have processes of their own and go on."""
        for name, process in [pair for pair in self._daemons if pair[0] == "slurmd"]:
            process.kill()
            process.wait()
            self._daemons.remove((name, process))

    def stop(self) -> None:
        """Cancel all jobs, then end the daemons, last started first."""
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self.client(["scancel", "--state=PENDING"], ["scancel", "--state=RUNNING"])
            deadline = time.monotonic() + 15.0
            while time.monotonic() < deadline and self.client(["squeue", "-h"]).strip():
                time.sleep(0.2)
        for _, process in reversed(self._daemons):
            process.terminate()
            try:
                process.wait(timeout=10.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._daemons.clear()

    def client(self, *commands: list[str]) -> str:
        """Run client commands and return what they print."""
        answers = [
            subprocess.run(c, env=self.environment, capture_output=True, text=True, timeout=20, check=True).stdout
            for c in commands
        ]
        return "".join(answers)

    def _config_text(self) -> str:
        host, folder = socket.gethostname().split(".")[0], self.folder
        controller, node = _free_ports(2)
        settings = {
            "ClusterName": "loopback",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": controller,
            "SlurmUser": "root",
            "AuthType": "auth/munge",
            # A requeued job waits until its old credential has expired: the default is two minutes.
            "AuthInfo": f"socket={folder / 'run' / 'munge'},cred_expire=10",
            "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool",
            "SlurmctldPidFile": folder / "run" / "slurmctld.pid",
            "SlurmdPidFile": folder / "run" / "slurmd.pid",
            "SlurmctldLogFile": folder / "log" / "slurmctld.log",
            "SlurmdLogFile": folder / "log" / "slurmd.log",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            "SchedulerParameters": "sched_interval=2,batch_sched_delay=0",
            "SlurmdParameters": "config_overrides",
            "ReturnToService": 2,
            "KillWait": 2,
            "MpiDefault": "none",
        }
        lines = [f"{key}={value}" for key, value in settings.items()]
        lines.append(
            f"NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node} CPUs={self.cpus} RealMemory=1024"
        )
        lines.append("PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        return "\n".join(lines) + "\n"

    def _daemon(self, name: str, arguments: list[str]) -> None:
        program = shutil.which(name, path=_PATH)
        assert program is not None, why_not()
        with (self.folder / "log" / f"{name}.out").open("wb") as out:
            process = subprocess.Popen(
                [program, *arguments], env=self.environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL
            )
        self._daemons.append((name, process))

    def _answers(self, command: list[str], word: str) -> bool:
        with contextlib.suppress(subprocess.SubprocessError):
            return word in self.client(command)
        return False

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_S
        while not ready():
            ended = [name for name, process in self._daemons if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "\n".join(
                    f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}"
                    for path in (self.folder / "log").iterdir()
                )
                raise RuntimeError(f"{what} did not come up{f', {ended[0]} ended' if ended else ''}\n{logs}")
            time.sleep(0.1)


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def loopback_cluster(cpus: int = 2) -> Iterator[LoopbackCluster]:
    """A running cluster. Its folder is short and under /tmp: a socket's path may have 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    cluster = LoopbackCluster(folder, cpus)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Start a cluster and keep it until Ctrl-C."""
    if reason := why_not():
        sys.exit(f"no SLURM here: {reason}")
    with loopback_cluster() as cluster, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={cluster.config}\nCtrl-C stops it", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
