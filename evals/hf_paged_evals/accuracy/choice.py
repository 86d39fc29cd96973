"""Multiple choice by log-likelihood: the continuation that the model finds likeliest is its answer."""

import math
import random

from hf_paged_evals.accuracy.evidence import pages
from hf_paged_evals.accuracy.likelihood import log_likelihoods, split
from hf_paged_evals.accuracy.outcomes import describe
from hf_paged_evals.data import offline, sources
from hf_paged_evals.data.user_dataset import load_rows
from hf_paged_evals.models.pair import ModelPair, load_tokenizer
from hf_paged_evals.runner.options import Options
from hf_paged_evals.runner.section import Figure, Section, Table
from hf_paged_evals.runner.statistics import PairedOutcomes
from hf_paged_evals.runner.task import Sample


class MultipleChoice:
    """HumanEval prompts with the solutions of four problems to choose from, or the user's questions."""

    name = "choice"
    title = "Multiple choice by log-likelihood"
    settings = {
        "questions": 64,
        "choices": 4,
        "max_tokens": 512,
        "question_column": "question",
        "choices_column": "choices",
        "answer_column": "answer",
    }
    quick = {"questions": 4, "max_tokens": 256}
    is_timed = False

    def samples(self, options: Options) -> list[Sample]:
        settings, tokenizer = options.settings_of(self), load_tokenizer(options)
        questions = _from_humaneval(settings["choices"], options.seed) if options.dataset is None else None
        questions = _from_dataset(options, settings) if questions is None else questions
        found = []
        for name, question, choices, answer in questions:
            context, continuations = split(tokenizer, question, choices)
            if context and len(context) + max(map(len, continuations)) <= settings["max_tokens"]:
                found.append(Sample(name, {"context": context, "choices": continuations, "answer": answer}))
        return found[: sources.cut(options, settings["questions"])]

    def run(self, sample: Sample, models: ModelPair) -> dict:
        given = sample.payload
        baseline = log_likelihoods(models.baseline, given["context"], given["choices"])
        with models.counting() as counts:
            backend = log_likelihoods(models.backend, given["context"], given["choices"])
        return {
            "question": sample.id,
            "answer": given["answer"],
            "tokens": [len(choice) for choice in given["choices"]],
            "baseline": baseline,
            "backend": backend,
            "pages": vars(counts),
        }

    def summarise(self, records: list[dict], options: Options) -> Section:
        chosen = {who: [_likeliest(row[who], row["tokens"]) for row in records] for who in ("baseline", "backend")}
        answers = [row["answer"] for row in records]
        right = {who: [a == b for a, b in zip(picks, answers)] for who, picks in chosen.items()}
        words, figures, table, flags = describe(
            "right answers", PairedOutcomes.count(right["baseline"], right["backend"]), options
        )
        reads, evidence, unread = pages(records, options)
        same = sum(a == b for a, b in zip(chosen["baseline"], chosen["backend"]))
        apart = [abs(a - b) for row in records for a, b in zip(row["baseline"], row["backend"])]
        if not all(map(math.isfinite, apart)):
            flags.append("likelihoods are not finite")
        largest = max(filter(math.isfinite, apart), default=0.0)
        figures += [
            Figure("same choice", 100 * same / len(records), "%", better="higher"),
            Figure("largest difference of a log-likelihood", largest, "nats", better="lower"),
            reads,
        ]
        return Section(
            self.name,
            self.title,
            f"{words} {same} of {len(records)} choices are the same.",
            figures=figures,
            tables=[table, _differing(records, chosen, options), evidence],
            notes=[
                "The choice with the largest log-likelihood a token wins. The context runs once; each choice "
                "goes on from a copy of its cache.",
                _origin(options),
            ],
            flags=[*flags, *unread],
        )


def _from_humaneval(choices: int, seed: int):
    """(name, question, choices, answer): each prompt with its own solution among those of other problems."""
    problems = offline.humaneval_problems()
    for number, problem in enumerate(problems):
        draw = random.Random(f"{seed} {number}")
        others = draw.sample([one for one in problems if one is not problem], choices - 1)
        offered = [problem, *others]
        draw.shuffle(offered)
        solutions = [one["canonical_solution"] for one in offered]
        yield problem["task_id"], problem["prompt"], solutions, offered.index(problem)


def _from_dataset(options: Options, settings: dict):
    """(name, question, choices, answer) of the user's rows.

    Choices are a list of texts, or, as in ARC, a dict of texts and labels; an answer is an index or a label.
    """
    rows = load_rows(options.dataset)
    columns = [settings[f"{part}_column"] for part in ("question", "choices", "answer")]
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"{options.dataset.name} has no column {', '.join(missing)}, only {', '.join(rows.column_names)}: name "
            "them with --set choice.question_column=NAME, choice.choices_column=NAME, choice.answer_column=NAME"
        )
    for number, row in enumerate(rows):
        question, offered, answer = (row[column] for column in columns)
        texts = offered["text"] if isinstance(offered, dict) else offered
        labels = offered["label"] if isinstance(offered, dict) else [str(at) for at in range(len(texts))]
        if len(texts) < 2 or str(answer) not in labels:
            raise ValueError(f"row {number} of {options.dataset.name}: answer {answer!r} is not among {labels}")
        yield f"row {number}", question, [" " + text for text in texts], labels.index(str(answer))


def _likeliest(likelihoods: list[float], tokens: list[int]) -> int:
    means = [total / count for total, count in zip(likelihoods, tokens)]
    return max(range(len(means)), key=lambda at: means[at])


def _differing(records: list[dict], chosen: dict[str, list[int]], options: Options) -> Table:
    columns = ["Question", "Answer", options.baseline_name, options.backend_name]
    lines = [
        [row["question"], row["answer"], first, second]
        for row, first, second in zip(records, chosen["baseline"], chosen["backend"])
        if first != second
    ]
    return Table("Questions that the backends answer differently", columns, lines, "" if lines else "None.")


def _origin(options: Options) -> str:
    if options.dataset is not None:
        return f"Questions: {options.dataset.name}."
    return "Questions: HumanEval prompts; choices: the problem's own canonical solution and those of other problems."
