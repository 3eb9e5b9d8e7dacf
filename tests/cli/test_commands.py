"""The commands as processes, with the fake engine: what goes to stdout and stderr, exit codes, signals."""

from __future__ import annotations

import contextlib
import re
import shlex
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.cli.harness import ROOT, command, environment, jaxserve


class Process:
    """A running command whose stderr can be waited for."""

    def __init__(self, *args: str, piped: bool = False, **variables: str) -> None:
        self.popen = subprocess.Popen(
            command(*args),
            cwd=ROOT,
            env=environment(**variables),
            stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []

    def until(self, pattern: str) -> str:
        """The first line of stderr that matches; fails when the process ends without one."""
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.lines.append(line.rstrip("\n"))
            if re.search(pattern, line):
                return line.rstrip("\n")
        raise AssertionError("\n".join(self.lines))

    def end(self, number: int | None = None) -> int:
        if number is not None:
            self.popen.send_signal(number)
        code = self.popen.wait(20)
        assert self.popen.stderr is not None
        self.lines += self.popen.stderr.read().splitlines()
        return code


@contextlib.contextmanager
def running(*args: str, piped: bool = False, **variables: str) -> Iterator[Process]:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # pytest runs behind a shell's `&`: it is inherited
        signal.signal(signal.SIGINT, signal.default_int_handler)
    process = Process(*args, piped=piped, **variables)
    guard = threading.Timer(40, process.popen.kill)  # a test that hangs fails instead
    guard.start()
    try:
        yield process
    finally:
        guard.cancel()
        process.popen.kill()
        process.popen.wait()
        for pipe in (process.popen.stdin, process.popen.stdout, process.popen.stderr):
            if pipe is not None:
                pipe.close()


def test_serve_speaks_and_stops() -> None:
    with running("serve", "some/folder", "--port", "0", "--max-slots", "3") as process:
        address = process.until("listening on").split()[-1]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address)
        assert process.until("loading") == "loading some/folder"
        assert process.until("ready") == f"ready: folder at {address}/v1"
        assert process.until("slots") == (
            "  3 slots, page pool of 4,096 tokens (256 pages of 16), context 256 tokens,"
            " 1,000 tokens/s measured"
        )
        curl = process.until("curl").strip()
        done = subprocess.run(shlex.split(curl), capture_output=True, text=True, timeout=20, check=True)
        assert done.stdout.startswith("data: ")
        assert done.stdout.endswith("data: [DONE]\n\n")
        assert process.end(signal.SIGTERM) == 0
        assert process.lines[-1] == "stopped"
        assert process.popen.stdout is not None
        assert process.popen.stdout.read() == ""  # progress is no result


def test_serve_ends_a_stream_on_ctrl_c() -> None:
    with running("serve", "--port", "0", DELAY="0.02") as process:
        address = process.until("listening on").split()[-1]
        process.until("ready")
        fields = {"model": "embedded", "prompt": "a", "max_tokens": 50, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=fields, timeout=20) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.popen.send_signal(signal.SIGINT)
            assert list(lines)[-2:] == ["data: [DONE]", ""]  # it had one second left, and got it
        assert process.end() == 0


def test_serve_answers_health_while_loading_and_can_be_stopped() -> None:
    with running("serve", "--port", "0", JAXSERVE_TEST_BUILD="hang") as process:
        address = process.until("listening on").split()[-1]
        process.until("loading")
        assert httpx.get(f"{address}/health").status_code == 200
        assert httpx.get(f"{address}/ready").status_code == 503
        assert process.end(signal.SIGTERM) == 0


def test_serve_fails_with_the_reason() -> None:
    done = jaxserve("serve", "--host", "0.0.0.0", "--port", "0", JAXSERVE_TEST_BUILD="fail")
    assert done.returncode == 1
    assert "error: config.json: architectures=['Nonsense'] is not supported" in done.stderr
    assert "Traceback" not in done.stderr  # it is the user's matter, not ours
    assert "warning: anyone who can reach 0.0.0.0 can use this server: set --api-key" in done.stderr
    done = jaxserve("serve", "--port", "0", JAXSERVE_TEST_BUILD="crash")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "warning" not in done.stderr


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = jaxserve("serve", f"--port={port}")
    assert done.returncode == 1
    assert done.stderr == f"error: port {port} on 127.0.0.1 is in use: choose another with --port\n"


def test_keys_from_the_environment_are_not_shown() -> None:
    with running("serve", "--host=0.0.0.0", "--port=0", JAXSERVE_API_KEY="top-secret") as process:
        address = process.until("listening on").split()[-1]
        assert '-H "Authorization: Bearer $JAXSERVE_API_KEY"' in process.until("curl")
        assert httpx.get(f"{address}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer top-secret"}
        assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 200
        assert process.end(signal.SIGTERM) == 0
        said = "\n".join(process.lines)
        assert "top-secret" not in said
        assert "warning" not in said  # beyond loopback, but with a key


def test_a_key_file_without_a_key_is_wrong_use(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n")
    done = jaxserve("serve", "--port", "0", "--api-key-file", f"{tmp_path}/keys")
    assert (done.returncode, done.stderr) == (2, f"error: --api-key-file={tmp_path}/keys holds no key\n")


def test_served_model_name() -> None:
    with running("serve", "--port=0", "--served-model-name", "org/mine") as process:
        address = process.until("listening on").split()[-1]
        process.until("ready: org/mine")
        assert httpx.get(f"{address}/v1/models/org/mine").json()["id"] == "org/mine"


def test_the_default_tier_and_the_engines_options_reach_the_server() -> None:
    flags = ("--service-tier=flex", "--reproducible", "--max-queued=1", "--max-slots=1")
    with running("serve", "--port=0", *flags, DELAY="0.01") as process:
        address = process.until("listening on").split()[-1]
        process.until("ready")
        fields = {"model": "embedded", "prompt": "a", "max_tokens": 1}
        reply = httpx.post(f"{address}/v1/completions", json=fields).json()
        assert reply["service_tier"] == "flex"
        fields |= {"prompt": ["a"] * 9, "max_tokens": 50}
        streamed = fields | {"stream": True}  # nobody waits, so all nine are taken: one runs, eight wait
        with httpx.stream("POST", f"{address}/v1/completions", json=streamed, timeout=20) as first:
            assert first.status_code == 200
            assert httpx.post(f"{address}/v1/completions", json=fields, timeout=20).status_code == 429


def test_dry_run() -> None:
    done = jaxserve("serve", "m", "--dry-run", "--max-slots", "2")
    assert (done.returncode, done.stdout) == (0, "m: 2 slots\n")
    assert done.stderr == "reading the config\n"
    done = jaxserve("serve", "m", "--dry-run", JAXSERVE_TEST_BUILD="fail")
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: the weights do not fit" in done.stderr


def test_generate() -> None:
    done = jaxserve("generate", "--prompt", "a", "--max-tokens", "5")
    assert (done.returncode, done.stdout) == (0, "bcdef\n")
    assert done.stderr == "loading None\n"
    done = jaxserve("generate", "m", "--prompt", "a", "--stop", "zz", "--stop", "e", "--temperature", "0")
    assert done.stdout == "bcd\n"


def test_generate_fails() -> None:
    done = jaxserve("generate")
    assert done.returncode == 2
    assert "--prompt is needed" in done.stderr
    done = jaxserve("generate", "--prompt", "a" * 300)
    assert (done.returncode, done.stdout) == (1, "")
    assert "the prompt has 300 tokens" in done.stderr
    done = jaxserve("generate", "--prompt", "a", JAXSERVE_TEST_BUILD="fail")
    assert done.returncode == 1
    assert "error: config.json" in done.stderr


def test_chat_with_piped_input() -> None:
    done = jaxserve("chat", "--max-tokens", "3", "--system", "be brief", stdin="a\n\n5\n")
    assert (done.returncode, done.stdout) == (0, "bcd\n678\n")
    assert done.stderr == "loading None\n"


def test_ctrl_c_stops_a_reply_and_not_the_chat() -> None:
    with running("chat", "--max-tokens", "200", piped=True, DELAY="0.1") as process:
        assert process.popen.stdin is not None
        assert process.popen.stdout is not None
        process.popen.stdin.write("a\n")
        process.popen.stdin.flush()
        said = process.popen.stdout.read(3)
        assert said == "bcd"
        process.popen.send_signal(signal.SIGINT)
        said += process.popen.stdout.readline()
        assert said.startswith("bcd")
        assert len(said) < 150  # 200 tokens were asked for
        process.popen.stdin.write("Z\n")
        process.popen.stdin.flush()
        assert process.popen.stdout.readline() == "\n"  # the end token alone
        process.popen.stdin.close()
        assert process.end() == 0


def test_chat_goes_on_after_a_message_that_is_too_long() -> None:
    done = jaxserve("chat", "--max-tokens", "3", stdin="a" * 300 + "\n5\n")
    assert (done.returncode, done.stdout) == (1, "678\n")
    assert "error: the prompt has 302 tokens" in done.stderr


def test_chat_needs_a_template() -> None:
    done = jaxserve("chat", stdin="a\n", JAXSERVE_TEST_BUILD="no-template")
    assert done.returncode == 1
    assert "no chat template" in done.stderr
