"""A Ray cluster, and how many copies of a bundle it holds."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.engine_record import TARGETS, folder
from ..models.errors import BackendError, RequestError

LOG = logging.getLogger(__name__)
AUTH = "RAY_AUTH_MODE"
TOKEN = Path("~/.ray/auth_token").expanduser()
REACH = 5.0  # seconds for a cluster to answer
GPU_DEVICES = ("cuda", *TARGETS)


@dataclass(frozen=True)
class Cluster:
    """Where copies run, and how many.

    ``address``: "local" (a new cluster of this machine, which ends with the command), "auto" (the one that runs here,
    else a new one) or HOST:PORT; ``least`` and ``most`` copies, None for as many as fit; ``cpus`` of each, None for all
    of a node.
    """

    address: str = "auto"
    least: int = 1
    most: int | None = None
    cpus: int | None = None


@dataclass(frozen=True)
class Fitted:
    """What of a cluster the copies take."""

    least: int
    most: int
    cpus: int  # of each
    gpus: int  # of each, 0 or 1

    @property
    def threads(self) -> int:
        """Of each graph on a CPU."""
        return self.cpus

    @property
    def resources(self) -> dict[str, Any]:
        """As Ray's actors take them."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}


@contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    """Joined to a cluster as long as the block runs. Raises BackendError where Ray is absent or no cluster answers."""
    if AUTH not in os.environ and TOKEN.exists() and cluster.address != "local":
        os.environ[AUTH] = "token"  # clusters that Ray starts ask for it
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what goes wrong raises, too
    try:
        import ray
    except ImportError as err:
        raise BackendError(
            f"{err.name} is not installed, expected for --ray; install it with: pip install 'ppexport[ray]'"
        ) from err
    wanted = None if cluster.address == "auto" else cluster.address
    _reach(cluster.address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(wanted, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except Exception as err:  # of many kinds
        raise BackendError(
            f"no Ray cluster answers at {cluster.address!r}: {str(err).splitlines()[0]}; expected 'local', 'auto', or "
            f"the HOST:PORT that 'ray start --head' told, and its token in {TOKEN} on this machine"
        ) from err
    finally:  # Ray sets some of its own
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise BackendError where nobody listens at HOST:PORT: Ray itself would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "local", "auto", or what Ray says itself
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH).close()
    except (OSError, OverflowError) as err:
        raise BackendError(
            f"no Ray cluster answers at {address!r}: {err}; expected the HOST:PORT that 'ray start --head' told"
        ) from err


def fitted(cluster: Cluster, bundle: str, device: str) -> Fitted:
    """How many copies of a bundle run on the cluster that is joined, and what each takes.

    A copy takes a GPU where its device is one; "auto" is one where the bundle has engines and the cluster has a GPU.
    Raises RequestError where not even one copy, or fewer than ``cluster.least``, would fit.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not nodes:
        raise RequestError(
            "no node of the Ray cluster has a CPU, expected one; start it without --num-cpus 0"
        )
    with_gpu = [node for node in nodes if node.get("GPU")]
    engines = any(folder(Path(bundle), target).is_dir() for target in TARGETS)
    gpus = int(device in GPU_DEVICES or (device == "auto" and engines and bool(with_gpu)))
    if gpus and not with_gpu:
        raise RequestError(f"no node of the Ray cluster has a GPU, expected one for the device {device}")
    able = with_gpu if gpus else nodes
    cpus = cluster.cpus or max(1, int(min(node["CPU"] / (node["GPU"] if gpus else 1) for node in able)))
    places = sum(int(min(node["CPU"] // cpus, node["GPU"] // gpus if gpus else node["CPU"])) for node in able)
    if not places or places < cluster.least:
        kind = f"{cpus} CPUs" + (" and a GPU" if gpus else "")
        raise RequestError(
            f"{cluster.least} copies of {kind} each do not fit: the Ray cluster has room for {places}, expected fewer "
            "--replicas or --cpus"
        )
    found = Fitted(cluster.least, cluster.most or max(places, cluster.least), cpus, gpus)
    LOG.info("cluster", extra={"fields": {"nodes": len(nodes), **vars(found)}})
    return found
