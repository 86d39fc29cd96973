"""ReplayedNoise: the random numbers of a sampling call, row by row, as one dense ``generate`` would draw them.

Dense draws for the whole batch at every logical step, finished rows included. Here a row may be ahead of another, wait
in the queue, or be preempted, and still gets the numbers of its own row and step: the state of the generator is kept
for each draw, and what a late row needs is drawn again.

How much a draw is depends on the device. The CPU's generator makes one number after another: noise drawn for a few
rows at a time, in order, equals the noise of all rows at once. A GPU's Philox generator makes the numbers of a tensor
by their places in it: there the noise of a step is drawn whole, as dense draws it, and its state is 16 bytes. Which of
the two holds, if any, `draws_of` finds by experiment.

Where torch was never seeded, and calls run at the same time that dense would run in turn, there are no numbers to
follow. Such calls go without a replay.
"""

import enum
import functools
import itertools
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch

from hf_paged.sampling.row_picker import RowPicker

_CPU = torch.device("cpu")
_CHUNK_ROWS = 8
_KEPT_BYTES = 32 * 2**20  # Noise that a call keeps for rows that come late, at most.
_FAR = 2**32  # Of a generator's offset: more numbers than a call draws.
_lock = threading.Lock()
_thread = threading.local()
_SEED_AT_IMPORT = torch.initial_seed()
_seeds: dict[torch.device, int] = {}  # Of other devices' generators, as `is_unseeded` saw them first.
# A process starts with a random seed of 53 bits or more. A smaller one was set by the program, before this module came.
_LEAST_RANDOM_SEED = 2**40


def is_unseeded(device: torch.device = _CPU) -> bool:
    """Tell whether torch still has the random seed of the process, so that no sampled result can be expected.

    Parameters
    ----------
    device : torch.device
        Where tokens are sampled. ``torch.manual_seed`` seeds all devices, and a device can be seeded by itself. Its
        generator begins at its first use: a seed below 2**40 is known as one that was set, a larger one only if this
        function was called before it was set.
    """
    if not torch.initial_seed() == _SEED_AT_IMPORT >= _LEAST_RANDOM_SEED:
        return False
    if device.type == "cpu" or draws_of(device) is Draws.UNKNOWN:
        return True
    seed = _generator(_default_state(device), device).initial_seed()
    return _seeds.setdefault(device, seed) == seed >= _LEAST_RANDOM_SEED


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


class Draws(enum.Enum):
    """How a device's generator draws the noise of a step."""

    IN_ORDER = enum.auto()  # One number after another: chunks of rows are drawn by themselves.
    WHOLE = enum.auto()  # By the place in the tensor: all rows are drawn at once.
    UNKNOWN = enum.auto()  # Its state cannot be had, or ``torch.multinomial`` samples in another way.


@functools.cache
def draws_of(device: torch.device) -> Draws:
    """Find out how a device draws, by experiment, with generators of its own. Waits for the device, once.

    Raises
    ------
    torch.OutOfMemoryError
        If the device has no memory for a few megabytes.
    """
    num_rows, vocab = 2 * _CHUNK_ROWS, 20_011  # More numbers than a GPU has threads.
    try:
        generators = [_generator(_default_state(device), device) for _ in range(3)]
        shares = torch.rand(num_rows, vocab, device=device, generator=generators[0]).softmax(-1)
        for generator in generators:
            generator.set_state(_default_state(device))
        tokens = torch.multinomial(shares, 1, generator=generators[0])
        noise = torch.empty_like(shares).exponential_(1, generator=generators[1])
        chunks = [torch.empty_like(part).exponential_(1, generator=generators[2]) for part in shares.split(_CHUNK_ROWS)]
        states = [generator.get_state() for generator in generators]
        is_argmax = torch.equal((shares / noise).argmax(-1, keepdim=True), tokens)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, RuntimeError):  # The device has no generators, or none with a state.
        return Draws.UNKNOWN
    if not is_argmax or not torch.equal(states[0], states[1]):
        return Draws.UNKNOWN
    is_in_order = torch.equal(states[1], states[2]) and torch.equal(torch.cat(chunks), noise)
    return Draws.IN_ORDER if is_in_order else Draws.WHOLE


class ReplayedNoise:
    """Exponential noise ``[batch, vocab]`` for each logical step of a call.

    ``torch.multinomial(p, 1)`` is ``(p / noise).argmax()``, with one such noise a call.

    Takes over the state of the device's default generator. The first use moves that on, so that calls at the same time
    differ; `close` puts it where dense would have left it, unless others have moved it meanwhile.

    Noise that rows may still ask for is kept, the newest 32 MiB of it; what is older is drawn again. Where noise is
    drawn whole, rows at different steps cost a draw ``[batch, vocab]`` for each of these steps, kept ones excepted.

    A method that is interrupted can be called again: it changes nothing before its end.

    Parameters
    ----------
    batch_size, vocab_size : int
    dtype : torch.dtype
        Of the probabilities. The noise is of it.
    device : torch.device
        Of the probabilities. Its `draws_of` must not be unknown.
    """

    def __init__(
        self, batch_size: int, vocab_size: int, dtype: torch.dtype = torch.float32, device: torch.device = _CPU
    ):
        size = _CHUNK_ROWS if draws_of(device) is Draws.IN_ORDER else batch_size
        self._chunk_rows = size
        self._chunks = [(first, min(first + size, batch_size)) for first in range(0, batch_size, size)]
        self._vocab_size, self._dtype, self._device = vocab_size, dtype, device
        self._states: dict[tuple[int, int], torch.Tensor] = {}  # (step, chunk) -> state before it
        self._kept: dict[int, dict[int, torch.Tensor]] = {}  # Step -> its noise, by chunk; in rising order.
        self._picker = RowPicker(device)
        self._num_kept = _KEPT_BYTES // (batch_size * vocab_size * dtype.itemsize)
        self._left: torch.Tensor | None = None  # The state in which the first use left the global generator.
        self._front = (0, _default_state(device))  # Logical steps drawn so far, and the state after them.

    def rows(self, step: int, rows: Sequence[int]) -> torch.Tensor:
        """Return the noise of some rows at a logical step.

        Parameters
        ----------
        step : int
        rows : sequence of int
            In rising order.

        Returns
        -------
        torch.Tensor
            ``[len(rows), vocab]``, not to be changed.
        """
        self._part_from_others()
        drawn = self._kept.get(step, {})
        wanted = {row // self._chunk_rows for row in rows}
        while self._front[0] <= step:
            drawn = self._draw_next_step(wanted)
        parts = []
        for number, some in itertools.groupby(rows, lambda row: row // self._chunk_rows):
            noise = drawn[number] if number in drawn else self._draw_again(step, number)
            first = self._chunks[number][0]
            parts.append(self._picker.take(noise, [row - first for row in some]))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def forget_before(self, step: int) -> None:
        """Drop what is kept of steps that every row has passed."""
        for key in [key for key in self._states if key[0] < step]:
            del self._states[key]
        for passed in [kept for kept in self._kept if kept < step]:
            del self._kept[passed]

    def close(self, num_steps: int) -> None:
        """Leave the default generator as dense would after `num_steps` logical steps. Rows may have gone on longer."""
        while self._front[0] < num_steps:
            self._draw_next_step(())
        state = self._front[1] if self._front[0] == num_steps else self._states[num_steps, 0]
        with _lock:
            if self._left is not None and torch.equal(_default_state(self._device), self._left):
                _set_default_state(state, self._device)

    def _part_from_others(self) -> None:
        """Let a call that begins now start from other numbers."""
        if self._left is None:
            with _lock:
                _move_on(self._device)
                self._left = _default_state(self._device)

    def _draw_next_step(self, wanted: Collection[int]) -> dict[int, torch.Tensor]:
        """Draw the noise of the next logical step: a tensor ``[rows, vocab]`` for each chunk.

        A call of many rows, whose noise is not kept, has that of the `wanted` chunks alone at once.
        """
        step, state = self._front
        generator, noise = _generator(state, self._device), dict[int, torch.Tensor]()
        for number in range(len(self._chunks)):
            self._states[step, number] = generator.get_state()
            drawn = self._draw_chunk(number, generator)
            if self._num_kept or number in wanted:
                noise[number] = drawn
        if self._num_kept:
            self._kept[step] = noise
            self._kept.pop(step - self._num_kept, None)
        self._front = (step + 1, generator.get_state())
        return noise

    def _draw_again(self, step: int, number: int) -> torch.Tensor:
        return self._draw_chunk(number, _generator(self._states[step, number], self._device))

    def _draw_chunk(self, number: int, generator: torch.Generator) -> torch.Tensor:
        first, end = self._chunks[number]
        noise = torch.empty(end - first, self._vocab_size, dtype=self._dtype, device=self._device)
        return noise.exponential_(1, generator=generator)


def _generator(state: torch.Tensor, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(state)
    return generator


def _default_state(device: torch.device) -> torch.Tensor:
    """Return the state of the device's default generator, on the host."""
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)


def _set_default_state(state: torch.Tensor, device: torch.device) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def _move_on(device: torch.device) -> None:
    """Move the default generator on, to numbers that no call that runs now has drawn in the same order.

    A step of a Philox generator takes a few of its offsets, whatever the tensor: a generator that is one number ahead
    would draw the noise of the next step.
    """
    if device.type != "cpu":
        generator = _generator(_default_state(device), device)
        try:
            generator.set_offset((generator.get_offset() + _FAR) % 2**63)
        except RuntimeError:  # Its numbers have no offset.
            pass
        else:
            _set_default_state(generator.get_state(), device)
            return
    torch.rand(1, device=device)
