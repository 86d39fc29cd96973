"""Texts of a dataset that the user names, through the loaders of ``datasets``."""

from pathlib import Path
from typing import TYPE_CHECKING

from hf_paged.errors import MissingPackageError
from hf_paged_evals.runner.options import DatasetChoice

if TYPE_CHECKING:
    from datasets import Dataset

_LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
_SPLITS = ("test", "validation", "train")
_COLUMNS = ("text", "prompt", "question", "instruction", "content", "input", "sentence")


def load_rows(choice: DatasetChoice) -> "Dataset":
    """One split of a dataset.

    Raises
    ------
    MissingPackageError
        If ``datasets`` is not installed.
    ValueError
        If there is no such dataset or split.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingPackageError("datasets", "hf-paged[evals]") from error
    path = Path(choice.name)
    try:
        if path.is_file():
            loader = _loader(path)
            found = datasets.load_dataset(loader, choice.subset, data_files=str(path))
        else:
            found = datasets.load_dataset(choice.name, choice.subset)
    except (OSError, datasets.exceptions.DatasetsError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(f"datasets cannot load {choice.name!r}: {error}") from error
    split = choice.split or next((name for name in _SPLITS if name in found), next(iter(found)))
    if split not in found:
        raise ValueError(f"{choice.name} has no split {split!r}: it has {', '.join(found)}")
    return found[split]


def load_texts(choice: DatasetChoice) -> list[str]:
    """The texts of one column that are not empty, in the order of the dataset.

    Raises
    ------
    MissingPackageError
        If ``datasets`` is not installed.
    ValueError
        If there is no such dataset, split or column, or the column holds no text.
    """
    rows = load_rows(choice)
    column = choice.column or next((name for name in _COLUMNS if name in rows.column_names), None)
    if column not in rows.column_names:
        raise ValueError(
            f"{choice.name} has no column {choice.column or 'of a usual name'}: name one of "
            f"{', '.join(rows.column_names)} with --dataset-column"
        )
    texts = [text for text in rows[column] if text]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"column {column!r} of {choice.name} holds no texts: name another with --dataset-column")
    return texts


def _loader(path: Path) -> str:
    if path.suffix not in _LOADERS:
        raise ValueError(f"{path} is a {path.suffix or 'nameless'} file; datasets reads {', '.join(_LOADERS)}")
    return _LOADERS[path.suffix]
