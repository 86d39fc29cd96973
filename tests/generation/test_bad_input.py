"""Bad input, by `generate`, a pipeline and the async engine: what it gets; good calls go on, the pool stays whole."""

import asyncio
import re

import pytest
import torch
from transformers import TextGenerationPipeline

import hf_paged
from hf_paged_integrations.serving.async_engine import AsyncEngine
from support import texts
from support.packing import LENGTHS, pair
from support.streams import alone, prompt, tokens_of
from support.threads import in_threads

GREEDY = {**LENGTHS, "do_sample": False}
LONG_TEXT = "a" * 300
# What is asked of a gpt2 of 256 positions: (tokens, text, options).
ASKED = {
    "empty": ([], "", {}),
    "over_the_models_limit": ([5] * 300, LONG_TEXT, {}),
    "unknown_argument": ([5] * 9, "aaaa", {"max_new_token": 3}),
    "no_such_token": ([5] * 4 + [90_000], None, {}),
}
NEVER_FITS = ([5] * 100, "a" * 100, {})


def error_of(call) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:
        call()
    return type(caught.value), str(caught.value)


def generate(model, tokens, options):
    ids = torch.tensor([tokens], dtype=torch.long)
    return model.generate(ids, **{**GREEDY, **options})


def in_pipeline(model, text, options):
    """Good items, the bad one, and good ones again, which come when they are asked for."""
    model.generation_config.bos_token_id = None  # An empty prompt would begin with it.
    pipe = TextGenerationPipeline(model=model, tokenizer=texts.tokenizer(), **GREEDY)
    results = iter(pipe((item for item in ["a", "b", text, "c"]), **options))
    if not options:
        assert next(results) and next(results)
    try:
        next(results)
    finally:
        if not options:
            assert next(results)[0]["generated_text"].startswith("c")


@pytest.mark.parametrize("case", ASKED)
def test_generate_says_what_stock_says_and_others_go_on(case):
    tokens, _, options = ASKED[case]
    dense, paged = pair(name="gpt2", token_budget=512)
    expected = alone(dense, prompt(6), **GREEDY)
    good = lambda: alone(paged, prompt(6), **GREEDY)  # noqa: E731
    first, bad, last = in_threads(good, lambda: error_of(lambda: generate(paged, tokens, options)), good)
    assert bad == error_of(lambda: generate(dense, tokens, options))
    assert first == last == expected and not hf_paged.stats(paged).used_blocks


@pytest.mark.parametrize("case", [case for case in ASKED if ASKED[case][1] is not None])
def test_pipelines_say_what_stock_says_in_its_place(case):
    _, text, options = ASKED[case]
    dense, paged = pair(name="gpt2", token_budget=512)
    assert error_of(lambda: in_pipeline(paged, text, options)) == error_of(lambda: in_pipeline(dense, text, options))
    assert not hf_paged.stats(paged).used_blocks


@pytest.mark.parametrize("case", [case for case in ASKED if case != "empty"])
def test_the_async_engine_says_what_stock_says_and_others_go_on(case):
    tokens, _, options = ASKED[case]
    dense, paged = pair(name="gpt2", token_budget=512)

    async def program():
        async with AsyncEngine(paged) as requests:
            good, bad = requests.stream(prompt(6), **GREEDY), requests.stream(tokens, **{**GREEDY, **options})
            return await asyncio.gather(tokens_of(good), tokens_of(bad), return_exceptions=True)

    good, bad = asyncio.run(program())
    assert (type(bad), str(bad)) == error_of(lambda: generate(dense, tokens, options))
    assert good == alone(dense, prompt(6), **GREEDY) and not hf_paged.stats(paged).used_blocks


@pytest.mark.parametrize("ids", [[], torch.zeros(2, 3), 7])
def test_the_async_engine_refuses_what_is_not_one_prompt(ids):
    async def program():
        async with AsyncEngine(pair()[1]) as requests:
            requests.stream(ids)

    with pytest.raises(ValueError, match=r"a request is one prompt, \[tokens\] or \[1, tokens\], not empty; got \["):
        asyncio.run(program())


def test_the_async_engine_refuses_several_answers():
    async def program():
        async with AsyncEngine(pair()[1]) as requests:
            await tokens_of(requests.stream(prompt(4), **LENGTHS, do_sample=True, num_return_sequences=2))

    with pytest.raises(ValueError, match="a stream carries one answer, got 2: leave num_return_sequences out"):
        asyncio.run(program())


@pytest.mark.parametrize("how", ["generate", "pipeline", "stream"])
def test_a_prompt_that_can_never_fit_the_pool(how):
    _, paged = pair(blocks=20)
    tokens, text, options = NEVER_FITS

    async def program():
        async with AsyncEngine(paged) as requests:
            return await tokens_of(requests.stream(tokens, **GREEDY))

    call = {
        "generate": lambda: generate(paged, tokens, options),
        "pipeline": lambda: in_pipeline(paged, text, options),
        "stream": lambda: asyncio.run(program()),
    }[how]
    kind, message = error_of(call)
    assert kind is hf_paged.OutOfBlocksError
    assert re.match(r"needs 25 blocks, \d+ of 20 are free: lower the batch or the context, or raise memory_", message)
    assert not hf_paged.stats(paged).used_blocks
