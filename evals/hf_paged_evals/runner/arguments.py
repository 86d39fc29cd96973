"""Arguments of the command line that several commands share: the model, its dtype and the data."""

import argparse

from hf_paged_evals.runner.options import DTYPES, DatasetChoice, Options


def add_model(parser: argparse._ActionsContainer, dtype: str = "float32") -> None:
    """Add ``--model``, ``--dtype`` and ``--seed``.

    Parameters
    ----------
    dtype : str
        The default.
    """
    parser.add_argument("--model", default="smollm2", help="hub name or folder (default: smollm2, the demo model)")
    parser.add_argument("--dtype", choices=DTYPES, default=dtype, help="of weights and KV (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of data (default: %(default)s)")


def add_dataset(parser: argparse._ActionsContainer) -> None:
    """Add ``--dataset`` and the options that choose a part of it."""
    parser.add_argument("--dataset", metavar="NAME", help="hub name, or a local json, jsonl, parquet, csv or text file")
    parser.add_argument("--dataset-subset", metavar="NAME")
    parser.add_argument("--dataset-split", metavar="NAME")
    parser.add_argument("--dataset-column", metavar="NAME")


def dataset_of(given: argparse.Namespace) -> DatasetChoice | None:
    """The dataset that the arguments of `add_dataset` name.

    Raises
    ------
    ValueError
        If a part of a dataset is chosen and no dataset.
    """
    parts = [getattr(given, f"dataset_{name}") for name in ("subset", "split", "column")]
    if given.dataset is not None:
        return DatasetChoice(given.dataset, *parts)
    if any(parts):
        raise ValueError("--dataset-subset, --dataset-split and --dataset-column belong to --dataset: name one")
    return None


def model_options(given: argparse.Namespace, name: str) -> Options:
    """Options with the model and data of the arguments of `add_model` and, if they are there, `add_dataset`.

    Parameters
    ----------
    name : str
        Of the measurement.
    """
    dataset = dataset_of(given) if hasattr(given, "dataset") else None
    return Options("", (name,), given.model, given.dtype, seed=given.seed, dataset=dataset)
