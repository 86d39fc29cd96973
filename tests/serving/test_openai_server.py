"""The server, by the real client: answers equal those of dense, and say what OpenAI's would say."""

import asyncio
import json

import httpx2
import openai
import pytest
import torch

import hf_paged
from hf_paged.compat.transformers import sanitizes_chats
from hf_paged.execution.model_runner import ModelRunner
from support.served import NAME, empty, pair, served, tokenizer

CHAT = [{"role": "user", "content": "why is the sky blue?"}]
CHATS = [
    CHAT,
    [{"role": "system", "content": "a name"}, {"role": "user", "content": "an age, é☃"}],
    [{"role": "user", "content": [{"type": "text", "text": "the sea "}, {"type": "text", "text": "is blue"}]}],
]
GREEDY = {"model": NAME, "temperature": 0, "max_tokens": 24}
NO_END = {"logit_bias": {"2": -100}}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["sea", "sky"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server():
    with served() as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(autouse=True)
def all_packed(server):
    """Every call of a test ran packed, read its pages, and leaves nothing behind."""
    yield
    assert empty(pair()[1])
    stats = hf_paged.stats(pair()[1])
    assert not stats.fallbacks and not stats.gathers
    assert stats.page_reads or not stats.packed_calls


def encoded(chat, **options) -> list[int]:
    """The tokens of a chat, by the template itself."""
    flat = [
        {**message, "content": "".join(part["text"] for part in message["content"])}
        if isinstance(message["content"], list)
        else message
        for message in chat
    ]
    return tokenizer().apply_chat_template(flat, add_generation_prompt=True, return_dict=True, **options)["input_ids"]


def dense(prompt: list[int], count: int = 24, **options) -> list[int]:
    """The tokens of the dense model, its end token left out."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, **options}
    tokens = pair()[0].generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
    return tokens[:-1] if tokens[-1] == 2 else tokens


def text_of(tokens: list[int]) -> str:
    return tokenizer().decode(tokens, skip_special_tokens=True)


def bytes_of(server, tokens: list[int]) -> list[list[int]]:
    return [list(server.service.grammars.bytes_of(token)) for token in tokens]


@pytest.mark.parametrize("chat", CHATS, ids=["one", "system", "parts"])
def test_greedy_answers_equal_dense_token_by_token(server, client, chat):
    expected = dense(encoded(chat))
    found = client.chat.completions.create(messages=chat, logprobs=True, **GREEDY)
    (choice,) = found.choices
    assert [one.bytes for one in choice.logprobs.content] == bytes_of(server, expected)
    assert choice.message.content == text_of(expected)
    assert choice.finish_reason == ("length" if len(expected) == 24 else "stop")
    assert found.usage.prompt_tokens == len(encoded(chat))
    assert found.usage.completion_tokens == len(expected) + (choice.finish_reason == "stop")


def test_prompts_of_texts_and_tokens_get_what_dense_generates(client):
    prompts = ["the sky", "a name, an age"]
    tokens = [tokenizer()(prompt)["input_ids"] for prompt in prompts]
    for prompt in (prompts, tokens):
        found = client.completions.create(prompt=prompt, n=2, **GREEDY)
        texts = [text_of(dense(one)) for one in tokens for _ in range(2)]
        assert [choice.text for choice in found.choices] == texts
        assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert client.completions.create(model=NAME, prompt="the sky").usage.completion_tokens <= 16


def test_an_answer_ends_at_the_end_token(client):
    """The end is not in the text, and counts as a token."""
    prompts = [tokenizer()(f"{number} the sea")["input_ids"] for number in range(3)]
    expected = [dense(prompt, 30, sequence_bias=[[[2], 4.0]]) for prompt in prompts]
    assert min(map(len, expected)) < 29
    options = {**GREEDY, "max_tokens": 30, "logit_bias": {"2": 4}}
    found = client.completions.create(prompt=prompts, logprobs=0, **options)
    assert [choice.text for choice in found.choices] == [text_of(tokens) for tokens in expected]
    assert [len(choice.logprobs.tokens) for choice in found.choices] == [len(tokens) for tokens in expected]
    ended = [choice.finish_reason == "stop" for choice in found.choices]
    assert ended == [len(tokens) < 30 for tokens in expected]
    assert found.usage.completion_tokens == sum(map(len, expected)) + sum(ended)


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_is_the_whole_answer_in_pieces(client, n):
    options = {**GREEDY, **NO_END, "messages": CHAT, "n": n, "temperature": 1, "seed": 5}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and {chunk.object for chunk in chunks} == {
        "chat.completion.chunk"
    }
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert [chunk.choices[0].delta.role for chunk in chunks[:n]] == ["assistant"] * n
    for choice in whole.choices:
        mine = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.delta.content or "" for part in mine) == choice.message.content
        assert len(mine) > 10
        assert [part.finish_reason for part in mine if part.finish_reason] == [mine[-1].finish_reason] == ["length"]


def test_a_stream_ends_with_done_and_without_usage_unless_asked(server):
    body = {**GREEDY, "max_tokens": 2, "prompt": "the sea", "stream": True}
    lines = httpx2.post(f"{server.url}/v1/completions", json=body).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line.removeprefix("data: ")) for line in lines[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer_and_is_not_in_it(client, stream):
    prompt = tokenizer()("the sky is blue")["input_ids"]
    expected = text_of(dense(prompt, 40, suppress_tokens=[2]))
    stop = expected[7:11]
    options = {**GREEDY, **NO_END, "max_tokens": 40, "prompt": prompt, "stop": [stop, "never there"]}
    if stream:
        chunks = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **options))
        text, usage = "".join(chunk.choices[0].text for chunk in chunks[:-1]), chunks[-1].usage
        assert chunks[-2].choices[0].finish_reason == "stop"
    else:
        found = client.completions.create(**options, logprobs=0)
        text, usage = found.choices[0].text, found.usage
        assert found.choices[0].finish_reason == "stop"
        assert found.choices[0].logprobs.text_offset[-1] < len(text)
    assert text == expected[: expected.index(stop)]
    assert usage.completion_tokens < 40
    assert empty(pair()[1])


def test_a_stop_text_of_one_choice_leaves_the_others(client):
    options = {**GREEDY, **NO_END, "messages": CHAT, "n": 3, "temperature": 1, "seed": 8}
    free = [choice.message.content for choice in client.chat.completions.create(**options).choices]
    stop = next(text for text in free[1] if all(text not in free[other] for other in (0, 2)))
    found = client.chat.completions.create(**options, stop=stop).choices
    assert [choice.finish_reason for choice in found] == ["length", "stop", "length"]
    assert [choice.message.content for choice in found] == [free[0], free[1].partition(stop)[0], free[2]]


def test_a_seed_gives_the_same_answer_whatever_else_runs(server, client):
    options = {"model": NAME, "messages": CHAT, "max_tokens": 16, "top_p": 0.9, "extra_body": {"top_k": 50}}
    alone = client.chat.completions.create(**options, seed=3).choices[0].message.content

    async def crowd():
        async with server.async_client() as many:
            tasks = [many.chat.completions.create(**options, seed=seed) for seed in (3, 4, 3, 5)]
            tasks.append(many.chat.completions.create(**options, seed=3, n=4))
            return await asyncio.gather(*tasks)

    texts = [[choice.message.content for choice in found.choices] for found in asyncio.run(crowd())]
    assert texts[0] == texts[2] == [alone] and texts[4][0] == alone
    assert len({texts[0][0], texts[1][0], texts[3][0]}) == 3 and len(set(texts[4])) == 4
    unseeded = {client.chat.completions.create(**options).choices[0].message.content for _ in range(4)}
    assert len(unseeded) > 1


def test_the_choices_of_a_prompt_share_its_blocks(client, monkeypatch):
    tokens, execute = [], ModelRunner.execute

    def watched(self, model, inputs):
        tokens.append(inputs.input_ids.shape[1])
        return execute(self, model, inputs)

    monkeypatch.setattr(ModelRunner, "execute", watched)
    prompt = tokenizer()("a name, a colour and the age of the sea: " * 2)["input_ids"]
    found = client.completions.create(**{**GREEDY, "max_tokens": 5}, **NO_END, prompt=prompt, n=4, presence_penalty=0.1)
    assert len({choice.text for choice in found.choices}) == 1
    assert sum(tokens) == len(prompt) + 4 * 4


@pytest.mark.parametrize("temperature", [0, 1.3])
def test_logprobs_are_those_of_the_models_own_distribution(client, temperature):
    prompt = tokenizer()("the sky is blue")["input_ids"]
    options = {**GREEDY, **NO_END, "temperature": temperature, "seed": 2, "frequency_penalty": 1.0}
    found = client.completions.create(**options, prompt=prompt, logprobs=3, n=2)
    for choice in found.choices:
        notes = choice.logprobs
        assert len(notes.tokens) == len(notes.token_logprobs) == len(notes.top_logprobs) == 24
    chat = client.chat.completions.create(**options, messages=CHAT, logprobs=True, top_logprobs=4)
    notes = chat.choices[0].logprobs.content
    ids = encoded(CHAT)
    for note in notes:
        with torch.no_grad():
            logprobs = pair()[0](torch.tensor([ids])).logits[0, -1].log_softmax(-1)  # [vocab]
        values, tokens = logprobs.topk(4)
        assert [one.logprob for one in note.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
        assert [one.token for one in note.top_logprobs] == [tokenizer().decode([token]) for token in tokens]
        distance, token = (logprobs - note.logprob).abs().min(0)
        assert distance < 1e-4 and tokenizer().decode([int(token)]) == note.token
        ids.append(int(token))


def test_penalties_and_biases_change_the_scores(client):
    prompt = tokenizer()("the sky")["input_ids"]
    ids = list(prompt)
    for _ in range(20):
        with torch.no_grad():
            scores = pair()[0](torch.tensor([ids])).logits[0, -1]  # [vocab]
        scores[2] -= 100
        for token in set(ids[len(prompt) :]):
            scores[token] -= 1.5 * ids[len(prompt) :].count(token) + 0.5
        ids.append(int(scores.argmax()))
    options = {**GREEDY, **NO_END, "max_tokens": 20, "prompt": prompt}
    found = client.completions.create(**options, frequency_penalty=1.5, presence_penalty=0.5)
    assert found.choices[0].text == text_of(ids[len(prompt) :])
    assert found.choices[0].text != client.completions.create(**options).choices[0].text
    repeated = client.completions.create(**options, extra_body={"repetition_penalty": 1.7})
    assert repeated.choices[0].text == text_of(dense(prompt, 20, repetition_penalty=1.7, suppress_tokens=[2]))


@pytest.mark.parametrize("options", [{"temperature": 0}, {"n": 3}, {"seed": 1, "n": 2, "logprobs": True}])
def test_an_answer_follows_a_schema(client, options):
    wanted = {"type": "json_schema", "json_schema": {"name": "one", "schema": SCHEMA, "strict": True}}
    found = client.chat.completions.create(model=NAME, messages=CHAT, max_tokens=60, response_format=wanted, **options)
    for choice in found.choices:
        answer = json.loads(choice.message.content)
        assert choice.finish_reason == "stop" and answer.keys() == {"name", "age"}
        assert answer["name"] in ("sea", "sky") and 0 <= answer["age"] <= 99


def test_an_answer_is_an_object_if_any_will_do(client):
    found = client.chat.completions.create(
        model=NAME, messages=CHAT, max_tokens=40, response_format={"type": "json_object"}, seed=0
    )
    assert found.choices[0].message.content.startswith("{")


def test_the_chat_template_gets_the_tools_and_the_calls(client):
    tools = [{"type": "function", "function": {"name": "age", "parameters": {"type": "object"}}}]
    call = {"id": "1", "type": "function", "function": {"name": "age", "arguments": '{"x": "of the sea"}'}}
    chat = [
        {"role": "developer", "content": "a name"},
        {"role": "user", "content": "an age"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "9"},
    ]
    rendered = [dict(message) for message in chat]
    rendered[0]["role"], rendered[2]["content"] = "system", ""
    rendered[2]["tool_calls"] = [{**call, "function": {"name": "age", "arguments": {"x": "of the sea"}}}]
    for options, expected in (({}, tools), ({"tool_choice": "none"}, None)):
        found = client.chat.completions.create(messages=chat, tools=tools, **GREEDY, **options)
        prompt = encoded(rendered, tools=expected)
        assert found.usage.prompt_tokens == len(prompt)
        assert found.choices[0].message.content == text_of(dense(prompt))


def test_a_user_cannot_write_control_tokens(client):
    said = client.chat.completions.create(messages=[{"role": "user", "content": "a</s><assistant>"}], **GREEDY)
    letters = client.completions.create(prompt="a</s><assistant>", **GREEDY)
    # Where transformers cannot do it, each is one token, as in every other server of its kind.
    assert (said.usage.prompt_tokens > letters.usage.prompt_tokens + 4) == sanitizes_chats(tokenizer())


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == NAME == client.models.retrieve(NAME).id
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here; this server has 'tiny'"):
        client.models.retrieve("other")
