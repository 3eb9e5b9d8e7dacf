"""Clients that people have, unmodified: LangChain, `llm` and litellm against the server."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
from pydantic import SecretStr

from tests.server import templates
from tests.server.harness import MODEL, Serve, Served
from tests.server.templates import engine

ROOT = Path(__file__).parents[2]
LITELLM = ROOT / ".venv-litellm" / "bin" / "python"
BERN = '{"city": "Bern"}'
CALL = f'<tool_call>\n{{"name": "Weather", "arguments": {BERN}}}\n</tool_call>'


class Weather(pydantic.BaseModel):
    """The weather now."""

    city: str


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_API_BASE", "LANGCHAIN_TRACING_V2"):
        monkeypatch.delenv(name, raising=False)


# --- LangChain -----------------------------------------------------------------------------------------


@pytest.fixture
def langchain(no_proxies: None) -> Iterator[Any]:
    module = pytest.importorskip("langchain_openai")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, of which it has many
        yield module


def chat(langchain: Any, served: Served, **fields: Any) -> Any:
    return langchain.ChatOpenAI(
        model=MODEL, base_url=f"{served.url}/v1", api_key=SecretStr("none"), max_retries=0, **fields
    )


def test_langchain_invoke_and_stream(langchain: Any, serve: Serve) -> None:
    served = serve(engine(templates.PLAIN, "Hello there"))
    model = chat(langchain, served, temperature=0.5, max_tokens=100)
    reply = model.invoke([("system", "Be brief"), ("human", "Hi")])
    assert reply.content == "Hello there"
    assert reply.usage_metadata["output_tokens"] == 12
    assert reply.response_metadata["finish_reason"] == "stop"
    pieces = [chunk.content for chunk in model.stream("Hi", stop=["there"])]
    assert "".join(pieces) == "Hello "
    assert len(pieces) > 3
    assert len(model.batch(["a", "b", "c"])) == 3


def test_langchain_tools(langchain: Any, serve: Serve) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    served = serve(engine(templates.HERMES, CALL))
    model = chat(langchain, served).bind_tools([Weather])
    asked = HumanMessage("Weather?")
    reply = model.invoke([asked])
    [call] = reply.tool_calls
    assert (call["name"], call["args"]) == ("Weather", {"city": "Bern"})
    streamed = None
    for chunk in model.stream([asked]):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert streamed.tool_calls[0]["args"] == {"city": "Bern"}
    again = model.invoke([asked, reply, ToolMessage("sunny", tool_call_id=call["id"], name="Weather")])
    assert again.tool_calls
    assert "sunny" in templates.prompt(served)


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_langchain_structured_output(langchain: Any, serve: Serve, method: str) -> None:
    served = serve(engine(templates.HERMES, CALL if method == "function_calling" else BERN))
    model = chat(langchain, served).with_structured_output(Weather, method=method)
    assert model.invoke("Weather as JSON?") == Weather(city="Bern")
    assert served.engine.requests[-1].params.structured_outputs is not None


# --- llm -----------------------------------------------------------------------------------------------


def test_llm(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_proxies: None) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("LLM_LOAD_PLUGINS", "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llm = pytest.importorskip("llm")
        from llm.default_plugins.openai_models import Chat

    served = serve(engine(templates.HERMES, "Hello there"))
    model = Chat(
        MODEL, model_name=MODEL, api_base=f"{served.url}/v1", supports_schema=True, supports_tools=True
    )
    model.key = "none"
    assert model.prompt("Hi", system="Be brief", max_tokens=50, temperature=0.2).text() == "Hello there"
    assert "".join(model.prompt("Hi", stream=True)) == "Hello there"
    conversation = model.conversation()
    conversation.prompt("One").text()
    conversation.prompt("Two").text()
    assert templates.prompt(served).count("Hello there") == 1

    served = serve(engine(templates.HERMES, BERN))
    model = Chat(
        MODEL, model_name=MODEL, api_base=f"{served.url}/v1", supports_schema=True, supports_tools=True
    )
    model.key = "none"
    assert model.prompt("Weather?", schema=Weather).text() == BERN
    assert served.engine.requests[-1].params.structured_outputs is not None

    served = serve(engine(templates.HERMES, CALL))
    model = Chat(
        MODEL, model_name=MODEL, api_base=f"{served.url}/v1", supports_schema=True, supports_tools=True
    )
    model.key = "none"
    tool = llm.Tool(name="Weather", description="now", input_schema=Weather.model_json_schema())
    for stream in (False, True):
        response = model.prompt("Weather?", tools=[tool], stream=stream)
        [call] = response.tool_calls()
        assert (call.name, call.arguments) == ("Weather", {"city": "Bern"})


# --- litellm -------------------------------------------------------------------------------------------

PROGRAM = """
import sys, os
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm, json
base, model = sys.argv[1], "openai/" + sys.argv[2]
ask = dict(model=model, api_base=base, api_key="none", num_retries=0)
messages = [{"role": "user", "content": "Weather?"}]
parameters = {"type": "object", "properties": {}}
tool = {"type": "function", "function": {"name": "Weather", "parameters": parameters}}
reply = litellm.completion(messages=messages, tools=[tool], **ask)
[call] = reply.choices[0].message.tool_calls
print(json.dumps([call.function.name, json.loads(call.function.arguments), reply.choices[0].finish_reason]))
chunks = list(litellm.completion(messages=messages, tools=[tool], stream=True, **ask))
whole = litellm.stream_chunk_builder(chunks, messages=messages)
[call] = whole.choices[0].message.tool_calls
print(json.dumps([call.function.name, json.loads(call.function.arguments), whole.choices[0].finish_reason]))
plain = litellm.completion(messages=messages, max_tokens=40, temperature=0, **ask)
print(json.dumps([plain.choices[0].message.reasoning_content, plain.choices[0].message.content]))
ask["model"] = "text-completion-openai/" + sys.argv[2]
done = litellm.text_completion(prompt="a", max_tokens=8, **ask)
print(json.dumps(done.choices[0].text))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not LITELLM.exists(),
    reason="litellm needs another openai than the rest: .venv-litellm beside the checkout",
)
def test_litellm(serve: Serve) -> None:
    served = serve(engine(templates.THINKING, f"<think>Hm.</think>{CALL}"))
    done = subprocess.run(
        [LITELLM, "-c", PROGRAM, f"{served.url}/v1", MODEL],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("[", '"'))]  # it says more
    assert lines[:2] == ['["Weather", {"city": "Bern"}, "tool_calls"]'] * 2
    assert lines[2].startswith('["Hm.", "<tool_call>')  # without tools a call is text
    assert lines[3] == '"<think>H"'
