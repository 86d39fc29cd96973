"""Samples of content: spread over each tensor, of every layout, and read with few launches for a whole model."""

import pytest
import torch

from hf_paged.execution.content_sample import ContentSamples, sample
from hf_paged.models.fingerprint import identify
from support import zoo

SHAPES = [(), (1,), (63,), (1000,), (4096, 1), (2, 2), (7, 9), (4, 4096), (100, 3), (64, 64), (1000, 72), (3, 50, 20)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_elements_of_a_sample_are_spread_over_rows_and_columns(shape):
    count = torch.Size(shape).numel()
    places = sample(torch.arange(count).view(shape)).flatten()
    assert len(places) == len(places.unique()) and min(count, 48) <= len(places) <= 64
    width = shape[-1] if shape else 1
    rows, columns = (places // width).unique(), (places % width).unique()
    assert len(rows) >= min(count // width, 8) and len(columns) >= min(width, 8)
    assert rows.max() >= 0.75 * (count // width) - 1 and columns.max() >= 0.75 * width - 1


@pytest.mark.parametrize("shape", [(97, 32), (64, 32), (32, 64), (64, 64), (1000, 72), (1536, 576)], ids=str)
def test_most_rows_and_columns_are_sampled_where_they_are_few(shape):
    places = sample(torch.arange(shape[0] * shape[1]).view(shape)).flatten()
    for seen, size in zip((places // shape[1], places % shape[1]), shape):
        assert len(seen.unique()) >= 0.9 * min(size, 64)


LAYOUTS = {
    "transposed": lambda tensor: tensor.t(),
    "one of four columns": lambda tensor: tensor[:, ::4],
    "repeated": lambda tensor: tensor[:, :1].expand(-1, 32),
    "from the middle": lambda tensor: tensor[50:],
    "empty": lambda tensor: tensor[:, :0],
    "bytes": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "truths": lambda tensor: tensor > 0,
    "complex": lambda tensor: torch.complex(tensor, tensor),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_of_every_layout_are_sampled(layout):
    tensor = LAYOUTS[layout](torch.randn(100, 64))
    samples = ContentSamples([torch.ones(3), tensor, torch.ones(5, 5).bfloat16()])
    before = samples.read()
    assert samples.read() == before == ContentSamples([torch.ones(3), tensor, torch.ones(5, 5).bfloat16()]).read()
    assert len(before) == 3 * 4 + sample(tensor).nbytes + 25 * 2
    if tensor.numel():
        tensor.data.zero_()
        assert samples.read() != before


def test_a_look_at_a_model_takes_few_launches_and_one_copy(fake_device):
    """Some sixty of the views that are concatenated are one launch on a GPU; with more layers nothing else is added."""
    launches = []
    for num_layers in (2, 6):
        model = zoo.build("llama", "paged", num_hidden_layers=num_layers).to(fake_device.device)
        identity = identify(model)
        with fake_device.watch() as traffic:
            assert identity.is_found_again()
        assert (traffic.uploads, traffic.downloads) == (0, 1)
        launches.append(traffic.launches)
        model.model.layers[1].self_attn.v_proj.weight.data.mul_(1.5)
        assert identity.holds() and not identity.is_found_again()
    assert launches[0] == launches[1] <= 12
