"""``ppexport serve --ray``: the same app as ``ppexport serve``, as a deployment of Ray Serve."""

from __future__ import annotations

import logging
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..models.errors import BackendError, RequestError
from ..runtime.bundle import open_bundle
from ..server.serve import Address, Setup, listening
from .connect import Cluster, Fitted, connected, fitted

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

NAME = "ppexport"
BESIDE = 16  # requests of a copy at once that are no chats: health, the page, pictures that are looked at
HEALTH = 10.0  # seconds between two checks of a copy


def serve(
    setup: Setup, address: Address, cluster: Cluster, ready: Callable[[str], None] = lambda url: None
) -> None:
    """Answer requests with copies of a bundle until SIGTERM or SIGINT; then those inside have time to end.

    The bundle is at the same path on every node. ``ready`` is told the URL. Raises BundleError, BackendError,
    RequestError.
    """
    setup = replace(setup, bundle=str(Path(setup.bundle).resolve()))
    open_bundle(setup.bundle)
    told = threading.Event()
    with connected(cluster):
        from ray import serve as ray_serve

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        copies = fitted(cluster, setup.bundle, setup.device)
        before = ray_serve.status()
        if before.applications:
            raise RequestError(
                f"Ray Serve runs {', '.join(before.applications)} on this cluster, expected none: end it "
                "with 'serve shutdown', or name another cluster"
            )
        ours = not before.proxies  # then it ends with this command, else it keeps its address
        if ours:
            with listening(address) as listener:  # free, or said now
                address = replace(address, port=listener.getsockname()[1])
            ray_serve.start("EveryNode", {"host": address.host, "port": address.port})
        try:
            ray_serve.run(application(setup, copies), name=NAME, route_prefix="/")
            _check(address)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: told.set())
            ready(address.url)
            told.wait()
        except RuntimeError as err:
            reason = next((app.message for app in ray_serve.status().applications.values()), str(err))
            raise BackendError(f"no copy of {setup.bundle} came up on the Ray cluster: {reason}") from err
        finally:
            ray_serve.delete(NAME)
            if ours:
                ray_serve.shutdown()


def application(setup: Setup, copies: Fitted) -> Application:
    """The deployment: as many copies as requests want, each with an engine of its own."""
    from ray import serve as ray_serve

    def build() -> FastAPI:
        from .metrics import RayMetrics

        service = setup.open(copies.threads, RayMetrics())
        service.start()
        app = setup.app(service)
        app.state.service = service
        return app

    @ray_serve.ingress(build)
    class Copy:
        """One copy; Ray starts another one where it is not healthy."""

        app: FastAPI

        async def check_health(self) -> None:
            service = self.app.state.service
            if service.state != "ready":
                raise RuntimeError(f"the copy is {service.state}")
            await service.gauge()

    limits = setup.limits
    return ray_serve.deployment(
        name=NAME,
        ray_actor_options=copies.resources,
        max_ongoing_requests=limits.slots + limits.queue + BESIDE,
        autoscaling_config={
            "min_replicas": copies.least,
            "max_replicas": copies.most,
            "target_ongoing_requests": limits.slots,
        },
        graceful_shutdown_timeout_s=setup.drain_seconds,
        health_check_period_s=HEALTH,
        logging_config={"enable_access_log": False},
    )(Copy).bind()


def _check(address: Address) -> None:
    """Raises BackendError where nobody answers there: Ray Serve keeps the address that it was started with."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
    url = f"{replace(address, host=host).url}/health"
    for _ in range(50):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError as err:
            last = err
            time.sleep(0.2)
    raise BackendError(
        f"the copies run, but {url} does not answer ({last}); where Ray Serve ran before, it keeps its address: "
        "end it with 'serve shutdown', or name its --host and --port"
    )
