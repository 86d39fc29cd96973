"""The figures of Kwon et al. (SOSP 2023), and ours beside them."""

from hf_paged_evals.data.workloads import SHOTS
from hf_paged_evals.speed.timing import Spread

_SAVED = {
    ("samples", "short"): ("parallel samples, short prompts (the paper: Alpaca)", "6 to 10 %"),
    ("samples", "all"): ("parallel samples, all prompts (the paper: ShareGPT)", "16 to 30 %"),
    ("beams", "short"): ("beams, short prompts (the paper: Alpaca)", "38 to 55 %"),
    ("beams", "all"): ("beams, all prompts (the paper: ShareGPT)", "44 to 66 %"),
}
_FASTER = {"1-shot": "1.67 x", "5-shot": "3.58 x"}


def rows_beside_paper(
    waste: list[dict], sharing: list[dict], prefixes: list[dict], gains: dict[tuple[str, str], Spread]
) -> list[list]:
    """Rows of a name, the paper's figure and ours, for the records that there are."""
    rows = []
    for one in waste:
        rows.append(["KV memory that holds tokens, without pages", "20 to 38 %", _percent([one["dense"]])])
        rows.append(["KV memory that holds tokens, with pages", "96 %", _percent([one["paged"]])])
    for (mode, workload), (what, stated) in _SAVED.items():
        found = [one for one in sharing if (one["mode"], one["workload"]) == (mode, workload)]
        if not found:
            continue
        rows_a_prompt = ", ".join(str(one["rows"]) for one in found)
        saved = _percent([one["saving"] for one in found])
        rows.append([f"blocks saved, {what}", stated, f"{saved}, with {rows_a_prompt} rows a prompt"])
    for one in prefixes:
        what = f"blocks saved, {one['shots']} prefix of {SHOTS[one['shots']]} tokens"
        rows.append([what, "not stated", _percent([one["saving"]])])
    for (shots, name), gain in gains.items():
        what = f"throughput, {shots} prefix of {SHOTS[shots]} tokens: {name}, over dense"
        rows.append([what, _FASTER[shots], f"{gain.value:.2f} x"])
    return rows


def _percent(shares: list[float]) -> str:
    low, high = (f"{100 * share:.1f}" for share in (min(shares), max(shares)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def padding(prompts: list[int]) -> float:
    """Share of the positions of a left-padded batch of prompts of these lengths that are padding."""
    return 1 - sum(prompts) / (len(prompts) * max(prompts))


def dense_share(prompts: list[int], answers: list[int]) -> float:
    """Share of the positions of dense's rectangle that hold tokens of rows that still run, mean over the steps.

    Parameters
    ----------
    prompts, answers : list of int
        Tokens of each row; the rectangle is as wide as the longest prompt, and grows until the longest answer ends.
    """
    steps = range(max(answers))
    shares = []
    for step in steps:
        running = [prompt + step for prompt, answer in zip(prompts, answers) if step < answer]
        shares.append(sum(running) / (len(prompts) * (max(prompts) + step)))
    return sum(shares) / len(steps)
