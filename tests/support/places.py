"""Random numbers as a GPU draws them: each depends on its place in the whole tensor, not on those before it."""

import contextlib
import functools

import pytest
import torch

from hf_paged.sampling import rng_replay


@contextlib.contextmanager
def drawn_by_place():
    """Let the CPU draw exponential noise in that way, for ``torch.multinomial`` too. One draw takes one number."""
    exponential, multinomial = torch.Tensor.exponential_, torch.multinomial

    def by_place(self, lambd=1, *, generator=None):
        seed = int(torch.randint(2**62, (1,), generator=generator)) ^ self.numel()
        return exponential(self, lambd, generator=torch.Generator().manual_seed(seed))

    def sample(shares, num_samples, replacement=False, *, generator=None):
        if num_samples != 1:
            return multinomial(shares, num_samples, replacement, generator=generator)
        assert (shares >= 0).all() and (shares.max() < float("inf")).all()
        return (shares / by_place(torch.empty_like(shares), generator=generator)).argmax(-1, keepdim=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "exponential_", by_place)
        patch.setattr(torch, "multinomial", sample)
        # What was found out of the CPU stays so.
        patch.setattr(rng_replay, "draws_of", functools.cache(rng_replay.draws_of.__wrapped__))
        yield
