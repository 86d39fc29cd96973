"""Random histories of rows: captured steps give the logits of eager ones, whoever comes, leaves or changes."""

import copy
import functools

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import hf_paged
from hf_paged import PagedConfig
from hf_paged.models import registry
from hf_paged.models.fingerprint import identify
from hf_paged.scheduling.request import Request
from hf_paged.scheduling.scheduler import Scheduler
from hf_paged_evals.models.tiny import VOCAB
from support import zoo
from support.packing import BLOCK, LENGTHS


@functools.cache
def engines(name):
    """The same model twice, and the engine of each: one captures decode steps, the other does not."""
    made = []
    for capture in ("ops", "off"):
        model = copy.deepcopy(zoo.build(name, "paged"))
        hf_paged.configure(model, PagedConfig(block_size=4, token_budget=24, capture=capture, memory_budget=40 * BLOCK))
        model.generate(**zoo.prompts([3]), **LENGTHS)
        made.append((model, registry.engine_of(model)))
    return made


class Side:
    """One of the two: its rows, and the scheduler that plans their steps."""

    def __init__(self, model, engine):
        self.model, self.engine, self.runner = model, engine, engine.runner
        self.scheduler = Scheduler(engine.scheduler.groups, token_budget=24)
        self.rows = []
        self.look()

    def look(self):
        self.identity = identify(self.model)

    def add(self, tokens):
        row = Request(list(tokens), self.engine.block_pools)
        self.rows.append(row)
        self.scheduler.add(row)

    def remove(self, number):
        self.scheduler.remove(self.rows.pop(number))

    def step(self):
        """Logits of the next step by row, or None."""
        planned = self.scheduler.schedule()
        for request, _ in planned.failed:
            self.rows.remove(request)
        if not planned.chunks:
            return None
        for number, copies in enumerate(planned.copies):
            self.runner.make_ready(number, copies)
        logits = self.runner.run(self.model, planned.chunks, identity=self.identity)
        self.scheduler.commit(planned)
        for chunk, row in zip([chunk for chunk in planned.chunks if chunk.samples], logits):
            chunk.request.tokens.append(int(row.argmax()))
        return logits


class Histories(RuleBasedStateMachine):
    """Rows on both sides at once, and changes of both models at once."""

    @initialize(name=st.sampled_from(["llama", "gemma3_text"]))
    def begin(self, name):
        self.sides = [Side(model, engine) for model, engine in engines(name)]

    @rule(tokens=st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=20))
    def enter(self, tokens):
        for side in self.sides:
            side.add(tokens)

    @rule(number=st.integers(0, 20))
    def leave(self, number):
        for side in self.sides:
            if side.rows:
                side.remove(number % len(side.rows))

    @rule(count=st.integers(1, 6))
    def steps(self, count):
        for _ in range(count):
            captured, eager = (side.step() for side in self.sides)
            if eager is None:
                assert captured is None
                return
            torch.testing.assert_close(captured, eager, rtol=1e-3, atol=1e-4)
            for row, other in zip(*(side.rows for side in self.sides)):
                other.tokens[:] = row.tokens  # Ties may be broken in two ways.

    @rule(layer=st.integers(0, 1))
    def change(self, layer):
        for side in self.sides:
            with torch.no_grad():
                side.model.model.layers[layer].mlp.down_proj.weight.mul_(-1)

    @rule()
    def look(self):
        for side in self.sides:
            side.look()

    @rule()
    def drop(self):
        self.sides[0].runner.drop(hf_paged.reasons.Reason.DISABLED)

    @invariant()
    def rows_are_alike(self):
        if hasattr(self, "sides"):
            left, right = self.sides
            assert [row.num_stored for row in left.rows] == [row.num_stored for row in right.rows]

    def teardown(self):
        for side in getattr(self, "sides", []):
            while side.rows:
                side.remove(0)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)


def test_histories_replay_steps():
    """So the machine above compares replayed steps, and not eager ones alone."""
    sides = [Side(model, engine) for model, engine in engines("llama")]
    before = hf_paged.stats(sides[0].model).replayed_steps
    for side in sides:
        side.add([5, 6, 7])
    for _ in range(6):
        torch.testing.assert_close(*(side.step() for side in sides), rtol=1e-3, atol=1e-4)
    for side in sides:
        side.remove(0)
    assert hf_paged.stats(sides[0].model).replayed_steps >= before + 3
