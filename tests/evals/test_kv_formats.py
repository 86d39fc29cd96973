"""The cost of KV formats, on a tiny model: contenders store what they are named after, native pages cost nothing."""

import pytest

from hf_paged.cli import main
from hf_paged_evals.runner import results
from support import tiny_eval

KEPT = 2 * 2 * (16 + 16)  # Numbers of a token: layers, KV heads, keys and values.


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The section of a quick run."""
    folder = tmp_path_factory.mktemp("kv_formats")
    model, texts, out = tiny_eval.save_model(folder / "model"), folder / "texts.txt", folder / "out.json"
    texts.write_text("\n".join(tiny_eval.TEXT[start:] for start in range(24)))
    words = ["--quick", "--model", model, "--dataset", str(texts), "--limit", "2", "--out", str(out)]
    assert main.main(["eval", "kv-formats", *words]) == 0
    (section,) = results.load(out)["sections"]
    return section


def test_bytes_are_those_of_the_pages(measured):
    values = {figure["name"]: figure["value"] for figure in measured["figures"]}
    assert values["native: bytes of a token"] == 4 * KEPT
    for name in ("int8", "fp8_e4m3"):
        assert values[f"{name}: bytes of a token"] == KEPT + 4 * 2 * 2 * 2
        assert values[f"{name}: of native"] == pytest.approx(100 * (16 + 4) / 64)


def test_native_pages_cost_nothing_and_float8_more_than_int8(measured):
    figures = {figure["name"]: figure for figure in measured["figures"]}
    loss = {name: figures[f"{name}: perplexity difference"] for name in ("native", "int8", "fp8_e4m3")}
    assert abs(loss["native"]["value"]) < 1e-5 and figures["native: rows equal"]["value"] == 100
    assert all(each["low"] <= each["value"] <= each["high"] for each in loss.values())
    assert abs(loss["native"]["value"]) < abs(loss["int8"]["value"])
    ends = [figures[f"{name}: tokens before the first divergence"]["value"] for name in loss]
    assert ends[0] == 100 and ends[1] >= ends[2] and ends[2] < 100
