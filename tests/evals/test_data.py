"""Texts of the user's own files, through the loaders of ``datasets``."""

import json

import datasets
import pytest

from hf_paged_evals.data.user_dataset import load_rows, load_texts
from hf_paged_evals.runner.options import DatasetChoice

TEXTS = ["first text", "second text"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, column: str = "text"):
    rows = [{"other": number, column: text} for number, text in enumerate(TEXTS)]
    if path.suffix == ".txt":
        path.write_text("\n".join(TEXTS))
    elif path.suffix in (".json", ".jsonl"):
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        table = datasets.Dataset.from_list(rows)
        table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path)
    return str(path)


@pytest.mark.parametrize("suffix", ["txt", "json", "jsonl", "parquet", "csv"])
def test_local_files(tmp_path, suffix):
    assert load_texts(DatasetChoice(write(tmp_path / f"texts.{suffix}"))) == TEXTS


def test_a_folder(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl")
    assert load_texts(DatasetChoice(str(tmp_path / "data"))) == TEXTS


def test_a_usual_column_is_found_and_another_can_be_named(tmp_path):
    assert load_texts(DatasetChoice(write(tmp_path / "a.jsonl", "prompt"))) == TEXTS
    path = write(tmp_path / "b.jsonl", "unusual")
    with pytest.raises(ValueError, match="no column of a usual name: name one of other, unusual with --dataset-column"):
        load_texts(DatasetChoice(path))
    assert load_texts(DatasetChoice(path, column="unusual")) == TEXTS
    with pytest.raises(ValueError, match="column 'other' .* holds no texts"):
        load_texts(DatasetChoice(path, column="other"))


@pytest.mark.parametrize(
    "name, words",
    [("nobody/nothing", "datasets cannot load 'nobody/nothing'"), ("{folder}/a.xyz", "is a .xyz file; datasets reads")],
)
def test_what_cannot_be_loaded_is_named(tmp_path, name, words):
    (tmp_path / "a.xyz").write_text("x")
    with pytest.raises(ValueError, match=words):
        load_rows(DatasetChoice(name.format(folder=tmp_path)))


def test_a_split_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="has no split 'test': it has train"):
        load_rows(DatasetChoice(write(tmp_path / "a.jsonl"), split="test"))
