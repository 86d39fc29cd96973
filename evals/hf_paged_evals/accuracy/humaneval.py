"""HumanEval pass@1: the share of problems whose tests a generated program passes."""

from concurrent.futures import ThreadPoolExecutor

from transformers import StoppingCriteriaList, StopStringCriteria

from hf_paged_evals.accuracy.evidence import pages
from hf_paged_evals.accuracy.generation import generate
from hf_paged_evals.accuracy.outcomes import describe
from hf_paged_evals.accuracy.sandbox import run_program
from hf_paged_evals.data import offline, sources
from hf_paged_evals.models.pair import ModelPair
from hf_paged_evals.runner.options import Options
from hf_paged_evals.runner.section import Figure, Section, Table
from hf_paged_evals.runner.statistics import PairedOutcomes
from hf_paged_evals.runner.task import Sample

# A function ends here: text that follows is not part of the answer.
_STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\nassert", "\n```"]
_PROGRAMS_AT_ONCE = 2


class HumanEval:
    """Greedy completions of the prompts, run against each problem's tests."""

    name = "humaneval"
    title = "HumanEval pass@1"
    settings = {"problems": 164, "new_tokens": 256, "batch": 16, "baseline_batch": 8, "seconds": 10.0}
    quick = {"problems": 6, "new_tokens": 48}
    is_timed = False

    def samples(self, options: Options) -> list[Sample]:
        settings = options.settings_of(self)
        problems = offline.humaneval_problems()[: sources.cut(options, settings["problems"])]
        return [
            Sample(f"problems {number}", {**settings, "problems": some})
            for number, some in enumerate(sources.batches(problems, settings["batch"]))
        ]

    def run(self, sample: Sample, models: ModelPair) -> dict:
        given, tokenizer = sample.payload, models.tokenizer
        problems = given["problems"]
        # Without its last line break: tokens of code hold a line break and the indentation after it.
        prompts = [tokenizer(problem["prompt"].rstrip())["input_ids"] for problem in problems]
        stops = StoppingCriteriaList([StopStringCriteria(tokenizer, _STOPS)])
        options = {"max_new_tokens": given["new_tokens"], "stopping_criteria": stops}
        baseline = generate(models.baseline, tokenizer, prompts, given["baseline_batch"], **options)
        with models.counting() as counts:
            backend = generate(models.backend, tokenizer, prompts, given["batch"], **options)
        rows = [
            {"problem": problem["task_id"], "baseline": first, "backend": second}
            for problem, first, second in zip(
                problems, completions(tokenizer, prompts, baseline), completions(tokenizer, prompts, backend)
            )
        ]
        with ThreadPoolExecutor(_PROGRAMS_AT_ONCE) as pool:
            for who in ("baseline", "backend"):
                programs = [program(problem, row[who]) for problem, row in zip(problems, rows)]
                failures = pool.map(run_program, programs, [given["seconds"]] * len(rows))
                for row, failure in zip(rows, failures):
                    row[f"{who}_failure"] = failure
        return {"rows": rows, "pages": vars(counts)}

    def summarise(self, records: list[dict], options: Options) -> Section:
        rows = [row for record in records for row in record["rows"]]
        passed = {who: [row[f"{who}_failure"] is None for row in rows] for who in ("baseline", "backend")}
        outcomes = PairedOutcomes.count(passed["baseline"], passed["backend"])
        words, figures, table, flags = describe("pass@1", outcomes, options)
        reads, evidence, unread = pages(records, options)
        same = sum(row["baseline"] == row["backend"] for row in rows)
        differing = [
            [row["problem"], *(row[f"{who}_failure"] or "passed" for who in ("baseline", "backend"))]
            for row in rows
            if row["baseline"] != row["backend"]
        ]
        equal = Figure("programs equal", 100 * same / len(rows), "%", better="higher")
        tables = [table, evidence]
        if differing:
            columns = ["Problem", options.baseline_name, options.backend_name]
            tables.insert(1, Table("Problems with two different programs", columns, differing))
        return Section(
            self.name,
            self.title,
            f"{words} {same} of {len(rows)} programs are the same text.",
            figures=[*figures, equal, reads],
            tables=tables,
            notes=[
                "Each program runs in a process of its own without network, with limits on time and memory.",
                "The interval of the difference is Bonett and Price's: it has a width where all samples agree.",
            ],
            flags=[*flags, *unread],
        )


def completions(tokenizer, prompts: list[list[int]], rows: list[list[int]]) -> list[str]:
    """The text that each row adds to its prompt, up to the end of the function."""
    texts = []
    for prompt, row in zip(prompts, rows):
        # Decoded with its prompt: alone, some tokenizers drop a leading space.
        before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + row))
        text = whole[len(before) :]
        texts.append(text[: min((at for at in map(text.find, _STOPS) if at >= 0), default=len(text))])
    return texts


def program(problem: dict, completion: str) -> str:
    """The problem's prompt, a completion, and the tests that it must pass."""
    return f"{problem['prompt'].rstrip()}{completion}\n{problem['test']}\ncheck({problem['entry_point']})\n"
