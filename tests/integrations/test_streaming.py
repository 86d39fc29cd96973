"""Streamers: transformers' own unchanged, and one for several rows whose consumers may go away."""

import asyncio
import threading

import pytest
import torch
from transformers import (
    AsyncTextIteratorStreamer,
    TextIteratorStreamer,
    TextStreamer,
)

import hf_paged
from hf_paged_integrations.serving.streaming import BatchTextIteratorStreamer
from support import texts, zoo
from support.packing import LENGTHS, SAMPLE, pair
from support.pipes import settled
from support.streams import LONG, LOOPS
from support.threads import in_threads


def started(model, streamer, inputs, **options) -> threading.Thread:
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **LENGTHS, **options, "streamer": streamer})
    thread.start()
    return thread


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("options", [{}, SAMPLE], ids=["greedy", "sample"])
@pytest.mark.parametrize("skip_prompt", [False, True])
def test_streamers_of_transformers(loop, options, skip_prompt, capsys):
    models, tokenizer, found = pair(), texts.tokenizer(), []
    for model in models:
        torch.manual_seed(0)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=skip_prompt, timeout=30)
        thread = started(model, streamer, zoo.prompts([9]), **options, **LOOPS[loop])
        pieces = list(streamer)
        thread.join()
        torch.manual_seed(0)
        model.generate(
            **zoo.prompts([9]), **LENGTHS, **options, **LOOPS[loop], streamer=TextStreamer(tokenizer, skip_prompt)
        )
        found.append((pieces, capsys.readouterr().out))
    assert found[0] == found[1] and "".join(found[0][0]) + "\n" == found[0][1]


def test_async_streamers_while_other_calls_run():
    dense, paged = pair(token_budget=64)
    prompts = [zoo.prompts([5 + seed], seed=seed) for seed in range(4)]
    tokenizer = texts.tokenizer()
    expected = [tokenizer.decode(dense.generate(**inputs, **LENGTHS)[0]) for inputs in prompts]
    ticks = 0

    async def stream(inputs):
        streamer = AsyncTextIteratorStreamer(tokenizer, timeout=30)
        thread = started(paged, streamer, inputs)
        text = "".join([piece async for piece in streamer])
        await asyncio.to_thread(thread.join)
        return text

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    async def program():
        ticking = asyncio.create_task(tick())
        other = asyncio.to_thread(paged.generate, **zoo.prompts([9, 3]), **LENGTHS)
        *streamed, batch = await asyncio.gather(*map(stream, prompts), other)
        ticking.cancel()
        return streamed, batch

    streamed, batch = asyncio.run(program())
    assert streamed == expected
    assert torch.equal(batch, dense.generate(**zoo.prompts([9, 3]), **LENGTHS))
    assert ticks > 3, "the event loop stood still"


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("options", [{}, SAMPLE], ids=["greedy", "sample"])
@pytest.mark.parametrize("which", ["dense", "paged"])
def test_each_row_of_a_batch_streams_what_it_would_alone(loop, options, which):
    model, tokenizer = pair()[which == "paged"], texts.tokenizer()
    inputs, options = zoo.prompts([13, 4, 21, 1]), {**options, "eos_token_id": [2, *range(60, 75)]}
    torch.manual_seed(0)
    output = zoo.pair("llama")[0].generate(**inputs, **LENGTHS, **options)[:, 21:].tolist()
    ends = [[at for at, token in enumerate(row, 1) if token in options["eos_token_id"]] for row in output]
    lengths = [min([*at, len(row)]) for at, row in zip(ends, output)]
    assert len(set(lengths)) > 1, "the rows must end at different times"
    streamer = BatchTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    torch.manual_seed(0)
    thread = started(model, streamer, inputs, **options, **LOOPS[loop])
    pieces = list(streamer)
    thread.join()
    for row, (tokens, length) in enumerate(zip(output, lengths)):
        assert "".join(text for number, text in pieces if number == row) == tokenizer.decode(tokens[:length])


def test_rows_have_consumers_of_their_own():
    dense, paged = pair(token_budget=64)
    tokenizer, inputs = texts.tokenizer(), zoo.prompts([9, 3, 5])
    output = dense.generate(**inputs, **LENGTHS)
    streamer = BatchTextIteratorStreamer(tokenizer, timeout=30, skip_special_tokens=True)
    *rows, _ = in_threads(
        *(lambda row=row: "".join(streamer.row(row)) for row in range(3)),
        lambda: paged.generate(**inputs, **LENGTHS, streamer=streamer),
    )
    assert rows == tokenizer.batch_decode(output, skip_special_tokens=True)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_row_whose_consumer_goes_away_ends_and_the_others_go_on(loop):
    _, paged = pair()
    streamer = BatchTextIteratorStreamer(texts.tokenizer(after=" "), skip_prompt=True, timeout=30)
    thread = started(paged, streamer, zoo.prompts([9, 3]), **LONG, **LOOPS[loop])
    for _ in streamer.row(0):
        break
    other = "".join(streamer.row(1))
    thread.join()
    streamed = [row for row, token in streamer._events if token is not None]
    assert streamed.count(0) < streamed.count(1) == 150 and other


@pytest.mark.parametrize("loop", LOOPS)
def test_a_call_whose_consumer_goes_away_ends(loop):
    _, paged = pair(blocks=60)
    with BatchTextIteratorStreamer(texts.tokenizer(after=" "), skip_prompt=True, timeout=30) as streamer:
        thread = started(paged, streamer, zoo.prompts([9, 3, 5, 7]), **LONG, **LOOPS[loop])
        next(iter(streamer))
    thread.join(timeout=30)
    assert not thread.is_alive() and settled(paged)
    assert sum(token is not None for _, token in streamer._events) < 4 * 150


def test_what_generate_raises_reaches_the_consumer():
    _, paged = pair(blocks=8)
    streamer = BatchTextIteratorStreamer(texts.tokenizer(), timeout=30)
    caught = in_threads(lambda: list(streamer), lambda: paged.generate(**zoo.prompts([9]), **LONG, streamer=streamer))
    assert all(isinstance(error, hf_paged.OutOfBlocksError) for error in caught), caught


def test_a_stream_that_never_begins_times_out():
    with pytest.raises(TimeoutError, match="no token came for 0.05 seconds"):
        next(iter(BatchTextIteratorStreamer(texts.tokenizer(), timeout=0.05)))


@pytest.mark.parametrize("which", ["dense", "paged"])
def test_assisted_decoding_streams_too(which):
    model, tokenizer = pair()[which == "paged"], texts.tokenizer()
    inputs, options = zoo.prompts([12]), {"prompt_lookup_num_tokens": 3}
    streamer = BatchTextIteratorStreamer(tokenizer, timeout=30)
    started(model, streamer, inputs, **options).join()
    assert "".join(streamer.row(0)) == tokenizer.decode(model.generate(**inputs, **LENGTHS, **options)[0])
