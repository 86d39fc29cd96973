"""A config.json that names "paged": what the page on troubleshooting says of it is so."""

import json

import pytest
from transformers import AutoModelForCausalLM

from support import zoo

# The implementation of a model by what its config.json has and what `from_pretrained` is given, as in the table.
LOADED = {
    "neither": ({}, "sdpa", "sdpa", "eager"),
    "public": ({"attn_implementation": "paged"}, "paged", "sdpa", "eager"),
    "private": ({"_attn_implementation": "paged"}, "paged", "paged", "paged"),
}


@pytest.mark.parametrize("case", LOADED)
def test_the_implementation_of_a_loaded_model(case, tmp_path):
    keys, *expected = LOADED[case]
    zoo.build("llama", "paged").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    assert not {"attn_implementation", "_attn_implementation"} & saved.keys(), "saving does not keep it"
    path.write_text(json.dumps({**saved, **keys}))
    arguments = [{}, {"attn_implementation": None}, {"attn_implementation": "eager"}]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path, **each) for each in arguments]
    assert [model.config._attn_implementation for model in models] == expected
