"""The one place that says when outputs are equal to those of dense."""

import torch

import hf_paged
from hf_paged_evals.accuracy.equality import differences


def assert_rows_equal(dense_model, inputs, dense: torch.Tensor, paged: torch.Tensor) -> None:
    """Tokens are equal row by row; a row may differ only where float64 cannot tell the top two apart."""
    for difference in differences(dense_model, inputs, dense, paged):
        print(difference)
        rows = f"dense {dense[difference.row].tolist()} paged {paged[difference.row].tolist()}"
        assert difference.is_tie, f"{difference}; {rows}"


class PageReads:
    """Asserts that a block of code read pages, and gathered nothing."""

    def __init__(self, model, gathers: bool = False):
        # In a model whose layers are all windowed, what makes one layer gather makes all of them gather.
        self.model, self.may_gather = model, gathers
        self.must_read = not (gathers and model.config.model_type == "mistral")

    def __enter__(self):
        hf_paged.release(self.model)
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            stats = hf_paged.stats(self.model)
            assert stats.page_reads > 0 or not self.must_read, "no attention call read pages: this is sdpa in disguise"
            assert self.may_gather or not stats.gathers, stats.gathers


def assert_generates_equal(models, inputs, seed: int = 0, gathers: bool = False, **kwargs):
    """`generate` on both models; returns (dense output, paged output)."""
    dense_model, paged_model = models
    kwargs = {"max_new_tokens": 24, "pad_token_id": 0, **kwargs}
    torch.manual_seed(seed)
    dense = dense_model.generate(**inputs, **kwargs)
    state = torch.get_rng_state()
    with PageReads(paged_model, gathers):
        torch.manual_seed(seed)
        paged = paged_model.generate(**inputs, **kwargs)
    assert torch.equal(torch.get_rng_state(), state), "the generator ended in another state"
    sequences = [getattr(output, "sequences", output) for output in (dense, paged)]
    assert_rows_equal(dense_model, inputs, *sequences)
    return dense, paged
