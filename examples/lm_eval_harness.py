"""lm-evaluation-harness on a paged model: two tasks that are dicts in this file, scored paged and dense.

    pip install -c constraints.txt -e ".[examples]"
    python examples/lm_eval_harness.py

The harness brings a stopping criterion of its own, which looks at all rows of a batch; its calls of `generate` run
packed all the same. Its command line needs no code at all:

    lm_eval --model hf --model_args pretrained=NAME,attn_implementation=paged --tasks ...
"""

import argparse
import sys

from datasets import Dataset, DatasetDict
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

import hf_paged
from _demo_model import model_path

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo", "Greece": "Athens", "Peru": "Lima"}


def load_capitals(**_) -> DatasetDict:
    """Build the documents: a country, its capital, and four capitals to choose from, the right one first."""
    names = list(CAPITALS.values())
    choices = [[names[(row + step) % len(names)] for step in range(4)] for row in range(len(names))]
    rows = {"country": list(CAPITALS), "capital": names, "choices": choices}
    return DatasetDict(test=Dataset.from_dict(rows))


COMMON = {"custom_dataset": load_capitals, "test_split": "test", "doc_to_text": "The capital of {{country}} is"}
MEAN = {"aggregation": "mean", "higher_is_better": True}
TASKS = [
    {
        **COMMON,
        "task": "complete",
        "output_type": "generate_until",
        "doc_to_target": "{{capital}}",
        "generation_kwargs": {"until": [".", ","], "max_gen_toks": 12, "do_sample": False},
        "filter_list": [{"name": "trimmed", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
    {
        **COMMON,
        "task": "choose",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", **MEAN}],
    },
]


def evaluate(model: str, implementation: str) -> tuple[dict, hf_paged.Stats]:
    """Score both tasks with one attention implementation."""
    harness = HFLM(model, dtype="float32", device="cpu", batch_size=8, attn_implementation=implementation)
    return simple_evaluate(harness, tasks=TASKS, bootstrap_iters=0), hf_paged.stats(harness.model)


def main() -> None:
    """Evaluate twice and compare: scores, answers, log-likelihoods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_path, default="demo", help="a hub name or a folder")
    arguments = parser.parse_args()
    (paged, stats), (dense, _) = (evaluate(arguments.model, name) for name in ("paged", "sdpa"))

    for task, metric in (("complete", "exact_match,trimmed"), ("choose", "acc,none")):
        scores = [result["results"][task][metric] for result in (paged, dense)]
        print(f"{task:10} {metric.split(',')[0]:12} paged {scores[0]:.4f}  dense {scores[1]:.4f}")
        if scores[0] != scores[1]:
            sys.exit("wrong: the scores differ")
    answers = [[sample["filtered_resps"] for sample in result["samples"]["complete"]] for result in (paged, dense)]
    print(f"answers    {', '.join(answer for (answer,) in answers[0])}")
    print(f"pool       {stats.page_reads} page reads, {sum(stats.gathers.values())} gathers")
    print(f"calls      {stats.packed_calls} packed, fallbacks {stats.fallbacks}")
    if answers[0] != answers[1]:
        sys.exit(f"wrong: the generated answers differ: {answers}")
    if not stats.page_reads or stats.fallbacks:
        sys.exit("wrong: nothing was read from pages, or a call was not packed")


if __name__ == "__main__":
    main()
