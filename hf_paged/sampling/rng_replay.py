"""ReplayedNoise: the random numbers of a sampling call, row by row, as one dense ``generate`` would draw them.

Dense draws for the whole batch at every logical step, finished rows included. Here a row may be ahead of another, wait
in the queue, or be preempted, and still gets the numbers of its own row and step: the state of the generator is kept
every few rows, and what a late row needs is drawn again.

Where torch was never seeded, and calls run at the same time that dense would run in turn, there are no numbers to
follow. Such calls go without a replay: they draw one number a token instead of one for every word of the vocabulary.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_CHUNK_ROWS = 8
_lock = threading.Lock()
_thread = threading.local()
_SEED_AT_IMPORT = torch.initial_seed()
# A process starts with a random seed of 64 bits. A smaller one was set by the program, before this module came.
_LEAST_RANDOM_SEED = 2**40


def is_unseeded() -> bool:
    """Tell whether torch still has the random seed of the process, so that no sampled result can be expected."""
    return torch.initial_seed() == _SEED_AT_IMPORT >= _LEAST_RANDOM_SEED


@contextmanager
def no_replay() -> Iterator[None]:
    """Let the calls that this thread makes meanwhile draw random numbers in any order."""
    _thread.is_replaying = False
    try:
        yield
    finally:
        _thread.is_replaying = True


def is_replaying() -> bool:
    """Tell whether a call that this thread makes now must draw the random numbers of dense."""
    return getattr(_thread, "is_replaying", True)


class ReplayedNoise:
    """Exponential noise ``[batch, vocab]`` for each logical step of a call.

    ``torch.multinomial(p, 1)`` on the CPU is ``(p / noise).argmax()``, with one such noise a call. Noise drawn for
    chunks of rows, in order, equals the noise of all rows at once.

    Takes over the state of torch's global CPU generator. The first use moves that on by one number, so that calls at
    the same time differ; `close` puts it where dense would have left it, unless others have moved it meanwhile.

    A method that is interrupted can be called again: it changes nothing before its end.

    Parameters
    ----------
    batch_size, vocab_size : int
    dtype : torch.dtype
        Of the probabilities. The noise is of it.
    """

    def __init__(self, batch_size: int, vocab_size: int, dtype: torch.dtype = torch.float32):
        self._chunks = [(first, min(first + _CHUNK_ROWS, batch_size)) for first in range(0, batch_size, _CHUNK_ROWS)]
        self._vocab_size, self._dtype = vocab_size, dtype
        self._states: dict[tuple[int, int], torch.Tensor] = {}  # (step, chunk) -> state before it
        self._left: torch.Tensor | None = None  # The state in which the first use left the global generator.
        self._front = (0, torch.get_rng_state())  # Logical steps drawn so far, and the state after them.

    def rows(self, step: int, rows: list[int]) -> torch.Tensor:
        """Return the noise of some rows at a logical step.

        Parameters
        ----------
        step : int
        rows : list of int
            In rising order.

        Returns
        -------
        torch.Tensor
            ``[len(rows), vocab]``
        """
        self._part_from_others()
        chunks: dict[int, torch.Tensor] = {}
        wanted = {row // _CHUNK_ROWS for row in rows}
        while self._front[0] <= step:
            noise = self._draw_next_step()
            if self._front[0] > step:
                chunks = {number: noise[number] for number in wanted}
        for number in wanted - chunks.keys():
            chunks[number] = self._draw_chunk(number, _generator(self._states[step, number]))
        return torch.stack([chunks[row // _CHUNK_ROWS][row % _CHUNK_ROWS] for row in rows])

    def forget_before(self, step: int) -> None:
        """Drop the states of steps that every row has passed."""
        for key in [key for key in self._states if key[0] < step]:
            del self._states[key]

    def close(self, num_steps: int) -> None:
        """Leave the global generator as dense would after `num_steps` logical steps. Rows may have gone on longer."""
        while self._front[0] < num_steps:
            self._draw_next_step()
        state = self._front[1] if self._front[0] == num_steps else self._states[num_steps, 0]
        with _lock:
            if self._left is not None and torch.equal(torch.get_rng_state(), self._left):
                torch.set_rng_state(state)

    def _part_from_others(self) -> None:
        """Let a call that begins now start from other numbers."""
        if self._left is None:
            with _lock:
                torch.rand(1)
                self._left = torch.get_rng_state()

    def _draw_next_step(self) -> list[torch.Tensor]:
        """Draw the noise of the next logical step, one tensor ``[rows, vocab]`` per chunk."""
        step, state = self._front
        generator, noise = _generator(state), []
        for number in range(len(self._chunks)):
            self._states[step, number] = generator.get_state()
            noise.append(self._draw_chunk(number, generator))
        self._front = (step + 1, generator.get_state())
        return noise

    def _draw_chunk(self, number: int, generator: torch.Generator) -> torch.Tensor:
        first, end = self._chunks[number]
        return torch.empty(end - first, self._vocab_size, dtype=self._dtype).exponential_(1, generator=generator)


def _generator(state: torch.Tensor) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(state)
    return generator
