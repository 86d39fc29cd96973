"""A seeded simulator of calls on one pool, under faults. Everything of a run follows from its seed.

    PYTHONPATH=tests python -m support.simulator [--seeds 1000] [--first 0]  # counts: runs, faults fired, wrong, leaks
    PYTHONPATH=tests python -m support.simulator --seed 123                   # one run again, with its plan

Real calls run on the real engine, scheduler and pool, in threads of which one runs at a time: at every section and
every sleep the seed says which goes on. The model and the clock are fakes. The model stores a vector of small
numbers for each token and reads their mean back through the real kernels; the next token is a hash of the sum, so it
tells every token that was lost, doubled, or read from somewhere else. Unused slots hold NaN.

One fault is planned in each run: the n-th allocation, copy or forward fails, for once or for good; a device has no
memory for the n-th thing that it does (a layer's copies, a layer's writes, the inputs of a step); a swap space cannot
be written or read; a copy is interrupted; a prompt that the model refuses; an interrupt before the n-th line of
hf_paged's own code in one thread; weights that change during the n-th forward, and back during a later one. Some pools
have a swap space, to which everything goes that makes room. In every other run steps run one ahead of their tokens, as
on an asynchronous device. Each call's rows come again with what they got, as a chat does. Some calls bring a criterion
that counts its calls and ends all rows at once. Afterwards the pool must be whole and empty, and each call that met no
fault must have the tokens of the reference.
"""

import argparse
import contextlib
import errno
import gc
import random
import sys
import threading
import traceback
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from transformers import GenerationConfig
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from hf_paged.cache.batch_state import BatchState
from hf_paged.compat.transformers import CACHE_ARGUMENT
from hf_paged.config import PagedConfig
from hf_paged.errors import OutOfBlocksError
from hf_paged.execution import model_runner
from hf_paged.execution.model_runner import ModelRunner
from hf_paged.execution.packed_cache import packed_mask
from hf_paged.generation import engine as engine_module
from hf_paged.generation.engine import CallState, Engine
from hf_paged.generation.generate_call import GenerateCall
from hf_paged.memory import reservation, stall_detector, swap_space
from hf_paged.memory.kv_pool import KVCacheSpec, KVPool
from support.interrupts import Interrupt, InterruptedAt

VOCAB, END, DIM = 61, 1, 8
BLOCK_SIZE = 4
VERBOSE = False
FAULTS = ("none", "allocation", "copy", "interrupted copy", "device", "forward", "refused", "interrupt", "weights")
SWAP_FAULT = "swap space"


class InjectedError(RuntimeError):
    """The fault of a run."""


class InjectedMemoryError(torch.OutOfMemoryError):
    """The fault of a run, as a device would raise it."""


def vectors(tokens: torch.Tensor, weights: int) -> torch.Tensor:
    """The values that the model stores for tokens ``[n]``: ``[n, DIM]`` of whole numbers below 16."""
    return ((tokens[:, None] * torch.tensor([3, 5, 7, 11, 13, 17, 19, 23]) + weights) % 16).float()


def next_token(sums: list[int], count: int) -> int:
    """The token after a row whose vectors add up to `sums`."""
    return (sum(number * (place + 2) for place, number in enumerate(sums)) * 31 + count) % VOCAB


def reference(prompt: list[int], max_length: int, weights: int) -> list[int]:
    """The tokens of a row that runs alone, with its prompt, to its end."""
    tokens = list(prompt)
    while len(tokens) < max_length:
        sums = vectors(torch.tensor(tokens), weights).sum(0).int().tolist()
        tokens.append(next_token(sums, len(tokens)))
        if tokens[-1] == END:
            break
    return tokens


class FakeModel:
    """Two layers that store the same; the second checks the first. Looks like a model to `ModelRunner`."""

    def __init__(self):
        self.weights, self.refused = 0, None
        self.weights_at: dict[int, int] = {}  # Number of a forward -> the weights from it on.
        self.fails_at: int | None = None
        self.fails_for_good = False
        self.num_forwards, self.num_failures = 0, 0

    def __call__(self, input_ids, position_ids, logits_to_keep, hf_paged_forward, **arguments):
        self.num_forwards += 1
        is_due = self.fails_at is not None and self.num_forwards >= self.fails_at
        if is_due and (self.fails_for_good or not self.num_failures):
            self.num_failures += 1
            raise InjectedError("the forward fails")
        tokens = input_ids[0]
        if self.refused is not None and bool((tokens == self.refused).any()):
            self.num_failures += 1
            raise InjectedError("a token that the model refuses")
        outputs = []
        for index, layer in enumerate(arguments[CACHE_ARGUMENT].layers):
            states = vectors(tokens, self.weights)[None, None]  # [1, 1 head, total, DIM]
            key, value = layer.update(torch.zeros_like(states), states.clone())
            module = SimpleNamespace(layer_idx=index)
            mask = packed_mask(None, states.device)
            self.weights = self.weights_at.get(self.num_forwards, self.weights)  # In the middle of the forward.
            out = hf_paged_forward.attend(module, torch.zeros_like(states), key, value, mask, 1.0, {})
            outputs.append(out[0, :, 0])
        assert self.weights_at or torch.equal(*outputs), "two layers with the same states differ"
        return SimpleNamespace(logits=self._logits(sum(outputs) / 2, position_ids[0], logits_to_keep))

    @staticmethod
    def _logits(means: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(1, len(wanted), VOCAB)
        for place, index in enumerate(wanted.tolist()):
            count = int(positions[index]) + 1
            sums = (means[index] * count).round().int().tolist()
            logits[0, place, next_token(sums, count)] = 1.0
        return logits


class FakeIdentity:
    """The model's weights are all there is to it."""

    def __init__(self, model: FakeModel, *besides):
        self._model, self._weights = model, model.weights
        self.digest = f"weights {model.weights}".encode()

    def holds(self) -> bool:
        return self._model.weights == self._weights

    is_found_again = holds


class Baton:
    """Lets one thread run at a time, chosen by the seed wherever a thread gives it up; keeps the clock."""

    def __init__(self, chance: random.Random):
        self._chance, self._condition = chance, threading.Condition()
        self._waiting: dict[int, object] = {}  # Thread -> what it waits for: a callable, true when it may go on.
        self._holder: int | None = None
        self._threads: set[int] = set()
        self._order: dict[int, int] | None = None  # Thread -> its number; None: the run has not begun.
        self.now = 1000.0

    # The clock, in place of the module `time`.
    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        until = self.now + seconds
        self.give_up(lambda: self.now >= until)

    def join(self) -> None:
        with self._condition:
            self._threads.add(threading.get_ident())
        self.give_up()

    def leave(self) -> None:
        with self._condition:
            self._threads.discard(threading.get_ident())
            self._holder = None
            self._choose()

    def give_up(self, may_go_on=lambda: True) -> None:
        """Let another thread run until the seed says that it is this one's turn and `may_go_on` is true."""
        here = threading.get_ident()
        if here not in self._threads:
            return
        with self._condition:
            self._waiting[here] = may_go_on
            self._condition.notify_all()  # `begin` counts.
            if self._holder == here:
                self._holder = None
            self._choose()
            if not self._condition.wait_for(lambda: self._holder == here, timeout=60):
                raise AssertionError("the run hangs")

    def begin(self, threads: list[threading.Thread]) -> None:
        """Start when all threads have joined."""
        with self._condition:
            self._condition.wait_for(lambda: len(self._waiting) == len(threads), timeout=60)
            self._order = {thread.ident: number for number, thread in enumerate(threads)}
            self._choose()

    def _choose(self) -> None:
        if self._order is None or self._holder is not None or not self._waiting:
            return
        if len(self._waiting) < len(self._threads):
            return
        for _ in range(10_000):
            ready = [thread for thread, may_go_on in sorted(self._waiting.items()) if may_go_on()]
            if ready:
                break
            self.now += 0.001
        else:
            raise AssertionError("every thread waits for another")
        self._holder = self._chance.choice(sorted(ready, key=self._order.get))
        del self._waiting[self._holder]
        self._condition.notify_all()


class Counted:
    """A criterion of no known kind: ends all rows at `last` tokens, and notes what it is asked about."""

    def __init__(self, width: int, last: int):
        self.widths: list[int] = []
        self._end = width + last

    def __call__(self, input_ids, scores, **kwargs) -> bool:
        self.widths.append(input_ids.shape[1])
        return input_ids.shape[1] >= self._end


def simulated(baton: Baton):
    """Call state and engine whose every wait is the baton's."""

    class SimulatedCallState(CallState):
        def sleep(self, seconds):
            until = float("inf") if seconds is None else baton.now + seconds
            baton.give_up(lambda: not self.wakeup.empty() or baton.now >= until)
            while not self.wakeup.empty():
                self.wakeup.get()

        def wait_until_left(self):
            baton.give_up(lambda: not self._has_left.empty())
            super().wait_until_left()

    class SimulatedEngine(Engine):
        def _change(self, section):
            baton.give_up()
            return super()._change(section)

    return SimulatedCallState, SimulatedEngine


class PatientLock:
    """A pool's lock. One that an interrupt has left locked is an error of all who want it, and no run that hangs."""

    def __init__(self):
        self._lock = threading.RLock()

    def acquire(self, blocking=True):
        if not self._lock.acquire(blocking, 5 if blocking else -1):
            assert not blocking, "the pool stays locked"
            return False
        return True

    def release(self):
        self._lock.release()

    def __enter__(self):
        self.acquire()

    def __exit__(self, *error):
        self.release()


@dataclass
class PlannedCall:
    """One thread's work: rows of a `generate` call, or a rectangular cache that checks what it stored."""

    kind: str
    prompts: list[list[int]]
    new_tokens: int
    salt: int


@dataclass
class Plan:
    """All that a run does, from its seed."""

    seed: int
    blocks: int
    token_budget: int
    calls: list[PlannedCall]
    fault: str
    at: int
    for_good: bool
    victim: int
    is_ahead: bool
    swap_blocks: int | None

    @classmethod
    def of(cls, seed: int) -> "Plan":
        chance = random.Random(seed)
        stems = [[chance.randrange(2, VOCAB) for _ in range(chance.randint(1, 14))] for _ in range(2)]
        calls = []
        for _ in range(chance.randint(2, 5)):
            kind = chance.choice(["packed", "packed", "packed", "rectangle"])
            prompt = chance.choice(stems) + [chance.randrange(2, VOCAB) for _ in range(chance.randint(0, 5))]
            rows = [prompt] * chance.randint(1, 3)
            if chance.random() < 0.5:
                rows = [row[: chance.randint(1, len(row))] for row in rows]
            calls.append(PlannedCall(kind, [list(row) for row in rows], chance.randint(1, 9), chance.randrange(10**6)))
        fault = chance.choice(FAULTS)
        at = int(10 ** chance.uniform(0, 3.4)) if fault == "interrupt" else chance.randint(1, 12)
        blocks = chance.choice([12, 16, 24, 60])
        budget, for_good, victim = chance.choice([3, 8, 32]), chance.random() < 0.3, chance.randrange(len(calls))
        swap_blocks = chance.choice([None, 5, 100])
        if swap_blocks is not None and fault in ("none", "copy") and chance.random() < 0.7:
            fault, blocks = SWAP_FAULT, 12
        return cls(seed, blocks, budget, calls, fault, at, for_good, victim, seed % 2 == 1, swap_blocks)


class Run:
    """One run of a plan.

    Attributes
    ----------
    fired : str or None
        Where the fault was injected; None: the run ended before.
    wrong, leaks : list of str
        What must not be.
    """

    def __init__(self, plan: Plan):
        self.plan, self.chance = plan, random.Random(plan.seed + 1)
        self.baton, self.model = Baton(self.chance), FakeModel()
        self.results: list = [None] * len(plan.calls)
        self.fired: str | None = None
        self.wrong: list[str] = []
        self.leaks: list[str] = []
        self.counts: Counter[str] = Counter()

    def go(self) -> "Run":
        call_state, engine = simulated(self.baton)
        now = self.baton.monotonic
        clock = SimpleNamespace(monotonic=now, sleep=self.baton.sleep, time=now, perf_counter=now)
        with contextlib.ExitStack() as patches:
            for module, name, value in (
                (engine_module, "CallState", call_state),
                (engine_module, "time", clock),
                (engine_module, "identify", FakeIdentity),
                (ModelRunner, "is_asynchronous", self.plan.is_ahead),
                (reservation, "time", clock),
                (stall_detector, "time", clock),
                (swap_space, "time", clock),
            ):
                patches.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, value)
            self._make(engine)
            self._inject(patches)
            threads = [threading.Thread(target=self._call, args=(number,)) for number in range(len(self.plan.calls))]
            for thread in threads:
                thread.start()
            self.baton.begin(threads)
            for thread in threads:
                thread.join(120)
                if thread.is_alive():
                    raise AssertionError(f"seed {self.plan.seed}: a thread hangs")
        self._check()
        return self

    def _make(self, engine) -> None:
        states = torch.zeros(1, 1, 1, DIM)
        block_bytes = 2 * BLOCK_SIZE * DIM * 4 * 2
        plan = self.plan
        self.pool = KVPool(
            PagedConfig(
                block_size=BLOCK_SIZE,
                memory_budget=plan.blocks * block_bytes,
                token_budget=plan.token_budget,
                swap_space=None if plan.swap_blocks is None else plan.swap_blocks * block_bytes,
            )
        )
        self.pool.lock = PatientLock()
        key = KVCacheSpec(None, torch.float32, states.device)
        self.group = self.pool.group(key, states, states, num_layers=2)
        for index in range(2):
            self.group.layer(index, states, states)
        self.engine = engine(self.pool)

    def _inject(self, patches: contextlib.ExitStack) -> None:
        plan = self.plan
        if plan.fault == "forward":
            self.model.fails_at, self.model.fails_for_good = plan.at, plan.for_good
        elif plan.fault == "refused":
            self.model.refused = plan.calls[plan.victim].prompts[0][-1]
        elif plan.fault == "weights":
            self.model.weights_at = {plan.at: 1} if plan.for_good else {plan.at: 1, plan.at + plan.victim + 1: 0}
        elif plan.fault == "allocation":
            self._fail(self.group.blocks, "allocate", lambda count: OutOfBlocksError(count, 0, self.plan.blocks))
        elif plan.fault == "device":
            self._fail_on_device(patches)
        elif plan.fault == SWAP_FAULT:
            [store] = self.engine._swap_space._stores
            name, plan.at = "spill" if plan.victim else "restore", 1 + plan.at % 2
            self._fail(store, name, lambda moves: OSError(errno.EIO, "the disk fails"))
        elif plan.fault == "interrupted copy":
            self.plan.for_good = False
            self._fail(self.group, "copy_blocks", lambda copies: Interrupt())
        elif plan.fault == "copy":
            self._fail(self.group, "copy_blocks", lambda copies: InjectedMemoryError("no memory for the copy"))

    def _fail(self, owner, name: str, error) -> None:
        """Let the n-th call of a method fail, or all from it to the third after it."""
        real, calls = getattr(owner, name), [0]

        def failing(*args):
            calls[0] += 1
            if self.plan.at <= calls[0] < self.plan.at + (4 if self.plan.for_good else 1):
                self.fired = f"{name} {calls[0]}"
                raise error(args[0])
            return real(*args)

        setattr(owner, name, failing)

    def _fail_on_device(self, patches: contextlib.ExitStack) -> None:
        """Let the device find no memory for what it is asked for at the n-th time, or from it to the third after it.

        Layers before the one that fails have done their part, and those after it have not.
        """
        calls, first = [0], self.plan.at * (1 + self.plan.victim) ** 2

        def failing(what, real):
            def run(*args):
                calls[0] += 1
                if first <= calls[0] < first + (4 if self.plan.for_good else 1):
                    self.fired = f"{what} {calls[0]}"
                    raise InjectedMemoryError(f"no memory for {what}")
                return real(*args)

            return run

        for storage in self.group.layers.values():
            for name in ("copy_blocks", "write", "write_and_attend"):
                setattr(storage, name, failing(name, getattr(storage, name)))
        patches.callback(setattr, model_runner, "prepare_inputs", model_runner.prepare_inputs)
        model_runner.prepare_inputs = failing("the inputs", model_runner.prepare_inputs)

    def _call(self, number: int) -> None:
        plan, planned = self.plan, self.plan.calls[number]
        self.baton.join()
        work = self._packed if planned.kind == "packed" else self._rectangle
        is_victim = plan.fault == "interrupt" and number == plan.victim
        tracer = InterruptedAt(plan.at) if is_victim else contextlib.nullcontext()
        try:
            with tracer:
                self.results[number] = work(planned)
        except BaseException as error:
            # Without the frames of the call, which hold its blocks.
            self.results[number] = error
            if VERBOSE:
                traceback.print_exception(error)
            traceback.clear_frames(error.__traceback__)
            error.__traceback__ = error.__context__ = None
        finally:
            if is_victim and tracer.fired:
                self.fired = tracer.fired
            self.baton.leave()

    def _packed(self, planned: PlannedCall) -> list[list[int]]:
        """Two turns of a chat: the second prompt is what the first call returned."""
        last = planned.salt % planned.new_tokens + 1 if planned.salt % 4 == 0 else None
        first = self._generate(planned.prompts, planned.new_tokens, last)
        return self._generate(first, planned.new_tokens, last)

    def _generate(self, prompts: list[list[int]], new_tokens: int, last: int | None) -> list[list[int]]:
        width, before = max(map(len, prompts)), (self.model.weights, self.num_changes)
        ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
        valid = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in prompts])
        config = GenerationConfig(do_sample=False, max_length=width + new_tokens)
        config._pad_token_tensor = torch.tensor(0)
        criteria = StoppingCriteriaList([MaxLengthCriteria(config.max_length), EosTokenCriteria(END)])
        if last is not None:
            criteria.append(Counted(width, last))
        call = GenerateCall(ids, valid, [], criteria, config, None, self.engine.block_pools)
        output = self.engine.run(self.model, call).tolist()
        if last is not None:
            new_tokens = min(last, new_tokens)
            if criteria[-1].widths != list(range(width + 1, len(output[0]) + 1)):
                self.wrong.append(f"asked about {criteria[-1].widths} of {width} to {len(output[0])} tokens")
        rows = [row[width - len(prompt) :] for row, prompt in zip(output, prompts)]
        wanted = [reference(prompt, len(prompt) + new_tokens, before[0]) for prompt in prompts]
        rows = [row[: len(want)] for row, want in zip(rows, wanted)]  # Without what pads a row that has ended.
        if before == (self.model.weights, self.num_changes) and rows != wanted:
            self.wrong.append(f"{rows} instead of {wanted}")
        return rows

    @property
    def num_changes(self) -> int:
        """How often the weights were changed so far."""
        return sum(number <= self.model.num_forwards for number in self.model.weights_at)

    def _rectangle(self, planned: PlannedCall) -> list[list[int]]:
        """Appends, copies, reorders and crops as beams do, and reads back what it has stored."""
        chance = random.Random(planned.salt)
        rows = [list(planned.prompts[0])] * len(planned.prompts)
        batch = BatchState()
        batch.num_layers = 2
        needs = {self.group: len(rows) * (-(-(len(rows[0]) + planned.new_tokens) // BLOCK_SIZE) + 1)}
        with reservation.reserve(self.pool, needs):
            batch.bind(self.pool)
            batch.batch_size = len(rows)
            self._append(batch, rows, 0)
            copies = []
            for _ in range(planned.new_tokens):
                chosen = [chance.randrange(len(rows)) for _ in rows]
                batch.select_rows(batch.epoch + 1, torch.tensor(chosen))
                rows = [rows[row] + [chance.randrange(2, VOCAB)] for row in chosen]
                self._append(batch, rows, len(rows[0]) - 1)
                if chance.random() < 0.3:
                    copies.append((batch.__deepcopy__({}), rows))
                if chance.random() < 0.2 and len(rows[0]) > 2:
                    for layer in range(2):
                        batch.truncate(layer, 1)
                    rows = [row[:-1] for row in rows]
            for cache, expected in [(batch, rows), *copies]:
                for layer in range(2):
                    stored = cache.gather(layer, False, 0, len(expected[0]))[:, 0]  # [rows, tokens, DIM]
                    want = torch.stack([vectors(torch.tensor(row), 0) for row in expected])
                    assert torch.equal(stored, want), "a cache reads what it has not stored"
        return rows

    def _append(self, batch: BatchState, rows: list[list[int]], start: int) -> None:
        self.baton.give_up()
        states = torch.stack([vectors(torch.tensor(row[start:]), 0) for row in rows])[:, None]
        for layer in range(2):
            batch.append(layer, None, torch.zeros_like(states), states)

    def _check(self) -> None:
        plan = self.plan
        if self.model.num_failures:
            self.fired = f"forward {self.model.num_forwards}"
        if self.model.weights_at and self.model.num_forwards >= plan.at:
            self.fired = f"forward {plan.at}"
        allowed = {
            "allocation": OutOfBlocksError,
            "copy": InjectedMemoryError,
            "device": InjectedMemoryError,
            "forward": InjectedError,
            "refused": InjectedError,
            "interrupt": Interrupt,
            "interrupted copy": Interrupt,
        }
        for number, (planned, result) in enumerate(zip(plan.calls, self.results)):
            if isinstance(result, BaseException):
                may_fail = isinstance(result, allowed.get(plan.fault, ())) and self.fired is not None
                if plan.fault == "interrupt":
                    may_fail = may_fail and number == plan.victim
                if plan.fault == "refused":
                    may_fail = may_fail and any(self.model.refused in row for row in self._tokens_of(planned))
                too_small = isinstance(result, OutOfBlocksError) and "raise memory_budget" in str(result)
                if not (may_fail or (too_small and result.needed > plan.blocks)):
                    self.wrong.append(f"call {number} raised {type(result).__name__}: {result}")
                self.counts["raised"] += 1
                continue
            self.counts["right"] += 1
        self._check_pool()

    @staticmethod
    def _tokens_of(planned: PlannedCall) -> list[list[int]]:
        """All that the rows of a call may run."""
        turns = [reference(row, len(row) + planned.new_tokens, 0) for row in planned.prompts]
        return [reference(row, len(row) + planned.new_tokens, 0) for row in turns]

    def _check_pool(self) -> None:
        try:
            blocks = self.group.blocks
            if blocks.used_blocks:
                gc.collect()
            self.pool.check_integrity()
            self.engine.scheduler.prefix.check_integrity()
            assert not blocks.used_blocks, f"{blocks.used_blocks} blocks are left in use"
            tier = self.engine.scheduler.prefix.tier
            assert tier is None or not tier.pools[0].used_blocks, "a swap block is left in use"
            self.counts["spilled"] += self.pool.swap_counts.spilled
            self.counts["restored"] += self.pool.swap_counts.restored
            assert not blocks.reserved and not self.pool.reservations and not self.pool.waiting, "a promise is left"
            assert not self.engine._state_of and not self.engine._is_driven, "a call is left in the engine"
            assert blocks.free_blocks + blocks.cached_blocks + blocks.used_blocks == blocks.total_blocks
        except AssertionError as error:
            self.leaks.append(str(error))


def run(seed: int) -> Run:
    """Run the plan of a seed. The result says what went wrong."""
    return Run(Plan.of(seed)).go()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int)
    arguments = parser.parse_args()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    if arguments.seed is not None:
        seeds = [arguments.seed]
        globals()["VERBOSE"] = True
        print(Plan.of(arguments.seed))
    fired: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for seed in seeds:
        result = run(seed)
        counts.update(result.counts)
        fired[result.plan.fault] += result.fired is not None
        counts["mismatches"] += len(result.wrong)
        counts["leaks"] += len(result.leaks)
        for line in (*result.wrong, *result.leaks):
            print(f"seed {seed}, {result.plan.fault} at {result.fired}: {line}")
    print(f"seeds {len(seeds)}, faults fired {dict(fired)}, {dict(counts)}")
    return int(counts["mismatches"] + counts["leaks"] > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    from support.pools import poison_new_slots

    poison_new_slots()

    sys.exit(main())
