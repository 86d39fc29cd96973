"""lm-evaluation-harness's own command, unchanged, with attn_implementation=sdpa and =paged: scores and wall times.

Writes SmolLM2 and three local tasks of ShareGPT texts to a folder, one for each kind of request that the harness
knows, and runs ``lm_eval`` on them in turns. Nothing of it imports hf_paged: that is zero-code activation's part,
so the last two runs show what happens when it is switched off, and what the pool counted where it is on.

    pip install -c constraints.txt -e ".[evals]" lm_eval
    python evals/lm_eval_parity.py --documents 24 --repeats 2
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from interleave import machine
from prompts import sharegpt_conversations

from hf_paged.cli.demo_model import load_model, load_tokenizer

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
# As `python -m lm_eval`, and says afterwards what the pool of the model it made has counted.
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


def write_tasks(folder: Path, count: int) -> None:
    """Three tasks of `count` documents each: first questions and answers of ShareGPT conversations."""
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


def command(folder: Path, implementation: str, batch_size: int, *more: str) -> list[str]:
    """The arguments of ``lm_eval``."""
    model = f"pretrained={folder / 'model'},dtype=float32,attn_implementation={implementation}"
    tasks = ["--tasks", ",".join(_TASKS), "--include_path", str(folder)]
    return ["--model", "hf", "--model_args", model, *tasks, "--device", "cpu", "--batch_size", str(batch_size), *more]


def run(start: list[str], arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    """An interpreter of its own, without a hub."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *start, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline, **environment})


def evaluate(folder: Path, implementation: str, batch_size: int, turn: int) -> tuple[dict, float]:
    """What one run of the command scored and answered, and the seconds that it took without loading."""
    out = folder / f"{implementation}-{turn}"
    done = run(
        ["-m", "lm_eval"],
        command(folder, implementation, batch_size, "--output_path", str(out), "--log_samples"),
    )
    if done.returncode:
        raise SystemExit(done.stderr)
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


def compare(sdpa: dict, paged: dict) -> None:
    """Print the scores side by side, and how many answers are the same."""
    for task, scores in sdpa["scores"].items():
        for metric, score in scores.items():
            if isinstance(score, float) and "stderr" not in metric:
                other = paged["scores"][task][metric]
                verdict = "equal" if score == other else f"differ by {abs(score - other):.2e}"
                print(f"  {task:8} {metric.split(',')[0]:16} sdpa {score:.6f}   paged {other:.6f}   {verdict}")
    same = sum(a == b for a, b in zip(sdpa["answers"], paged["answers"]))
    print(f"  {same} of {len(sdpa['answers'])} generated answers are the same")
    for name in ("choices", "texts"):
        pairs = list(zip(numbers(sdpa[name]), numbers(paged[name]), strict=True))
        most = max(abs(a - b) for a, b in pairs)
        print(f"  {len(pairs)} log-likelihoods in {name}: largest difference {most:.2e}")


def main() -> None:
    """Run the command in turns and print scores, answers, times and what the pool counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for part in (load_model("sdpa"), load_tokenizer()):
            part.save_pretrained(folder / "model")
        write_tasks(folder, arguments.documents)
        found, seconds = {}, {"sdpa": [], "paged": []}
        for turn in range(arguments.repeats):
            for implementation, times in seconds.items():
                found[implementation], took = evaluate(folder, implementation, arguments.batch_size, turn)
                times.append(took)
        print(f"{machine()}, float32, {arguments.documents} documents a task, batches of {arguments.batch_size}")
        compare(found["sdpa"], found["paged"])
        for implementation, times in seconds.items():
            print(f"  {implementation:6} {statistics.median(times):6.1f} s   {[round(took, 1) for took in times]}")
        few = command(folder, "paged", arguments.batch_size, "--limit", "4")
        counted = run(["-c", _WITNESS], few).stdout.strip().splitlines()
        print(f"  4 documents a task: {counted[-1] if counted else 'the run failed'}")
        off = run(["-m", "lm_eval"], few, HF_PAGED_AUTOLOAD="0").stderr.strip().splitlines()[-1]
        print(f"  HF_PAGED_AUTOLOAD=0: {off[:70]}")


if __name__ == "__main__":
    main()
