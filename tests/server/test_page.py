"""The page at `/`: its files and `/state` over HTTP, and the whole of it in a headless Chromium."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from jaxserve.scheduler.types import SlotView, Status, Tier
from jaxserve.server.api import page as files
from tests.server.fakes import FakeEngine
from tests.server.harness import MODEL, Serve, Served, until

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
expect = sync_api.expect

NAMES = ("chromium", "chromium-browser", "google-chrome")
LONG = {"model": MODEL, "prompt": "a", "max_tokens": 250}


# --- files ---


def test_the_files_need_no_key_and_let_a_browser_do_little(serve: Serve) -> None:
    served = serve(FakeEngine(), keys=["secret"])
    for path, name in files.PATHS.items():
        reply = served.http.get(path)
        assert reply.status_code == 200
        assert reply.content == (files.FOLDER / name).read_bytes()
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cache-control"] == "no-cache"
        policy = reply.headers["content-security-policy"]
        directives = dict(part.split(" ", 1) for part in policy.split("; "))
        assert (directives["default-src"], directives["script-src"]) == ("'none'", "'self'")
        assert "unsafe" not in policy
        for known in (reply.headers["etag"], f'"other", W/{reply.headers["etag"]}', "*"):
            again = served.http.get(path, headers={"If-None-Match": known})
            assert (again.status_code, again.content) == (304, b"")
        assert served.http.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
        assert served.http.head(path).status_code == 200
        assert served.http.post(path).status_code == 401


def test_the_page_asks_for_nothing_from_elsewhere_and_makes_no_markup_of_text() -> None:
    assert {path.name for path in files.FOLDER.iterdir()} == {"index.html", *files.FILES}
    document = (files.FOLDER / "index.html").read_text(encoding="utf-8")
    assert set(re.findall(r'(?:src|href)="([^"]*)"', document)) <= set(files.PATHS)
    assert not re.search(r"<style|\bon\w+=|style=|<script>", document)
    for name in files.FILES:
        text = (files.FOLDER / name).read_text(encoding="utf-8")
        imported = re.findall(r'from "([^"]*)"', text)
        assert {f"/page/{one.removeprefix('./')}" for one in imported} <= set(files.PATHS)
        assert "://" not in text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text)


@pytest.mark.parametrize(
    "path",
    [
        *("/page", "/page/", "/page/index.html", "/page/../api/page.py", "/page/%2e%2e/app.py", "//"),
        *("/page//style.css", "/page/style.css/", "/page/style.css%00", "/page/STYLE.CSS", "/index.html"),
    ],
)
def test_no_other_file_is_served(serve: Serve, path: str) -> None:
    """Asked for byte by byte, since a client would tidy the path up."""
    served = serve(FakeEngine(), keys=["secret"])
    for header, status in (("", b"401"), ("Authorization: Bearer secret\r\n", b"404")):
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n{header}\r\n".encode())
            assert connection.recv(12) == b"HTTP/1.1 " + status


# --- /state ---


def test_state(serve: Serve) -> None:
    served = serve(FakeEngine(slots=2, delay=0.01))
    idle = served.http.get("/state").json()
    assert (idle["status"], idle["model"], idle["chat"]) == ("ready", MODEL, True)
    assert idle["slots"] == {"total": 2, "held": []}
    assert idle["pages"]["used"] + idle["pages"]["cached"] + idle["pages"]["free"] == idle["pages"]["total"]
    connections = [served.connect("/v1/completions", orjson.dumps(LONG)) for _ in range(3)]
    until(lambda: served.engine.stats()["waiting"] == 1)
    time.sleep(0.1)
    busy = served.http.get("/state").json()
    assert [one["slot"] for one in busy["slots"]["held"]] == [0, 1]
    first = busy["slots"]["held"][0]
    assert first["request"] == served.engine.requests[0].request_id
    assert (first["state"], first["tier"], first["prompt"], first["mine"]) == ("decode", "default", 1, False)
    assert busy["queue"]["waiting"] == 1 and busy["queue"]["running"] == 2
    assert busy["totals"]["generated_tokens"] > 2
    for name, least in (("ttft", 2), ("itl", 3)):
        histogram = busy["latency"][name]
        assert histogram["counts"][-1] >= least and histogram["sum"] > 0
        assert histogram["bounds"][-1] is None and len(histogram["bounds"]) == len(histogram["counts"])
    assert busy["seconds"] > idle["seconds"]
    for connection in connections:
        connection.close()
    served.as_new()


def test_state_while_loading_and_when_dead(serve: Serve) -> None:
    served = serve(None)
    assert served.http.get("/state").json()["status"] == "loading"
    engine = FakeEngine()
    served.load(engine)
    engine.fail_next = RuntimeError("out of memory")
    served.completion()
    state = served.http.get("/state").json()
    assert state["status"] == "failed" and "out of memory" in state["message"]


def test_another_keys_request_ids_are_not_shown(serve: Serve) -> None:
    served = serve(FakeEngine(delay=0.01), keys=["ann", "bob"])
    assert served.http.get("/state").status_code == 401
    body = orjson.dumps(LONG)
    head = f"Host: x\r\nAuthorization: Bearer ann\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=10)
    connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}".encode() + body)
    until(lambda: served.engine.stats()["running"] == 1)
    request_id = served.engine.requests[0].request_id

    def shown(*mine: str) -> dict[str, Any]:
        reply = served.http.get("/state", params={"mine": mine}, headers={"Authorization": "Bearer bob"})
        return reply.json()["slots"]["held"][0]

    hidden = shown()["request"]
    assert re.fullmatch(r"[0-9a-f]{8}", hidden)
    prefix, _, number = request_id.rpartition("-")
    kind, _, digits = prefix.partition("-")
    # neither what all ids begin with nor a part of one opens it
    for guess in ("", kind, "cmpl", "chatcmpl", digits, prefix[:-1], request_id[:-1], "-", number):
        assert shown(guess) | {"generated": 0} == shown() | {"generated": 0}, guess
    assert (shown(prefix)["request"], shown(prefix)["mine"]) == (request_id, True)
    assert shown(request_id)["request"] == request_id
    connection.close()


# --- in the browser ---


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    with sync_api.sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium's needs a user who is not root
        one = playwright.chromium.launch(executable_path=path, args=sandbox)
        yield one
        one.close()


class Tab:
    """The page, opened, and what it complained of."""

    def __init__(self, browser: Any, served: Served, **options: Any) -> None:
        self.context = browser.new_context(**({"viewport": {"width": 1400, "height": 900}} | options))
        self.context.set_default_timeout(10_000)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._said)
        self.page.goto(served.url)

    def _said(self, message: Any) -> None:
        # that an answer was a 401 is said by the browser itself
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def send(self, text: str, **fields: object) -> None:
        for name, value in fields.items():
            self.page.fill(f"#{name}", str(value))
        self.page.fill("#prompt", text)
        self.page.keyboard.press("Control+Enter")

    def answer(self, *chunks: dict[str, Any], closing: tuple[str, ...] = ("[DONE]",)) -> None:
        """What the next chats are answered with, without the server; lines end in all of the ways."""
        ends = itertools.cycle(["\n\n", "\r\n\r\n", "\r\r"])
        data = [*(orjson.dumps(one).decode() for one in chunks), *closing]
        body = ": a comment\n\n" + "".join(f"data: {one}{end}" for one, end in zip(data, ends, strict=False))
        headers = {"Content-Type": "text/event-stream"}
        self.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, headers=headers))

    def reply(self) -> Any:
        """The text of the last reply, once it has ended."""
        expect(self.page.locator("#send")).to_be_enabled()
        return self.page.locator(".assistant .tokens").last


def chunk(delta: dict[str, Any], **logprobs: Any) -> dict[str, Any]:
    return {"id": "x", "choices": [{"index": 0, "delta": delta, "logprobs": logprobs or None}]}


@pytest.fixture
def open_tab(browser: Any) -> Iterator[Any]:
    tabs: list[Tab] = []

    def start(served: Served, **options: Any) -> Tab:
        tabs.append(Tab(browser, served, **options))
        return tabs[-1]

    yield start
    for tab in tabs:
        tab.context.close()
        assert tab.errors == []


def test_a_conversation(serve: Serve, open_tab: Any) -> None:
    served = serve(FakeEngine(slots=2))
    tab = open_tab(served)
    tab.send("x", max_tokens=4, temperature=0.5, top_k=7, seed=3, stop="zz\\n", system="be brief")
    expect(tab.reply()).to_have_text("yzab")
    expect(tab.page.locator(".assistant .figures")).to_contain_text("4 out")
    expect(tab.page.locator(".assistant .figures")).to_contain_text("finish: length")
    expect(tab.page.locator("#live")).to_have_text("Reply: yzab")
    expect(tab.page.locator("#model")).to_have_text(MODEL)
    params = served.engine.requests[0].params
    assert (params.temperature, params.top_k, params.seed, params.stop) == (0.5, 7, 3, ("zz\n",))
    first = served.engine.tokenizer.decode(served.engine.requests[0].prompt_token_ids.tolist())  # type: ignore[union-attr]
    assert first == "be briefx"
    tab.send("1")
    expect(tab.reply()).to_have_text("2345")
    second = served.engine.tokenizer.decode(served.engine.requests[1].prompt_token_ids.tolist())  # type: ignore[union-attr]
    assert second == "be briefxyzab1"  # the conversation so far
    tab.page.click("#clear")
    expect(tab.page.locator(".turn")).to_have_count(0)
    served.as_new()


def test_clear_while_a_reply_streams(serve: Serve, open_tab: Any) -> None:
    """What was cleared is not sent with what comes next."""
    served = serve(FakeEngine(delay=0.02))
    tab = open_tab(served)
    tab.send("a", max_tokens=200)
    expect(tab.page.locator(".assistant .tokens")).to_contain_text("bcd")
    tab.page.click("#clear")
    expect(tab.page.locator("#send")).to_be_enabled()
    for prompt, text in (("1", "23"), ("x", "yz")):
        tab.send(prompt, max_tokens=2)
        expect(tab.page.locator(".assistant .figures").last).to_be_visible()
        expect(tab.reply()).to_have_text(text)
    decode = served.engine.tokenizer.decode  # type: ignore[union-attr]
    sent = [decode(one.prompt_token_ids.tolist()) for one in served.engine.requests]
    assert sent[1:] == ["1", "123x"]


def test_numbers_between_the_steps_of_a_field(serve: Serve, open_tab: Any) -> None:
    served = serve(FakeEngine())
    tab = open_tab(served)
    fields = {"temperature": 0.33, "top_p": 0.995, "min_p": 0.005, "presence_penalty": 0.25}
    fields |= {"frequency_penalty": -0.125, "repetition_penalty": 1.08}
    tab.send("a", max_tokens=2, **fields)
    expect(tab.page.locator(".assistant .figures")).to_be_visible()
    params = served.engine.requests[0].params
    assert {name: getattr(params, name) for name in fields} == pytest.approx(fields)
    tab.send("a", temperature=2.5)  # what cannot be is still refused here
    expect(tab.page.locator("#error")).to_contain_text("temperature:")
    assert len(served.engine.requests) == 1


def test_streams_shows_its_slot_and_stops(serve: Serve, open_tab: Any) -> None:
    engine = FakeEngine(slots=4, delay=0.02)
    served = serve(engine)
    tab = open_tab(served)
    other = served.connect("/v1/completions", orjson.dumps({**LONG, "service_tier": "flex"}))
    until(lambda: engine.stats()["running"] == 1)
    rows = tab.page.locator("#slots tbody tr")
    stops = (lambda: tab.page.click("#stop-button"), lambda: tab.page.keyboard.press("Escape"))
    for turn, stop in enumerate(stops, start=1):
        tab.send("a", max_tokens=150)
        expect(tab.page.locator(".assistant .tokens").last).to_contain_text("bcdefgh")
        assert engine.stats()["running"] == 2  # it is shown while it comes
        expect(rows).to_have_count(2)
        expect(rows.nth(0)).to_contain_text("decoding, flex")
        expect(rows.nth(1)).to_contain_text("yours")
        expect(tab.page.locator("#slots-map i.decode")).to_have_count(2)
        expect(tab.page.locator("#slots-map i.free")).to_have_count(2)
        expect(tab.page.locator("#slots-map i.mine")).to_have_count(1)
        stop()
        until(lambda: engine.stats()["running"] == 1, seconds=1.0)
        step = {what: at for at, what, name in engine.events if name == engine.requests[turn].request_id}
        assert step["free"] - step["abort"] <= 1
        expect(tab.page.locator(".assistant .figures").last).to_contain_text("stopped")
        tab.page.click("#clear")
    expect(tab.page.locator("#rate-plot")).to_have_attribute("aria-label", re.compile(r"\d generated/s"))
    expect(rows).to_have_count(1)
    other.close()
    served.as_new()


def test_completion_and_what_else_was_likely(serve: Serve, open_tab: Any) -> None:
    served = serve(FakeEngine())
    tab = open_tab(served)
    tab.page.check("input[value=completion]")
    tab.send("a", max_tokens=3)
    expect(tab.reply()).to_have_text("abcd")
    assert served.engine.requests[0].params.logprobs == 5
    tokens = tab.page.locator(".token")
    expect(tokens).to_have_count(3)
    tokens.nth(1).hover()
    popover = tab.page.locator("#popover")
    expect(popover.locator("li")).to_have_text(
        [f"{letter}{share}" for letter, share in zip("cdefg", SHARES, strict=True)]
    )
    expect(popover.locator(".taken code")).to_have_text("c")
    tab.page.locator("#prompt").hover()
    expect(popover).to_be_hidden()
    tab.page.uncheck("#logprobs")
    tab.send("a")
    expect(tab.reply()).to_have_text("abcd")
    expect(tab.page.locator(".assistant").last.locator(".token")).to_have_count(0)


SHARES = ("50.0 %-0.69", "25.0 %-1.39", "12.5 %-2.08", "6.25 %-2.77", "3.13 %-3.47")


def test_tokens_without_a_text_of_their_own(serve: Serve, open_tab: Any) -> None:
    """Parts of a character, a special token, and text that was held back for a stop string."""
    part = "\ufffd"
    told = [
        ("n", "n"),
        (part, ""),
        (part, "é"),
        (" – ", " – "),
        (part, ""),
        (part, ""),
        (part, ""),
        (part, "😀"),
    ]
    told += [("\n ", "\n "), (" e", ""), ("<special>", ""), ("nd", " end"), ("<end>", "")]
    tab = open_tab(serve(FakeEngine()))
    tab.answer(
        *(
            chunk({"content": text}, content=[{"token": token, "logprob": -0.05, "top_logprobs": []}])
            for token, text in told
        )
    )
    tab.send("a")
    assert tab.reply().inner_text() == "né – 😀\n  end"
    shown = tab.page.locator(".token").evaluate_all("all => all.map((one) => one.textContent)")
    assert shown == ["n", "", "é", " – ", "", "", "", "😀", "\n ", " e", "", "nd", ""]


def test_with_the_keyboard_alone(serve: Serve, open_tab: Any) -> None:
    tab = open_tab(serve(FakeEngine()))
    keys, page = tab.page.keyboard, tab.page

    def focused() -> str:
        return page.evaluate("document.activeElement.id || document.activeElement.className")

    def walk(to: str) -> list[str]:
        seen = []
        while not seen or seen[-1] != to:
            keys.press("Tab")
            seen.append(focused())
            # what has the focus can be seen, and has a name
            assert page.evaluate("document.activeElement.matches(':focus-visible')"), seen
            assert page.evaluate(NAMED), seen
            assert len(seen) < 40, seen
        return seen

    order = walk("prompt")
    assert order[:2] == ["key-toggle", "theme"]
    assert order.index("temperature") < order.index("max_tokens") < order.index("log")
    while focused() != "max_tokens":
        keys.press("Shift+Tab")
    keys.type("20")
    walk("prompt")
    keys.type("a")
    keys.press("Control+Enter")
    expect(page.locator(".assistant .figures")).to_be_visible()
    assert focused() == "prompt"
    while "token" not in focused():
        keys.press("Shift+Tab")
    popover = page.locator("#popover")
    expect(popover.locator("strong")).to_have_text("b")
    keys.press("ArrowRight")
    expect(popover.locator("strong")).to_have_text("c")
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "popover"
    keys.press("End")
    keys.press("ArrowRight")
    keys.press("Home")
    expect(popover.locator("strong")).to_have_text("b")
    keys.press("Escape")
    expect(popover).to_be_hidden()
    walk("send")
    page.fill("#prompt", "1")
    page.focus("#send")
    keys.press("Enter")
    expect(tab.reply()).to_contain_text("2345")


NAMED = """() => {
  const one = document.activeElement;
  const named = one.getAttribute("aria-label") || one.labels?.[0]?.textContent || one.textContent;
  return Boolean(named.trim());
}"""


def test_what_a_model_writes_stays_text(serve: Serve, open_tab: Any) -> None:
    evil = "<img src=x onerror=\"hacked=1\"><script>hacked=1</script><svg onload='hacked=1'>"
    served = serve(FakeEngine(script=evil))
    tab = open_tab(served)
    for mode in ("chat", "completion"):
        tab.page.check(f"input[value={mode}]")
        tab.send(evil, max_tokens=120)
        expect(tab.reply()).to_have_text((evil if mode == "completion" else "") + evil)
        tab.page.locator(".token").last.hover()
    call = {"index": 0, "id": "1", "type": "function", "function": {"name": evil, "arguments": '{"x": "'}}
    rest = {"index": 0, "function": {"arguments": evil + '"}'}}
    tab.answer(
        chunk({"role": "assistant", "content": ""}),
        chunk({"reasoning_content": evil}),
        chunk({"tool_calls": [call]}),
        chunk({"tool_calls": [rest]}),
        {"error": {"message": evil}},
    )
    tab.page.check("input[value=chat]")
    tab.send("a")
    expect(tab.page.locator(".reasoning .text").last).to_have_text(evil)
    expect(tab.page.locator(".call").last.locator("pre")).to_have_text(f'{{"x": "{evil}"}}')
    expect(tab.page.locator(".call").last.locator("p")).to_have_text(f"Tool call: {evil}")
    expect(tab.page.locator("#error")).to_contain_text(evil)
    held = SlotView(0, evil, 0, Tier.ONLINE, Status.PREFILL, 9, 3, 1, 0, 1, 1)
    served.engine.slots = lambda: [held]  # type: ignore[method-assign]
    expect(tab.page.locator("#slots .id")).to_have_attribute("title", evil)
    expect(tab.page.locator("#slots tbody")).to_contain_text("3 of 9, 1 cached")
    expect(tab.page.locator("#slots-map i.prefill")).to_have_count(1)
    assert tab.page.evaluate("typeof hacked") == "undefined"
    assert tab.page.locator("main img, main svg, main script, #server svg").count() == 0


def test_light_and_dark(serve: Serve, open_tab: Any) -> None:
    served = serve(FakeEngine())
    seen = {}
    for scheme in ("light", "dark"):
        page = open_tab(served, color_scheme=scheme).page
        for choice in ("system", "light", "dark"):
            expect(page.locator("#theme")).to_have_text(f"Theme: {choice}")
            seen[scheme, choice] = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
            page.click("#theme")
        page.click("#theme")
        page.reload()
        expect(page.locator("#theme")).to_have_text("Theme: light")  # it is remembered
    light, dark = seen["light", "light"], seen["dark", "dark"]
    assert light != dark
    assert seen == {
        ("light", "system"): light,
        ("light", "light"): light,
        ("light", "dark"): dark,
        ("dark", "system"): dark,
        ("dark", "light"): light,
        ("dark", "dark"): dark,
    }


def test_keys(serve: Serve, open_tab: Any) -> None:
    served = serve(FakeEngine(), keys=["secret"])
    tab = open_tab(served)
    key, error = tab.page.locator("#key"), tab.page.locator("#key-error")
    expect(key).to_be_focused()
    for wrong in ("guess", "schlüssel"):
        key.fill(wrong)
        tab.page.keyboard.press("Enter")
        expect(error).to_contain_text("key")
        expect(key).to_be_visible()
    tab.send("a", max_tokens=3)
    expect(tab.page.locator("#error")).to_contain_text("API key")
    expect(tab.page.locator("#prompt")).to_have_value("a")  # the question is not lost
    key.fill("secret")
    key.press("Enter")
    expect(key).to_be_hidden()
    expect(tab.page.locator("#model")).to_have_text(MODEL)
    tab.send("a")
    expect(tab.reply()).to_have_text("bcd")
    stored = "[...Object.values(sessionStorage), ...Object.values(localStorage)]"
    assert "secret" not in tab.page.evaluate(stored)
    tab.page.click("#key-toggle")
    tab.page.check("#keep-key")
    key.press("Enter")
    assert "secret" in tab.page.evaluate("Object.values(sessionStorage)")
    assert "secret" not in tab.page.evaluate("Object.values(localStorage)")
    tab.page.reload()
    expect(tab.page.locator("#model")).to_have_text(MODEL)
    tab.page.click("#key-toggle")
    key.fill("")
    tab.page.keyboard.press("Enter")
    expect(key).to_be_visible()
    assert tab.page.evaluate(stored) == []


def test_errors_in_words(serve: Serve, open_tab: Any) -> None:
    served = serve(FakeEngine(slots=1, max_queued=1, delay=0.01, retry_after=9))
    tab = open_tab(served)
    error = tab.page.locator("#error")
    expect(tab.page.locator("#model")).to_have_text(MODEL)
    for more, words in (
        ("{", "not JSON"),
        ("[]", "must be a JSON object"),
        ('{"top_p": 7}', "The server refused this: top_p"),
        ('{"surprise": 1}', "surprise"),
    ):
        tab.page.evaluate("document.querySelector('#settings details').open = true")
        tab.send("a", more=more)
        expect(error).to_contain_text(words)
        expect(tab.page.locator("#prompt")).to_have_value("a")
    tab.send("a", more="", max_tokens=-3)
    expect(error).to_contain_text("max_tokens:")
    served.engine.busy = 1
    tab.send("a", max_tokens=200)
    expect(error).to_have_text("The server is full. Try again in 9 s.")
    tab.send("a")
    expect(tab.page.locator(".assistant .tokens").last).to_contain_text("bcdef")
    served.engine.fail_next = RuntimeError("out of memory")
    expect(error).to_contain_text("The reply was broken off: the engine failed: RuntimeError: out of memory")
    expect(tab.page.locator("#status-text")).to_contain_text("out of memory")
    expect(tab.page.locator("#status")).to_have_attribute("data-status", "failed")
    tab.answer(chunk({"content": "b"}), closing=())
    tab.send("a")
    expect(error).to_contain_text("The reply was broken off: the connection ended.")
    expect(tab.reply()).to_have_text("b")
    tab.page.unroute_all()
    served.server.should_exit = True
    served._thread.join(10)
    tab.send("a")
    expect(error).to_contain_text("cannot be reached")


def test_a_hidden_page_asks_for_nothing(serve: Serve, open_tab: Any) -> None:
    tab = open_tab(serve(FakeEngine()))
    asked: list[str] = []
    tab.page.on("request", lambda request: asked.append(request.url))
    with tab.page.expect_request("**/state"):
        pass
    show = "Object.defineProperty(document, 'hidden', {configurable: true, get: () => %s});"
    changed = "document.dispatchEvent(new Event('visibilitychange'))"
    tab.page.evaluate(show % "true" + changed)
    tab.page.wait_for_timeout(100)
    asked.clear()
    tab.page.wait_for_timeout(1500)
    assert asked == []
    with tab.page.expect_request("**/state"):
        tab.page.evaluate(show % "false" + changed)


def test_nothing_hangs_over_the_edge(serve: Serve, open_tab: Any) -> None:
    tab = open_tab(serve(FakeEngine()))
    tab.send("A" * 200)
    expect(tab.page.locator(".assistant .figures")).to_be_visible()
    for width, height in ((1400, 900), (1000, 700), (390, 800)):
        tab.page.set_viewport_size({"width": width, "height": height})
        for view in ("settings", "server", "talk"):
            button = tab.page.locator(f"[data-show={view}]")
            if button.is_visible():
                button.click()
                expect(tab.page.locator(f"#{view}")).to_be_visible()
            assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
