"""lm-evaluation-harness's own command, unchanged, with attn_implementation=sdpa and =paged: scores and wall times.

Writes the model and three local tasks of ShareGPT texts to a folder, a task for each kind of request that the harness
knows, and runs ``lm_eval`` on them in turns. Nothing of it imports hf_paged: zero-code activation does. So the last
two runs show the counts of the pool where activation is on, and the error where it is switched off.

It needs the packages of the evals extra, and lm_eval.
"""

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from hf_paged.errors import MissingPackageError
from hf_paged_evals.data.offline import sharegpt_conversations
from hf_paged_evals.models.pair import load_model, load_tokenizer
from hf_paged_evals.runner.arguments import add_model, model_options
from hf_paged_evals.runner.script import Script
from hf_paged_evals.runner.section import Figure, Section, Table

NAME = "lm-eval"
QUICK = {"documents": 4, "batch_size": 2, "repeats": 1}

_COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
_TASKS = {
    "answers": """
output_type: generate_until
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\nQ:"], max_gen_toks: 48, do_sample: false}
metric_list: [{metric: chrf}, {metric: bleu}]
""",
    "choices": """
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}
# As `python -m lm_eval`; prints the counts of the pool of the model that it made.
_WITNESS = """
import sys
from lm_eval.models import huggingface
made, init = [], huggingface.HFLM.__init__
huggingface.HFLM.__init__ = lambda self, *args, **kwargs: made.append(self) or init(self, *args, **kwargs)
from lm_eval.__main__ import cli_evaluate
assert "hf_paged" not in sys.modules
cli_evaluate()
import hf_paged
counted = hf_paged.stats(made[0].model)
print(f"page reads {counted.page_reads}, gathers {counted.gathers}, packed calls {counted.packed_calls}, "
      f"transformers' own loop {counted.fallbacks}")
"""


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this measurement."""
    add_model(parser)
    parser.add_argument("--documents", type=int, default=24, help="of each task (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="turns (default: %(default)s)")


def measure(given: argparse.Namespace) -> Section:
    """Run the command in turns; compare scores, answers and times, and ask for the counts of the pool.

    Raises
    ------
    MissingPackageError
        If the harness or ShareGPT is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingPackageError("lm-evaluation-harness", "lm-eval")
    options = model_options(given, NAME)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load_model(options, "sdpa").save_pretrained(folder / "model")
        load_tokenizer(options).save_pretrained(folder / "model")
        write_tasks(folder, given.documents)
        found: dict[str, dict] = {}
        seconds: dict[str, list[float]] = {"sdpa": [], "paged": []}
        for turn in range(given.repeats):
            for implementation, times in seconds.items():
                found[implementation], took = evaluate(folder, implementation, given, turn)
                times.append(took)
        few = command(folder, "paged", given, "--limit", "4")
        counted = run(["-c", _WITNESS], few).stdout.strip().splitlines()
        off = run(["-m", "lm_eval"], few, HF_PAGED_AUTOLOAD="0").stderr.strip().splitlines()
    columns = ["Task", "Metric", "sdpa", "paged", "Difference"]
    return Section(
        NAME,
        "lm-evaluation-harness, unchanged",
        f"Its own command over {given.documents} documents in each of {len(_TASKS)} tasks.",
        [
            *(Figure(f"{name}, seconds", statistics.median(times), "s") for name, times in seconds.items()),
            *compare_answers(found["sdpa"], found["paged"]),
        ],
        [Table("Scores", columns, score_rows(found["sdpa"], found["paged"]))],
        notes=[
            f"With activation, 4 documents a task: {counted[-1] if counted else 'the run failed'}",
            f"HF_PAGED_AUTOLOAD=0: {off[-1][:70] if off else 'no message'}",
        ],
        flags=[] if counted else ["the run that counts page reads failed"],
    )


def write_tasks(folder: Path, count: int) -> None:
    """Write three tasks of `count` documents each: first questions and answers of ShareGPT conversations.

    Raises
    ------
    MissingPackageError
        If ShareGPT is not installed.
    """
    conversations = sharegpt_conversations()
    random.Random(0).shuffle(conversations)
    pairs = []
    for conversation in conversations:
        turns = [turn["value"].strip() for turn in conversation["conversations"][:2]]
        if len(turns) == 2 and all(40 < len(turn) < 1200 for turn in turns) and turns[1].isascii():
            pairs.append(turns)
        if len(pairs) == count:
            break
    answers = [answer[:120] for _, answer in pairs]
    documents = []
    for index, (question, answer) in enumerate(pairs):
        choices = [answers[(index + step) % count] for step in range(4)]
        label = index % 4
        choices[0], choices[label] = choices[label], choices[0]
        documents.append({"question": question, "answer": answer, "choices": choices, "label": label})
        documents[-1]["text"] = f"{question}\n{answer}"
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, task in _TASKS.items():
        (folder / f"{name}.yaml").write_text(_COMMON.format(name=name, data=data) + task)


def command(folder: Path, implementation: str, given: argparse.Namespace, *more: str) -> list[str]:
    """The arguments of ``lm_eval``."""
    model = f"pretrained={folder / 'model'},dtype={given.dtype},attn_implementation={implementation}"
    tasks = ["--tasks", ",".join(_TASKS), "--include_path", str(folder)]
    size = ["--device", "cpu", "--batch_size", str(given.batch_size)]
    return ["--model", "hf", "--model_args", model, *tasks, *size, *more]


def run(start: list[str], arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    """Run an interpreter without a hub."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *start, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline, **environment})


def evaluate(folder: Path, implementation: str, given: argparse.Namespace, turn: int) -> tuple[dict, float]:
    """Scores and answers of one run of the command, and the seconds that it took without loading.

    Raises
    ------
    RuntimeError
        If the command fails.
    """
    out = folder / f"{implementation}-{turn}"
    logs = ["--output_path", str(out), "--log_samples"]
    done = run(["-m", "lm_eval"], command(folder, implementation, given, *logs))
    if done.returncode:
        raise RuntimeError(f"lm_eval with {implementation} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    result = json.loads(next(out.rglob("results_*.json")).read_text())
    found = {"scores": result["results"]}
    for name in _TASKS:
        lines = next(out.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()
        found[name] = [json.loads(line)["filtered_resps"] for line in lines]
    return found, float(result["total_evaluation_time_seconds"])


def numbers(responses) -> list[float]:
    """All log-likelihoods in a task's responses."""
    if isinstance(responses, list):
        return [number for part in responses for number in numbers(part)]
    if isinstance(responses, bool):
        return []
    try:
        return [float(responses)]
    except ValueError:
        return []


def score_rows(sdpa: dict, paged: dict) -> list[list]:
    """Task, metric, both scores and their difference of each row."""
    rows = []
    for task, scores in sdpa["scores"].items():
        for metric, score in scores.items():
            if isinstance(score, float) and "stderr" not in metric:
                other = paged["scores"][task][metric]
                rows.append([task, metric.split(",")[0], score, other, other - score])
    return rows


def compare_answers(sdpa: dict, paged: dict) -> list[Figure]:
    """Generated answers that are the same, and the largest differences of log-likelihoods."""
    same = sum(a == b for a, b in zip(sdpa["answers"], paged["answers"]))
    figures = [Figure("generated answers equal", same, f"of {len(sdpa['answers'])}", better="higher")]
    for name in ("choices", "texts"):
        pairs = list(zip(numbers(sdpa[name]), numbers(paged[name]), strict=True))
        largest = max(abs(a - b) for a, b in pairs)
        figures.append(Figure(f"{name}, largest difference of a log-likelihood", largest, "nats", better="lower"))
    return figures


main = Script(NAME, __doc__, add_settings, measure, QUICK).main

if __name__ == "__main__":
    sys.exit(main())
