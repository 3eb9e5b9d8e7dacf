"""The channel between process 0 and the others: here between threads, over real sockets."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from sharding import channel as module
from sharding.channel import Channel, ChannelError, Kind

TOKEN = "secret"


class Heard(list[str]):
    """The failures that one end was told of."""

    def __call__(self, reason: str) -> None:
        self.append(reason)


class Ends:
    """Process 0's channel and those of the others, with what each heard."""

    def __init__(self, processes: int) -> None:
        self.heard = [Heard() for _ in range(processes)]
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
            made: list[Channel] = []
            waiting = threading.Thread(
                target=lambda: made.append(
                    Channel.listen(
                        listener,
                        processes,
                        token=TOKEN,
                        name="process 0",
                        seconds=10,
                        on_failure=self.heard[0],
                    )
                )
            )
            waiting.start()
            self.strangers = [socket.create_connection(("127.0.0.1", self.port)) for _ in range(4)]
            self.strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
            self.strangers[1].sendall(module._HEADER.pack(Kind.HELLO, 2**31))
            self.strangers[2].sendall(module._HEADER.pack(Kind.HELLO, 4000) + b"[" * 4000)
            self.strangers[3].sendall(module._HEADER.pack(Kind.HELLO, 2) + b"{}")
            self.followers = [self._join(process) for process in range(1, processes)]
            waiting.join()
        self.leader = made[0]

    def close(self) -> None:
        for end in (*self.followers, self.leader):
            end._closing.set()
            end.close()
        for stranger in self.strangers:
            stranger.close()

    def _join(self, process: int) -> Channel:
        return Channel.connect(
            "127.0.0.1",
            self.port,
            process,
            token=TOKEN,
            name=f"process {process}",
            leader="process 0",
            seconds=10,
            on_failure=self.heard[process],
        )


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends(3)
    yield ends
    ends.close()


def eventually(condition: object) -> None:
    deadline = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_everyone_gets_everything_in_order(ends: Ends) -> None:
    """Strangers that connected first were sent away; frames of any size, the empty one too."""
    sent = [b"", b"one", bytes(range(256)) * 4096, b"last"]
    for frame in sent:
        ends.leader.send(frame)
    for follower in ends.followers:
        assert [follower.receive() for _ in sent] == sent
    for stranger in ends.strangers:
        stranger.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""


def test_a_wrong_token_is_not_let_in() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        intruder = Channel.connect(
            "127.0.0.1",
            listener.getsockname()[1],
            1,
            token="guessed",
            name="process 1",
            leader="process 0",
            seconds=5,
            on_failure=lambda reason: None,
        )
        with pytest.raises(ChannelError, match=r"no connection from process \[1\] within"):
            Channel.listen(listener, 2, token=TOKEN, name="process 0", seconds=0.5, on_failure=print)
    with pytest.raises(ChannelError, match="process 0 is gone"):
        intruder.receive()
    intruder.close()


class Dripping(threading.Thread):
    """A stranger that sends a byte of its greeting at a time, 2 s long, unless it is `sent_away` before."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.sent_away = False
        self._socket = socket.create_connection(("127.0.0.1", port))
        self.start()

    def run(self) -> None:
        with self._socket:
            try:
                for byte in module._HEADER.pack(Kind.HELLO, 4000) + b"{" * 35:
                    self._socket.send(bytes([byte]))
                    time.sleep(0.05)
            except OSError:
                self.sent_away = True


def test_one_that_speaks_slowly_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELLO_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        stranger = Dripping(port)
        own = {"token": TOKEN, "seconds": 10, "on_failure": print}
        follower = Channel.connect("127.0.0.1", port, 1, name="process 1", leader="process 0", **own)
        leader = Channel.listen(listener, 2, name="process 0", **own)
    stranger.join()
    leader._closing.set()
    follower.close()
    leader.close()
    assert stranger.sent_away


def test_one_that_speaks_slowly_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its greeting has more time than `listen` has left."""
    monkeypatch.setattr(module, "HELLO_SECONDS", 600)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stranger = Dripping(listener.getsockname()[1])
        with pytest.raises(ChannelError, match=r"no connection from process \[1\] within"):
            Channel.listen(listener, 2, token=TOKEN, name="process 0", seconds=0.3, on_failure=print)
    stranger.join()
    assert stranger.sent_away


def test_one_that_dies_ends_the_group_and_everyone_hears_who(ends: Ends) -> None:
    ends.followers[0]._links[0].close()  # as the kernel does for a process that is killed
    eventually(lambda: ends.heard[0] and ends.heard[2])
    assert ends.leader.failure is not None and ends.leader.failure.startswith("process 1 is gone: ")
    assert ends.heard[0] == ends.heard[2] == [ends.leader.failure]
    with pytest.raises(ChannelError, match="process 1 is gone"):
        ends.leader.send(b"more")
    with pytest.raises(ChannelError, match="process 1 is gone"):
        ends.followers[1].receive()
    error = ends.leader.explain(ValueError("a collective failed"))
    assert isinstance(error, ChannelError) and "process 1 is gone" in str(error)


def test_an_error_that_is_nobodys_death_stays_what_it_is(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FAREWELL_SECONDS", 0.05)
    error = ValueError("mine")
    assert ends.leader.explain(error) is error


def test_one_that_ends_says_why(ends: Ends) -> None:
    ends.followers[1].abandon("no such folder")
    eventually(lambda: ends.heard[0] and ends.heard[1])
    assert ends.leader.failure == ends.followers[0].failure == "process 2 ended: no such folder"
    assert ends.heard[2] == []


def test_silence_is_death(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer whose host vanished sends nothing, not even the end of its connection."""
    monkeypatch.setattr(module, "SILENCE_SECONDS", 0.6)
    monkeypatch.setattr(module, "START_SILENCE_SECONDS", 0.6)
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    ends = Ends(2)
    time.sleep(1.5)
    assert ends.leader.failure is None and ends.followers[0].failure is None  # they beat
    ends.followers[0]._closing.set()  # it beats no more
    eventually(lambda: ends.heard[0])
    assert ends.heard[0] == ["process 1 is gone: nothing heard from it for 1 s"]
    ends.close()


def test_silence_counts_from_before_it_was_watched_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that hangs just then has sent the last thing that this end waited for."""
    monkeypatch.setattr(module, "START_SILENCE_SECONDS", 600)
    monkeypatch.setattr(module, "SILENCE_SECONDS", 0.6)
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    ends = Ends(2)
    ends.followers[0]._closing.set()  # it beats no more
    time.sleep(0.3)
    ends.leader.watch_closely()
    eventually(lambda: ends.heard[0])
    assert ends.heard[0] == ["process 1 is gone: nothing heard from it for 1 s"]
    ends.close()


def test_stop_and_close(ends: Ends) -> None:
    ends.followers[0].request_stop()
    eventually(lambda: ends.leader.stop_requested)
    ends.leader.send(b"the last")
    closing = threading.Thread(target=ends.leader.close)
    closing.start()
    for follower in ends.followers:
        assert follower.receive() == b"the last" and follower.receive() is None
        follower.close()
    closing.join(10)
    assert not closing.is_alive()
    assert ends.leader.failure is None and not any(ends.heard)
