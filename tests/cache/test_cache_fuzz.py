"""Random lives of a cache: every operation in every order, with the same logits as the dense cache."""

import copy
import random

import pytest
import torch
from transformers import DynamicCache

import hf_paged
from support import zoo
from support.caches import dense_may_record_forwards_in_a_row, used

SEEDS = 150
OPERATIONS = "forward forward decode reorder keep_some repeat crop deepcopy read edit".split()


class Life:
    """One dense and one paged cache that go through the same operations, and the mask they have in common."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.tokens = torch.Generator().manual_seed(seed)
        self.name = self.random.choice(["llama", "mistral", "gemma3_text", "gpt_oss"])
        self.models = zoo.pair(self.name)
        hf_paged.configure(self.models[1], hf_paged.PagedConfig(block_size=self.random.choice([4, 8, 16])))
        self.recording = self.random.random() < 0.6 and dense_may_record_forwards_in_a_row()
        self.padded = self.random.random() < 0.5
        self.mask = torch.zeros(self.random.randint(1, 4), 0, dtype=torch.long)
        self.uncropped = 0  # Positions appended since the last crop: what may be cropped.
        self.caches = [None, None]  # Made by the models' own forwards, unless the past is recorded.
        if self.recording:
            self.caches = [DynamicCache(config=model.config) for model in self.models]
            for cache in self.caches:
                cache.activate_past_recording()

    def forward(self, most: int = 12):
        batch, positions = self.mask.shape[0], self.random.randint(1, most)
        ids = torch.randint(3, zoo.VOCAB, (batch, positions), generator=self.tokens)
        if self.random.random() < 0.4:
            ids[:] = ids[:1]  # Equal rows share blocks until they diverge.
        new = torch.ones(batch, positions, dtype=torch.long)
        if self.padded:
            for row in range(batch):
                if self.mask.shape[1] == 0:
                    new[row, : self.random.randint(0, positions - 1)] = 0
                elif positions > 1 and self.random.random() < 0.1:
                    new[row, self.random.randrange(positions)] = 0
        self.mask = torch.cat([self.mask, new], dim=1)
        logits = []
        for index, model in enumerate(self.models):
            with torch.no_grad():
                output = model(ids, attention_mask=self.mask, past_key_values=self.caches[index], use_cache=True)
            self.caches[index] = output.past_key_values
            logits.append(output.logits[new.bool()])
        torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)
        self.uncropped += positions

    def decode(self):
        self.forward(most=1)

    def select(self, method: str, rows):
        if not self.mask.shape[1]:
            return  # An empty cache keeps its rows, whatever it is told.
        for cache in self.caches:
            getattr(cache, method)(rows)
        self.mask = self.mask[rows]

    def reorder(self):
        batch = self.mask.shape[0]
        self.select("reorder_cache", torch.tensor([self.random.randrange(batch) for _ in range(batch)]))

    def keep_some(self):
        batch = self.mask.shape[0]
        kept = sorted(self.random.sample(range(batch), self.random.randint(1, batch)))
        forms = [
            torch.tensor(kept),
            torch.tensor([row - batch for row in kept]),
            torch.tensor([row in kept for row in range(batch)]),
            kept,
            slice(kept[0], kept[-1] + 1),
        ]
        self.select("batch_select_indices", self.random.choice(forms))

    def repeat(self):
        if self.mask.shape[0] < 4 and self.mask.shape[1]:
            for cache in self.caches:
                cache.batch_repeat_interleave(2)
            self.mask = self.mask.repeat_interleave(2, dim=0)

    def crop(self):
        length = self.mask.shape[1]
        if not self.recording and self.name != "llama":
            return
        removed = self.random.randint(0, min(5, self.uncropped if self.recording else length))
        if self.random.random() < 0.2 and (self.uncropped == length or self.name == "llama"):
            removed = length
        for cache in self.caches:
            cache.crop(-removed)
        self.mask = self.mask[:, : length - removed]
        self.uncropped = 0

    def read(self):
        """Everything a layer says of itself. What it holds at pads is of no account."""
        for dense, paged in zip(*(cache.layers for cache in self.caches)):
            for method, arguments in (("get_seq_length", ()), ("get_mask_sizes", (3,)), ("get_max_length", ())):
                assert getattr(dense, method)(*arguments) == getattr(paged, method)(*arguments)
            assert dense.is_initialized == paged.is_initialized
            for one, other in ((dense.keys, paged.keys), (dense.values, paged.values)):
                assert one.shape == other.shape
                tokens = self.mask[:, self.mask.shape[1] - one.shape[2] :].bool()
                torch.testing.assert_close(
                    one.transpose(1, 2)[tokens], other.transpose(1, 2)[tokens], atol=1e-3, rtol=1e-3
                )

    def edit(self):
        """In place, and in a part of the layers."""
        for index in range(len(self.caches[0].layers)):
            if self.random.random() < 0.5:
                for cache in self.caches:
                    cache.layers[index].values[-1] *= 0.7

    def deepcopy(self):
        self.caches = copy.deepcopy(self.caches)


@pytest.mark.parametrize("decade", range(SEEDS // 10))
def test_random_lives(decade):
    reads = 0
    for seed in range(decade * 10, decade * 10 + 10):
        life = Life(seed)
        life.forward()
        for _ in range(life.random.randint(1, 8)):
            getattr(life, life.random.choice(OPERATIONS))()
        life.caches.clear()
        reads += hf_paged.stats(life.models[1]).page_reads
        assert used(life.models[1]) == 0
    assert reads > 0


def test_cropping_more_than_was_recorded_is_refused_in_words():
    paged = zoo.pair("mistral")[1]
    cache = DynamicCache(config=paged.config)
    cache.activate_past_recording()
    with torch.no_grad():
        paged(zoo.prompts([30])["input_ids"], past_key_values=cache)
        cache.crop(-1)
        cache.crop(-8)
        with pytest.raises(RuntimeError, match="cropped by more than it had recorded"):
            paged(torch.tensor([[5]]), past_key_values=cache)
    del cache
