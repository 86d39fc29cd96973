"""Requests that the server refuses or ends, and what it says of itself."""

import asyncio
import time

import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import hf_paged
from hf_paged import PagedConfig
from support.packing import BLOCK
from support.served import NAME, TEMPLATE, empty, pair, served, tokenizer

CHAT = [{"role": "user", "content": "why is the sky blue?"}]
LONG = {"model": NAME, "messages": CHAT, "max_tokens": 480, "logit_bias": {"2": -100}}
SHORT = {"model": NAME, "messages": CHAT, "max_tokens": 2}


@pytest.fixture(scope="module")
def server():
    with served(max_body_bytes=9_000, max_new_tokens=490, max_choices=4) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(autouse=True)
def nothing_left(server):
    yield
    assert empty(pair()[1])


def refused(call, status: int) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as raised:
        call()
    assert raised.value.status_code == status, raised.value
    return raised.value


SCHEMA = {"type": "json_schema", "json_schema": {"name": "one", "schema": {"type": "sky"}}}


def said(content, role: str = "user") -> list:
    return [{"role": role, "content": content}]


PICTURE = [{"type": "image_url", "image_url": {"url": "data:"}}]


@pytest.mark.parametrize(
    "options, code, param, says",
    [
        ({"top": 1}, "unknown_parameter", "top", "Unrecognized request argument supplied: top"),
        ({"stream_options": {"x": 1}, "stream": True}, "unknown_parameter", "stream_options.x", "Unrecognized"),
        ({"audio": {"voice": "x"}}, "unsupported_parameter", "audio", "audio is not supported by this server"),
        ({"functions": []}, "unsupported_parameter", "functions", "functions is not supported"),
        ({"reasoning_effort": "low"}, "unsupported_parameter", "reasoning_effort", "not supported"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice", "'none' or 'auto'; got 'required'"),
        ({"parallel_tool_calls": False}, "invalid_value", "parallel_tool_calls", "Input should be True"),
        ({"store": True}, "invalid_value", "store", "Input should be False"),
        ({"temperature": 2.5}, "invalid_value", "temperature", "less than or equal to 2; got 2.5"),
        ({"temperature": "1"}, "invalid_value", "temperature", "valid number; got '1'"),
        ({"stop": list("abcde")}, "invalid_value", "stop", "at most 4"),
        ({"stop": ""}, "invalid_value", "stop[0]", "at least 1 character"),
        ({"n": 5}, "invalid_value", "n", "asks for 5 answers, and this server gives 4 at once"),
        ({"max_tokens": 491}, "invalid_value", "max_tokens", "at most 490 tokens, got 491"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "invalid_value", None, "are the same limit and differ"),
        ({"top_logprobs": 2}, "invalid_value", None, "top_logprobs needs logprobs"),
        ({"stream_options": {}}, "invalid_value", None, "stream_options is for streams"),
        ({"logit_bias": {"320": 1}}, "invalid_value", "logit_bias", "'320' is no token: this model has 0 to 319"),
        ({"logit_bias": {"9" * 5000: 1}}, "invalid_value", "logit_bias", "'99999999999999999999' is no token"),
        ({"response_format": SCHEMA}, "invalid_schema", "response_format", "cannot be followed: Invalid type: sky"),
        ({"messages": said(PICTURE)}, "invalid_value", "messages[0].content[0].type", "'text'"),
        ({"messages": said("", "tool")}, None, "messages", "a chat begins with no tool"),
        ({"messages": said("s" * 3000)}, "context_length_exceeded", "messages", "takes 511"),
        ({"messages": said("s" * 90), "max_tokens": 490}, "context_length_exceeded", "max_tokens", "leaves 419 of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_is_said(client, options, code, param, says):
    error = refused(lambda: client.chat.completions.create(**{**SHORT, "extra_body": options}), 400)
    assert says in error.body["message"] and error.type == "invalid_request_error"
    assert (error.code, error.param) == (code, param)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": ""}, "the prompt has no tokens"),
        ({"prompt": [320]}, "there is no token 320: this model has 320"),
        ({"prompt": ["a"] * 3, "n": 2}, "asks for 6 answers"),
        ({"prompt": ["a", 1]}, "prompt[1]: Input should be a valid string; got 1"),
        ({"best_of": 2}, "best_of must equal n, which is 1"),
        ({"echo": True}, "echo: Input should be False"),
        ({"suffix": "b"}, "suffix is not supported"),
        ({"logprobs": 6}, "less than or equal to 5"),
    ],
)
def test_what_cannot_be_completed_is_said(client, options, says):
    error = refused(lambda: client.completions.create(**{"model": NAME, "prompt": "a", **options}), 400)
    assert says in error.body["message"]


def test_what_changes_no_answer_is_taken(client):
    hints = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "prompt_cache_key": "x"}
    found = client.chat.completions.create(**SHORT, **hints, parallel_tool_calls=True, modalities=["text"])
    assert found.usage.completion_tokens


def test_a_body_that_is_none(server):
    url, json_type = f"{server.url}/v1/completions", {"content-type": "application/json"}
    for content, status, says in (
        (b"{", 400, "the body is no JSON: "),
        (b"", 400, "the body must be a JSON object"),
        (b"[]", 400, "the body: "),
        (b"{}", 400, "you must provide "),
        (b" " * 10_000, 413, "the body is larger than 9000 bytes"),
        ((b" " * 2_000 for _ in range(5)), 413, "the body is larger than 9000 bytes"),
    ):
        answer = httpx2.post(url, content=content, headers=json_type)
        assert answer.status_code == status and says in answer.json()["error"]["message"]
    answer = httpx2.get(url)
    assert answer.status_code == 405 and answer.json()["error"]["message"] == "GET /v1/completions: Method Not Allowed"
    assert httpx2.get(f"{server.url}/v2").json()["error"]["message"] == "GET /v2: Not Found"


def test_another_model_is_not_found(client):
    error = refused(lambda: client.chat.completions.create(**{**SHORT, "model": "other"}), 404)
    assert error.code == "model_not_found"


def test_a_model_without_a_template_and_one_without_tools(client, monkeypatch):
    tools = [{"type": "function", "function": {"name": "f"}}]
    monkeypatch.setattr(tokenizer(), "chat_template", TEMPLATE.replace("{% if tools %}", "{% if false %}"))
    error = refused(lambda: client.chat.completions.create(**SHORT, tools=tools), 400)
    assert "shows it no tools" in error.body["message"]
    monkeypatch.setattr(tokenizer(), "chat_template", None)
    error = refused(lambda: client.chat.completions.create(**SHORT), 400)
    assert "send a prompt to /v1/completions" in error.body["message"]


def idle(server) -> bool:
    """Tell whether nothing runs soon."""
    for _ in range(500):
        if not server.service.engine.num_running:
            return True
        time.sleep(0.01)
    return False


def tokens_generated(server) -> float:
    return server.service.metrics.registry.get_sample_value("hf_paged_generation_tokens_total")


def test_a_client_that_goes_away_frees_its_blocks(server, client):
    before = tokens_generated(server)
    stream = client.chat.completions.create(**LONG, stream=True)
    next(iter(stream))
    while not hf_paged.stats(pair()[1]).used_blocks:
        time.sleep(0.001)
    stream.close()
    assert empty(pair()[1]) and idle(server)
    assert tokens_generated(server) - before < 400, "it ran to its end"


def test_a_client_that_waits_no_longer_frees_its_blocks(server):
    before = tokens_generated(server)
    with pytest.raises(openai.APITimeoutError):
        server.client(timeout=0.2).chat.completions.create(**LONG, n=4)
    assert empty(pair()[1]) and idle(server)
    assert tokens_generated(server) - before < 1_600, "it ran to its end"


def test_metrics_and_health(server, client):
    client.chat.completions.create(**SHORT)
    refused(lambda: client.chat.completions.create(**SHORT, n=9), 400)
    assert httpx2.get(f"{server.url}/health").json() == {"status": "ok"}
    text = httpx2.get(f"{server.url}/metrics").text
    found = {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}
    stats = hf_paged.stats(pair()[1])
    for name, value in (
        ("requests_running", 0),
        ("requests_waiting", 0),
        ("pool_usage_ratio", 0),
        ("packed_calls_total", stats.packed_calls),
        ("prefix_hit_tokens_total", stats.prefix_hit_tokens),
        ("preemptions_total", 0),
        ("fallbacks_total", 0),
    ):
        assert found[f"hf_paged_{name}"] == value, name
    assert found["hf_paged_time_to_first_token_seconds_count"] >= 1
    assert found["hf_paged_generation_tokens_total"] > found["hf_paged_time_between_tokens_seconds_count"] > 0
    assert {"used", "cached", "free"} == {
        sample.labels["state"]
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "hf_paged_pool_blocks"
    }


def test_a_key_is_asked_for():
    with served(api_key="secret") as server:
        assert server.client("secret").models.list().data
        for key in ("other", "secre", "secrets"):
            error = refused(lambda key=key: server.client(key).models.list(), 401)
            assert error.code == "invalid_api_key"
        refused(lambda: server.client("x").completions.create(model=NAME, prompt="a"), 401)
        assert httpx2.get(f"{server.url}/health").status_code == 200


def test_tenants_share_no_blocks():
    with served(tenant_header="X-Tenant") as server:

        def hits(tenant: str) -> int:
            before = hf_paged.stats(pair()[1]).prefix_hit_tokens
            server.client(default_headers={"X-Tenant": tenant}).chat.completions.create(**SHORT)
            return hf_paged.stats(pair()[1]).prefix_hit_tokens - before

        assert [hits(tenant) for tenant in ("a", "b", "a", "c")] == [0, 0, 8, 0]
        error = refused(lambda: server.client().chat.completions.create(**SHORT), 400)
        assert "the header X-Tenant is missing" in error.body["message"]


def test_a_header_that_was_not_configured_is_no_tenant(client):
    for tenant in ("a", "b"):
        client.chat.completions.create(**SHORT, extra_headers={"X-Tenant": tenant})
    before = hf_paged.stats(pair()[1]).prefix_hit_tokens
    client.chat.completions.create(**SHORT, extra_headers={"X-Tenant": "c"})
    assert hf_paged.stats(pair()[1]).prefix_hit_tokens == before + 8


def test_a_full_queue_refuses():
    with served(max_running=1, max_queue=1) as server:
        client = server.client()
        streams = [client.chat.completions.create(**LONG, stream=True) for _ in range(2)]
        error = refused(lambda: client.chat.completions.create(**SHORT), 429)
        assert error.response.headers["retry-after"] == "1" and error.type == "rate_limit_error"
        assert "1 requests wait and 1 run" in error.body["message"]
        for stream in streams:
            stream.close()
        assert idle(server)
        assert client.chat.completions.create(**SHORT).choices


def test_a_client_that_goes_away_while_it_waits_leaves_the_queue():
    with served(max_running=1, max_queue=2) as server:
        client, engine = server.client(), server.service.engine
        first, second = (client.chat.completions.create(**LONG, stream=True) for _ in range(2))
        with pytest.raises(openai.APITimeoutError):
            server.client(timeout=0.2).chat.completions.create(**SHORT)
        second.close()
        for _ in range(500):
            if not engine.num_waiting:
                break
            time.sleep(0.01)
        assert (engine.num_waiting, engine.num_running) == (0, 1)
        first.close()
        assert idle(server)


def test_a_request_that_takes_too_long_is_ended():
    with served(request_seconds=0.3) as server:
        error = refused(lambda: server.client().chat.completions.create(**LONG, n=8), 504)
        assert "was ended after 0.3 seconds" in error.body["message"]
        with pytest.raises(openai.APIError, match="was ended after 0.3 seconds"):
            list(server.client().chat.completions.create(**LONG, n=8, stream=True))
        assert empty(pair()[1])


def test_a_pool_that_is_too_small_is_said():
    with served(config=PagedConfig(block_size=4, memory_budget=20 * BLOCK)) as server:
        error = refused(lambda: server.client().chat.completions.create(**LONG), 400)
        assert error.code == "context_length_exceeded" and "need 21 blocks of the KV cache, which has 20" in str(error)
        assert server.client().chat.completions.create(**SHORT).choices


def test_rows_that_are_preempted_go_on_where_they_were():
    """Seeds, grammars and log-probabilities keep to their rows when these run their tokens again."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "minLength": 20}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "one", "schema": schema}}
    kinds = [{"seed": 1}, {"seed": 2, "response_format": wanted}, {"temperature": 0, "logprobs": True}]
    requests = [{**LONG, "max_tokens": 40, **kind} for kind in kinds * 3]

    with served(config=PagedConfig(block_size=4, memory_budget=30 * BLOCK, prefix_cache=False)) as server:
        client = server.client()
        alone = [client.chat.completions.create(**options).choices[0] for options in requests[:3]]
        assert hf_paged.stats(pair()[1]).preemptions == 0

        async def crowd() -> list:
            async with server.async_client() as client:
                return await asyncio.gather(*(client.chat.completions.create(**options) for options in requests))

        for found, expected in zip(asyncio.run(crowd()), alone * 3):
            (choice,) = found.choices
            assert choice.message.content == expected.message.content
            notes, others = (one.logprobs.content if one.logprobs else [] for one in (choice, expected))
            assert [one.logprob for one in notes] == pytest.approx([one.logprob for one in others], abs=1e-3)
        assert hf_paged.stats(pair()[1]).preemptions > 0
        assert (
            f"hf_paged_preemptions_total {hf_paged.stats(pair()[1]).preemptions}.0"
            in httpx2.get(f"{server.url}/metrics").text
        )


def test_requests_under_way_end_before_the_server_does():
    with served(drain_seconds=20) as server:
        client, found = server.client(), []
        stream = client.chat.completions.create(**{**LONG, "max_tokens": 60}, stream=True)
        next(iter(stream))
        server.loop.call_soon_threadsafe(setattr, server.service, "is_draining", True)
        draining = asyncio.run_coroutine_threadsafe(server.service.shutdown(), server.loop)
        while not server.service.is_draining:
            time.sleep(0.001)
        error = refused(lambda: client.chat.completions.create(**SHORT), 503)
        assert error.response.headers["retry-after"] == "5"
        assert httpx2.get(f"{server.url}/health").json() == {"status": "draining"}
        found = [chunk.choices[0].finish_reason for chunk in stream]
        assert found[-1] == "length" and len(found) > 10
        draining.result(10)


def test_requests_that_take_longer_than_the_server_waits_are_ended():
    with served(drain_seconds=0) as server:
        stream = server.client().chat.completions.create(**LONG, stream=True)
        next(iter(stream))
        asyncio.run_coroutine_threadsafe(server.service.shutdown(), server.loop).result(10)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)


def test_a_mistake_of_the_server_is_an_error_in_the_same_form(server, client, monkeypatch, caplog):
    monkeypatch.setattr(server.service.prompts, "of_chat", lambda request: 1 / 0)
    error = refused(lambda: client.chat.completions.create(**SHORT), 500)
    assert error.body["type"] == "server_error" and "ZeroDivisionError" in error.body["message"]
    assert "division by zero" in caplog.text
    assert httpx2.get(f"{server.url}/openapi.json").status_code == 404


def test_an_error_of_the_model_is_no_answer_and_is_logged(server, client, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("of the model")

    monkeypatch.setattr(pair()[1], "forward", broken)
    error = refused(lambda: client.chat.completions.create(**SHORT), 500)
    assert error.body["message"] == "the server failed to answer (ZeroDivisionError); its log says why"
    assert "of the model" in caplog.text
    with pytest.raises(openai.APIError, match="ZeroDivisionError"):
        list(client.chat.completions.create(**SHORT, stream=True))


@pytest.mark.slow
def test_two_hundred_streams_at_once():
    with served(max_running=64, max_queue=200) as server:
        prompts = [f"{number} the sea is blue" for number in range(200)]
        alone = [
            server.client().completions.create(model=NAME, prompt=prompt, temperature=0, max_tokens=20).choices[0].text
            for prompt in prompts[:5]
        ]

        async def stream(client, prompt: str) -> str:
            chunks = await client.completions.create(
                model=NAME, prompt=prompt, temperature=0, max_tokens=20, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in chunks])

        async def crowd() -> list[str]:
            async with server.async_client() as client:
                return await asyncio.gather(*(stream(client, prompt) for prompt in prompts))

        found = asyncio.run(crowd())
        assert found[:5] == alone and len(found) == 200 and all(found)
        stats = hf_paged.stats(pair()[1])
        assert stats.packed_calls == 205 and not stats.fallbacks
        assert empty(pair()[1]) and idle(server)
