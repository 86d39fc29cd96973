"""The random numbers of a draw on this device: what must hold for one row's draw to be replayed without the others.

``multinomial(p, 1)`` is the likeliest of p over exponential noise. On CUDA that noise is Philox over the whole
``[batch, vocab]`` tensor, in an order that depends on its size and on the card's processors.
"""

import math

import torch

from hf_paged_evals.gpu.context import Context
from hf_paged_evals.gpu.timing import device_us

_SEED = 7
_WORD = 0xFFFFFFFF
_BLOCK_THREADS, _BLOCKS_A_PROCESSOR, _UNROLL = 256, 8, 4  # Of torch's kernels that fill a tensor with random numbers.


def run(context: Context) -> None:
    """Record which of the premises hold on this device."""
    rows, vocab = (4, 97) if context.is_dry else (32, 128256)
    device = context.device
    probabilities = torch.randn(rows, vocab, device=device).softmax(-1)
    torch.manual_seed(_SEED)
    drawn = torch.multinomial(probabilities, 1).squeeze(1)
    torch.manual_seed(_SEED)
    noise = torch.empty_like(probabilities).exponential_(1)
    torch.manual_seed(_SEED)
    halves = torch.cat([torch.empty(rows // 2, vocab, device=device).exponential_(1) for _ in range(2)])
    torch.manual_seed(_SEED)
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    own = torch.Generator(device)
    own.set_state(state)
    context.say(
        "draws",
        is_argmax_of_ratio=torch.equal((probabilities / noise).argmax(-1), drawn),
        own_generator_gives_the_same=torch.equal(torch.empty_like(noise).exponential_(1, generator=own), noise),
        parts_give_the_same=torch.equal(halves, noise),
        state_bytes=state.numel(),
    )
    if device.type != "cuda":
        context.refuse("Philox, number by number", "a CPU draws from another generator")
        return
    _check_philox(context, noise.flatten(), state)
    for count in (32, 256):
        scores = torch.empty(count, vocab, device=device).normal_()
        context.say(
            "draw_cost",
            rows=count,
            exponential_us=device_us(context, lambda scores=scores: scores.exponential_(1)),
            softmax_us=device_us(context, lambda scores=scores: scores.softmax(-1)),
            argmax_us=device_us(context, lambda scores=scores: scores.argmax(-1)),
        )


def _check_philox(context: Context, first: torch.Tensor, state: torch.Tensor) -> None:
    """Compute single numbers of two draws in a row, and compare them with the draws, ``[rows * vocab]``."""
    count = len(first)
    processors = torch.cuda.get_device_properties(context.device).multi_processor_count
    torch.cuda.set_rng_state(state, context.device)
    torch.empty_like(first).exponential_(1)
    offset = int(torch.cuda.get_rng_state(context.device)[8:16].view(torch.int64))
    second = torch.empty_like(first).exponential_(1)
    threads = _num_threads(count, processors)
    places = [0, 1, 255, 256, threads - 1, threads, 4 * threads - 1, 4 * threads, count - 1]
    places = sorted({place for place in places if place < count})
    errors = [
        max(abs(float(draw[place]) / exponential_at(_SEED, start, place, count, processors) - 1) for place in places)
        for draw, start in ((first, 0), (second, offset))
    ]
    context.say("philox", numbers=len(places), first_error=errors[0], second_error=errors[1], offset=offset)


def exponential_at(seed: int, offset: int, place: int, count: int, processors: int) -> float:
    """One number of ``torch.empty(count, device="cuda").exponential_(1)``.

    Parameters
    ----------
    offset : int
        Of the generator before the draw.
    place : int
        Index of the number.
    processors : int
        Of the card: they bound the threads that draw.
    """
    threads = _num_threads(count, processors)
    turn, rest = divmod(place, _UNROLL * threads)
    part, thread = divmod(rest, threads)
    bits = philox(seed, thread, offset // 4 + turn)[part]
    uniform = _float32(_float32(bits * 2.0**-32) + 2.0**-33)  # In (0, 1], as curand_uniform gives it.
    return 2.0**-24 if uniform >= 1 - 2.0**-24 else -math.log(uniform)


def _num_threads(count: int, processors: int) -> int:
    return _BLOCK_THREADS * min(processors * _BLOCKS_A_PROCESSOR, -(-count // _BLOCK_THREADS))


def _float32(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float32))


def philox(seed: int, subsequence: int, counter: int) -> list[int]:
    """Four words of Philox4x32-10."""
    words = [counter & _WORD, counter >> 32, subsequence & _WORD, subsequence >> 32]
    keys = [seed & _WORD, seed >> 32]
    for _ in range(10):
        low, high = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [
            (high >> 32) ^ words[1] ^ keys[0], high & _WORD,
            (low >> 32) ^ words[3] ^ keys[1], low & _WORD,
        ]  # fmt: skip
        keys = [(keys[0] + 0x9E3779B9) & _WORD, (keys[1] + 0xBB67AE85) & _WORD]
    return words
