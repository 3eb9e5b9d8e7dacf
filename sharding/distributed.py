"""Several processes that are one replica: a `jax.distributed` group with a channel from process 0.

Process 0 decides what runs, and the others run it with it. Start-up needs one more thing, that all say the
same of model, options and memory: `exchange` and `agree`. The group is whole or gone; nothing here restarts
it.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

from sharding.channel import Channel, ChannelError

JOIN_SECONDS = 300.0  # for every process to come
EXCHANGE_SECONDS = 3600.0  # between the first and the last process to get somewhere while loading


class GroupError(RuntimeError):
    """The group did not come together, or its processes differ."""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """coordinator: HOST:PORT of process 0, as all reach it. process: this one, 0 .. processes - 1."""

    coordinator: str
    processes: int
    process: int

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"coordinator={self.coordinator!r} must be HOST:PORT of process 0")
        if self.processes < 1:
            raise ValueError(f"processes={self.processes} must be at least 1")
        if not 0 <= self.process < self.processes:
            raise ValueError(f"process-id={self.process} must lie in [0, {self.processes - 1}]")

    @property
    def host(self) -> str:
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def leads(self) -> bool:
        return self.process == 0

    def name(self, process: int) -> str:
        return f"process {process} of {self.processes}"


class Group:
    """This process's place in the group, to be started before jax is used for anything else.

    on_failure: called, on any thread, when a process is gone and the group with it; `failure` says why.
    """

    def __init__(self, place: Place, on_failure: Callable[[str], None] = lambda reason: None) -> None:
        self.place = place
        self._listeners = [on_failure]
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._never_met: str | None = None
        self._exchanged = 0

    def start(self) -> None:
        """Joins. Where not all have come within JOIN_SECONDS the group has failed; raises GroupError for what
        is wrong otherwise."""
        import jax

        place = self.place
        # on loopback nobody else is to reach it; otherwise jax listens on every address
        bind = place.coordinator if _is_loopback(place.host) else None
        jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM in our place
        late = threading.Timer(JOIN_SECONDS, self._late)  # jax would abort the process with a stack trace
        late.daemon = True
        late.start()
        try:
            jax.distributed.initialize(
                place.coordinator,
                place.processes,
                place.process,
                initialization_timeout=int(2 * JOIN_SECONDS),
                coordinator_bind_address=bind,
            )
        except RuntimeError as error:
            raise GroupError(f"--coordinator={place.coordinator}: {error}") from error
        finally:
            late.cancel()
        own = f"{place.name(place.process)} ({socket.gethostname()})"
        try:
            self._channel = self._lead(own) if place.leads else self._join(own)
        except ChannelError as error:
            raise GroupError(str(error)) from error

    def _lead(self, name: str) -> Channel:
        token = secrets.token_hex(32)
        family, address = _listening_address(self.place.host)
        with socket.create_server((address, 0), family=family) as listener:
            facts = {"port": listener.getsockname()[1], "token": token, "name": name}
            _store().key_value_set("jaxserve/channel", json.dumps(facts))
            return Channel.listen(
                listener,
                self.place.processes,
                token=token,
                name=name,
                seconds=JOIN_SECONDS,
                on_failure=self._failed,
            )

    def _join(self, name: str) -> Channel:
        facts = json.loads(_store().blocking_key_value_get("jaxserve/channel", int(JOIN_SECONDS * 1e3)))
        return Channel.connect(
            self.place.host,
            facts["port"],
            self.place.process,
            token=facts["token"],
            name=name,
            leader=facts["name"],
            seconds=JOIN_SECONDS,
            on_failure=self._failed,
        )

    # -- agreeing --------------------------------------------------------------------------------------

    def exchange(self, value: Any) -> list[Any]:
        """Everybody's `value`, which must be JSON, by process. All processes call it, equally often."""
        key = f"jaxserve/exchange/{self._exchanged}"
        self._exchanged += 1
        store = _store()
        store.key_value_set(f"{key}/{self.place.process}", json.dumps(value))
        wait = int(EXCHANGE_SECONDS * 1e3)
        return [
            json.loads(store.blocking_key_value_get(f"{key}/{process}", wait))
            for process in range(self.place.processes)
        ]

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raises GroupError naming what is not the same everywhere."""
        leading, *others = self.exchange(dict(facts))
        for process, theirs in enumerate(others, 1):
            for name, value in leading.items():
                if theirs.get(name) != value:
                    raise GroupError(
                        f"the processes of a group must be started alike: {name} is {value!r} on process 0"
                        f" and {theirs.get(name)!r} on process {process}"
                    )

    def processes_here(self) -> int:
        """Processes of the group on this host."""
        return self.exchange(socket.gethostname()).count(socket.gethostname())

    # -- running together ------------------------------------------------------------------------------

    @property
    def channel(self) -> Channel:
        """Raises GroupError before `start`."""
        if self._channel is None:
            raise GroupError("the group has not started")
        return self._channel

    @property
    def failure(self) -> str | None:
        return self._never_met if self._channel is None else self._channel.failure

    @property
    def stop_requested(self) -> bool:
        return self._channel is not None and self._channel.stop_requested

    def on_failure(self, listener: Callable[[str], None]) -> None:
        """Calls `listener` with the failure when there is one, at once if there is one already, or twice."""
        with self._lock:
            self._listeners.append(listener)
            reason = self.failure
        if reason is not None:
            listener(reason)

    def _late(self) -> None:
        self._never_met = (
            f"not all {self.place.processes} processes came to --coordinator={self.place.coordinator} within"
            f" {JOIN_SECONDS:.0f} s"
        )
        self._failed(self._never_met)

    def _failed(self, reason: str) -> None:
        with self._lock:
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener(reason)

    def abandon(self, reason: str) -> None:
        """Tells the others that this process ends, and why."""
        if self._channel is not None:
            self._channel.abandon(reason)

    def request_stop(self) -> None:
        """Asks process 0 to end the work in good order."""
        if self._channel is not None:
            self._channel.request_stop()

    def close(self) -> None:
        """The work is done: process 0 lets the others go and waits for them."""
        if self._channel is not None:
            self._channel.close()


def _store() -> Any:
    """The group's key-value store, which jax has no public name for."""
    from jax._src import distributed

    return distributed.global_state.client


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _listening_address(host: str) -> tuple[socket.AddressFamily, str]:
    """Where process 0 listens: this machine alone where all run on it, else every address."""
    family, _, _, _, (address, *_) = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    if _is_loopback(host):
        return family, str(address)
    return family, "::" if family is socket.AF_INET6 else "0.0.0.0"
