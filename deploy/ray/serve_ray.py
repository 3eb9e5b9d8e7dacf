"""jaxserve on a Ray cluster: one process per host makes a replica, and Ray Serve keeps the replicas.

    pip install 'jaxserve[ray]'
    python deploy/ray/serve_ray.py meta-llama/Llama-3.1-70B --hosts 2 --per-host GPU=8 -- --max-slots 64

Run it on a machine of the cluster (`ray start`); what stands after `--` goes to `jaxserve serve`. Serve's own
proxy listens on --port and hands each request to a replica; the replica hands it on to its process 0, streams
included.

A replica is a Serve actor with a placement group, a bundle on each host. It starts an actor in each bundle,
and that actor's process becomes `jaxserve serve --process-id i`: Ray sees a dead process as a dead actor.
Then the replica is unhealthy, Serve kills it with all of its actors, and starts another. For the seconds
until Serve has noticed, requests are told that the replica died (502, 503); after that they wait for the new
one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import ray
from ray import serve
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from jaxserve.server.body import read_body
from jaxserve.server.errors import ApiError, error_response
from jaxserve.server.stream import ClientLeft

HEALTH_SECONDS = 1.0  # between two looks at a replica; Serve gives it up after the third that fails
HOP_BY_HOP = {"connection", "content-length", "host", "keep-alive", "transfer-encoding", "upgrade"}


class Host:
    """One process of a replica. `run` does not come back: the process ends with the group."""

    def place(self) -> tuple[str, int, int]:
        """(this host's address, a free port for the coordinator, one for HTTP)"""
        with socket.socket() as first, socket.socket() as second:
            for probe in (first, second):
                probe.bind(("", 0))
            return ray.util.get_node_ip_address(), first.getsockname()[1], second.getsockname()[1]

    def run(self, arguments: list[str]) -> int:
        from jaxserve.cli.main import main

        return main(["serve", *arguments])


class Replica:
    """Starts the hosts' processes, says whether they live, and passes requests on to process 0."""

    def __init__(self, arguments: list[str], hosts: int, resources: dict[str, float]) -> None:
        self._arguments = arguments
        self._resources = dict(resources)
        self._hosts = hosts
        self._session: aiohttp.ClientSession | None = None
        self._running: list[ray.ObjectRef] = []
        self._url = ""
        self._warm = False
        self._start()

    def _start(self) -> None:
        group = ray.util.get_current_placement_group()
        own = dict(self._resources)
        options = {"num_cpus": own.pop("CPU", 1), "num_gpus": own.pop("GPU", 0), "resources": own}
        actors = [
            ray.remote(Host)
            .options(
                **options,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i),
            )
            .remote()
            for i in range(self._hosts)
        ]
        self._actors = actors  # while they are referred to they live, and no longer
        address, coordinator, port = ray.get(actors[0].place.remote())
        self._url = f"http://{address}:{port}"
        together = ["--coordinator", f"{address}:{coordinator}", "--processes", str(self._hosts)]
        for i, actor in enumerate(actors):
            own_flags = ["--process-id", str(i)]
            if i == 0:
                own_flags += ["--host", address, "--port", str(port)]
            self._running.append(actor.run.remote([*self._arguments, *together, *own_flags]))

    async def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        return self._session

    def _dead(self) -> str | None:
        """Which process ended, if one did."""
        ended, _ = ray.wait(self._running, timeout=0)
        return f"process {self._running.index(ended[0])} of {self._hosts} ended" if ended else None

    async def check_health(self) -> None:
        """Raises where Serve is to replace this replica."""
        if (dead := self._dead()) is not None:
            raise RuntimeError(dead)
        try:
            async with (await self._client()).get(f"{self._url}/health") as reply:
                if reply.status == 200:
                    return
                raise RuntimeError(f"process 0 says {reply.status}: {await reply.text()}")
        except aiohttp.ClientConnectorError:
            return  # its port is not bound yet, or it has just died: then Ray says so at the next look

    async def __call__(self, request: Request) -> Response:
        while not await self._ready():
            if (dead := self._dead()) is not None:
                return JSONResponse(_error(f"the replica died: {dead}"), status_code=503)
            await asyncio.sleep(0.2)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
        session = await self._client()
        target = f"{self._url}{request.url.path}" + (f"?{request.url.query}" if request.url.query else "")
        try:
            body = await read_body(request.scope, request.receive)
        except ApiError as error:  # process 0 would refuse it too
            return error_response(error)
        except ClientLeft:
            return Response(status_code=499)  # nobody reads it
        try:
            reply = await session.request(
                request.method, target, headers=headers, data=body, allow_redirects=False
            )
        except aiohttp.ClientError as error:
            return JSONResponse(_error(f"the replica died: {error}"), status_code=502)
        kept = {name: value for name, value in reply.headers.items() if name.lower() not in HOP_BY_HOP}
        streams = reply.headers.get("Content-Type", "").startswith("text/event-stream")
        return StreamingResponse(_body(reply, streams), status_code=reply.status, headers=kept)

    async def _ready(self) -> bool:
        if self._warm:
            return True
        try:
            async with (await self._client()).get(f"{self._url}/ready") as reply:
                self._warm = reply.status == 200
                return self._warm
        except aiohttp.ClientError:
            return False


async def _body(reply: aiohttp.ClientResponse, streams: bool) -> AsyncIterator[bytes]:
    """The reply's bytes as they come. A stream whose server dies ends with an error that clients can read."""
    async with reply:
        try:
            async for data in reply.content.iter_any():
                yield data
        except aiohttp.ClientError as error:
            if not streams:
                raise
            yield b"data: " + json.dumps(_error(f"the replica died: {error}")).encode() + b"\n\n"


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": "engine_failed"}}


def application(
    arguments: list[str],
    *,
    hosts: int,
    replicas: int = 1,
    resources: dict[str, float] | None = None,
    strategy: str = "STRICT_SPREAD",
    max_ongoing: int = 1024,
) -> serve.Application:
    """The Serve application. arguments: of `jaxserve serve`. resources: on each host, by Ray's names.

    strategy: STRICT_SPREAD takes `hosts` different hosts; STRICT_PACK one (to try it out).
    """
    each = {"CPU": 1.0} | (resources or {})
    first = each | {"CPU": each["CPU"] + 1}  # beside the replica's own actor
    bundles = [first, *([each] * (hosts - 1))]
    deployment = serve.deployment(
        Replica,
        name="jaxserve",
        num_replicas=replicas,
        max_ongoing_requests=max_ongoing,
        ray_actor_options={"num_cpus": 1},
        placement_group_bundles=bundles,
        placement_group_strategy=strategy,
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=10.0,
    )
    return deployment.bind(arguments, hosts, each)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="as for jaxserve serve; a path must exist on every host")
    parser.add_argument("--hosts", type=int, default=1, help="hosts of one replica")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--per-host", default="CPU=1", help="what a replica takes of a host: GPU=8, TPU=4")
    parser.add_argument(
        "--strategy", default="STRICT_SPREAD", choices=["STRICT_SPREAD", "SPREAD", "STRICT_PACK"]
    )
    parser.add_argument("--host", default="127.0.0.1", help="where Serve's proxy listens")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--address", default="auto", help="of the Ray cluster; local makes one here")
    own, flags = argv, []
    if "--" in argv:
        own, flags = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    options = parser.parse_args(own)
    options.flags = flags
    return options


def main(argv: list[str]) -> None:
    options = parse(argv)
    name, _, amount = options.per_host.partition("=")
    if options.hosts < 1 or not amount.replace(".", "", 1).isdigit():
        sys.exit("error: --hosts must be at least 1, and --per-host such as GPU=8")
    if options.address == "local":
        cpus = options.replicas * (options.hosts + 1)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False)
    else:
        ray.init(address=options.address)
    serve.start(http_options={"host": options.host, "port": options.port})
    arguments = ([options.model] if options.model else []) + options.flags
    serve.run(
        application(
            arguments,
            hosts=options.hosts,
            replicas=options.replicas,
            resources={name: float(amount)},
            strategy=options.strategy,
        ),
        blocking=True,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
