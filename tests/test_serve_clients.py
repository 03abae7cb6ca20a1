"""Ordinary calls of LangChain and litellm, where they are installed."""

import asyncio

import pytest

pytest.importorskip("fastapi", reason="the endpoint needs the package's apps extra")
langchain = pytest.importorskip("langchain_openai")
litellm = pytest.importorskip("litellm")

from langchain_core.messages import HumanMessage, SystemMessage  # noqa: E402
from serving import image_part, served, text_part  # noqa: E402
from shapes import shapes_captioner  # noqa: E402
from test_serve_openai import IMAGE  # noqa: E402

PARTS = [text_part("What color is it?"), image_part(IMAGE)]


@pytest.fixture(scope="module")
def captioner():
    return shapes_captioner()


@pytest.fixture(scope="module")
def place(captioner):
    with served(captioner) as (address, _):
        yield {"model": "tester", "base_url": f"{address}/v1", "api_key": "none"}


@pytest.fixture(scope="module")
def expected(captioner):
    return captioner.ask(IMAGE, "What color is it?").answers[0]


def test_langchain_asks_streams_remembers_and_waits(place, expected):
    chat = langchain.ChatOpenAI(**place, max_retries=0)
    asked = HumanMessage(content=PARTS)
    answer = chat.invoke([asked])
    assert answer.content == expected
    assert "".join(chunk.content for chunk in chat.stream([asked])) == expected
    assert chat.invoke([SystemMessage("Be brief."), asked, answer, HumanMessage("Sure?")])
    bounded = langchain.ChatOpenAI(**place, max_tokens=2048, temperature=0.7)
    assert bounded.invoke([asked]).response_metadata["finish_reason"] in ("stop", "length")

    async def waited():
        whole = await chat.ainvoke([asked])
        return whole.content, "".join([chunk.content async for chunk in chat.astream([asked])])

    assert asyncio.run(waited()) == (expected, expected)


def test_litellm_asks_streams_and_remembers(place, expected):
    own = place | {"model": f"openai/{place['model']}"}
    asked = [{"role": "user", "content": PARTS}]
    message = litellm.completion(**own, messages=asked).choices[0].message
    assert message.content == expected
    chunks = litellm.completion(**own, messages=asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    for said in (message, message.model_dump()):
        more = [*asked, said, {"role": "user", "content": "Sure?"}]
        assert litellm.completion(**own, messages=more, max_tokens=2048).choices[0].finish_reason
