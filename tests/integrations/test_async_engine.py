"""The async engine: many requests at once, each with its own options; refusals; and nothing left behind."""

import asyncio
import threading

import pytest
import torch

import hf_paged
from hf_paged.sampling.row_streamer import RowStreamer
from hf_paged.sampling.sampler import Sampler
from hf_paged_integrations.serving.async_engine import AsyncEngine, EngineClosedError, QueueFullError
from support import zoo
from support.packing import LENGTHS, SAMPLE, pair
from support.streams import LONG, LOOPS, alone, prompt, tokens_of

CONFIGS = [
    {**LENGTHS},
    {**LENGTHS, "max_new_tokens": 5},
    {**LENGTHS, "repetition_penalty": 1.3},
    {**LENGTHS, "eos_token_id": [2, *range(60, 75)]},
    {**LENGTHS, "num_beams": 1, "no_repeat_ngram_size": 2},
]


def run(program):
    return asyncio.run(asyncio.wait_for(program, 60))


async def empty(model) -> None:
    """Wait until nothing is stored."""
    for _ in range(500):
        if not hf_paged.stats(model).used_blocks:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(hf_paged.stats(model))


def test_requests_with_criteria_of_their_own_share_steps(rows):
    """The criterion keeps the number of its calls, and looks at the tokens of its request."""

    class Stop:
        def __init__(self):
            self.calls = 0

        def __call__(self, input_ids, scores, **kwargs):
            self.calls += 1
            return self.calls > 12 and int(input_ids[0, -1]) % 3 == 0

    dense, paged = pair(token_budget=64)
    prompts = [prompt(4 + number, number) for number in range(6)]
    expected = [alone(dense, ids, **LONG, stopping_criteria=[Stop()]) for ids in prompts]

    async def program():
        async with AsyncEngine(paged) as requests:
            streams = [requests.stream(ids, **LONG, stopping_criteria=[Stop()]) for ids in prompts]
            return await asyncio.gather(*map(tokens_of, streams))

    assert run(program()) == expected and max(rows) > 2
    stats = hf_paged.stats(paged)
    assert stats.packed_calls == 6 and not stats.fallbacks and stats.page_reads


def test_many_requests_each_with_its_own_config_beside_plain_calls(rows):
    dense, paged = pair(token_budget=64)
    jobs = [(prompt(4 + number, number), CONFIGS[number % len(CONFIGS)]) for number in range(15)]
    expected = [alone(dense, ids, **options) for ids, options in jobs]
    plain = zoo.prompts([9, 3])

    async def program():
        async with AsyncEngine(paged) as requests:
            streams = [requests.stream(ids.tolist(), **options) for ids, options in jobs]
            other = asyncio.to_thread(paged.generate, **plain, **LENGTHS)
            return await asyncio.gather(other, *map(tokens_of, streams))

    other, *found = run(program())
    assert found == expected and torch.equal(other, dense.generate(**plain, **LENGTHS))
    assert max(rows) > 8 and not hf_paged.stats(paged).fallbacks


def test_a_config_object_and_a_seed():
    dense, paged = pair()
    ids, config = prompt(7), zoo.pair("llama")[0].generation_config.__class__(**LENGTHS, **SAMPLE)
    torch.manual_seed(4)
    expected = alone(dense, ids, generation_config=config)

    async def program():
        async with AsyncEngine(paged) as requests:
            torch.manual_seed(4)
            return await tokens_of(requests.stream(ids, config))

    assert run(program()) == expected


def test_tokens_come_one_by_one():
    _, paged = pair()

    async def program():
        async with AsyncEngine(paged) as requests:
            stream = requests.stream(prompt(5), **LONG)
            await anext(stream)
            return stream._streamer.queue.qsize()

    assert run(program()) < 149


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("how", ["abort", "break", "cancel"])
def test_a_consumer_that_goes_away_frees_its_blocks(how, loop):
    dense, paged = pair(token_budget=64)
    expected = alone(dense, prompt(6), **LENGTHS)

    async def leave(requests):
        stream = requests.stream(prompt(9), **{**LONG, "max_new_tokens": 10_000}, **LOOPS[loop])
        async for _ in stream:
            if how == "abort":
                stream.abort()
            if how == "break":
                break

    async def program():
        async with AsyncEngine(paged) as requests:
            tasks = [asyncio.create_task(leave(requests)) for _ in range(3)]
            other = requests.stream(prompt(6), **LENGTHS)
            if how == "cancel":
                while hf_paged.stats(paged).used_blocks < 10:
                    await asyncio.sleep(0.01)
                for task in tasks:
                    task.cancel()
            await asyncio.wait(tasks)
            await empty(paged)
            return await tokens_of(other)

    assert run(program()) == expected


def test_a_thousand_requests_at_a_queue_of_a_hundred():
    dense, paged = pair(token_budget=64)
    ids, options = prompt(4), {**LENGTHS, "max_new_tokens": 3, "min_new_tokens": 3}

    async def program():
        async with AsyncEngine(paged, max_running=8, max_queue=100) as requests:
            streams, refusals = [], []
            for _ in range(1000):
                try:
                    streams.append(requests.stream(ids, **options))
                except QueueFullError as error:
                    refusals.append(error)
            return refusals, await asyncio.gather(*map(tokens_of, streams))

    refusals, found = run(program())
    assert len(found) + len(refusals) == 1000 and len(found) >= 108
    assert str(refusals[0]).startswith("the queue is full: 100 requests wait and 8 run; send this one again")
    assert found == [alone(dense, ids, **options)] * len(found)


def test_a_request_that_waits_can_be_aborted():
    _, paged = pair()

    async def program():
        async with AsyncEngine(paged, max_running=1, max_queue=1) as requests:
            first = requests.stream(prompt(5), **LONG)
            await anext(first)
            second = requests.stream(prompt(5), **LONG)
            with pytest.raises(QueueFullError):
                requests.stream(prompt(5), **LONG)
            second.abort()
            third = requests.stream(prompt(5), **LENGTHS)
            first.abort()
            return await tokens_of(second), await tokens_of(third)

    second, third = run(program())
    assert second == [] and third


class Collected(RowStreamer):
    """Notes what its rows get."""

    def __init__(self, rows: int):
        super().__init__()
        self.tokens, self.ended = [[] for _ in range(rows)], threading.Semaphore(0)
        self.error = None

    def put_rows(self, rows, tokens):
        for row, token in zip(rows, tokens):
            self.tokens[row].append(token)

    def end_rows(self, rows):
        self.ended.release(len(rows)) if rows else None

    def fail(self, error):
        self.error = error
        self.ended.release(len(self.tokens))

    async def over(self) -> None:
        for _ in self.tokens:
            assert await asyncio.to_thread(self.ended.acquire, timeout=30)


def test_rows_are_submitted_with_a_streamer():
    dense, paged = pair(token_budget=64)
    ids = torch.stack([prompt(7), prompt(7, 1)])
    expected = [alone(dense, row, **LENGTHS) for row in ids]

    async def program():
        async with AsyncEngine(paged, max_running=1) as requests:
            streamers = [Collected(2) for _ in range(4)]
            submissions = [requests.submit(ids, streamer, **LENGTHS) for streamer in streamers[:3]]
            submissions[1].abort()  # It waits.
            assert (requests.num_running, requests.num_waiting) == (1, 1)
            requests.submit(ids, streamers[3], **{**LENGTHS, "max_new_tokens": -1})
            for streamer in streamers:
                await streamer.over()
            return streamers

    first, aborted, third, wrong = run(program())
    assert first.tokens == third.tokens == expected and aborted.tokens == [[], []]
    assert isinstance(wrong.error, ValueError) and hf_paged.stats(paged).packed_calls == 2


def test_requests_that_draw_freely_choose_together(monkeypatch):
    _, paged = pair(token_budget=64)
    chosen, choose = [], Sampler.choose

    def watched(self, logits, noise=None):
        chosen.append((len(logits), self.replays))
        return choose(self, logits, noise)

    monkeypatch.setattr(Sampler, "choose", watched)

    async def program():
        async with AsyncEngine(paged) as requests:
            streamers = [Collected(2) for _ in range(5)]
            for number, streamer in enumerate(streamers):
                ids = torch.stack([prompt(6, number)] * 2)
                requests.submit(ids, streamer, draws_freely=True, **LENGTHS, **SAMPLE)
            for streamer in streamers:
                await streamer.over()

    run(program())
    assert max(rows for rows, _ in chosen) > 2 and not any(replays for _, replays in chosen)


@pytest.mark.parametrize("timeout", [None, 0.0])
def test_shutdown_waits_or_aborts(timeout):
    _, paged = pair()

    async def program():
        requests = AsyncEngine(paged, max_running=2)
        streams = [requests.stream(prompt(5), **LONG) for _ in range(4)]
        await anext(streams[0])
        await requests.shutdown(timeout)
        with pytest.raises(EngineClosedError, match="takes no more requests"):
            requests.stream(prompt(5), **LONG)
        return [len(await tokens_of(stream)) for stream in streams]

    lengths = run(program())
    assert lengths == [149, 150, 150, 150] if timeout is None else max(lengths) < 149 and lengths[3] == 0


def test_an_error_in_the_program_aborts_what_runs():
    _, paged = pair()

    async def program():
        async with AsyncEngine(paged) as requests:
            stream = requests.stream(prompt(5), **{**LONG, "max_new_tokens": 10_000})
            await anext(stream)
            raise KeyError("the program is broken")

    with pytest.raises(KeyError, match="broken"):
        run(program())


def test_a_loop_that_is_closed_ends_its_requests():
    _, paged = pair()
    kept = []

    async def program():
        requests = AsyncEngine(paged)
        kept.append(requests.stream(prompt(5), **{**LONG, "max_new_tokens": 10_000}))
        await anext(kept[0])

    run(program())
    run(empty(paged))
