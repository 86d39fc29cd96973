"""Every causal model type: does "paged" give the tokens that dense gives, and does it read pages?

python -m hf_paged_evals.zoo [TYPE ... | --write]

Prints a table of outcomes; with ``--write`` puts it on the documentation's page of models. Exits with 1 if any type
gives other tokens, or fails where dense does not.
"""

import argparse
import contextlib
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

import hf_paged
from hf_paged_evals.doc_pages import find_page, rewrite
from hf_paged_evals.equality import differences
from hf_paged_evals.tiny import VOCAB, tiny_config, tiny_model

MODES = {
    "greedy": {},
    "sample": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
}

PAGES, MIXED, GATHER, OWN, REFUSED, UNBUILT, WRONG = (
    "pages",
    "pages and gathers",
    "gather",
    "its own cache",
    "refused",
    "not tried",
    "WRONG",
)
_MEANING = {
    PAGES: "every layer with a KV cache reads pages",
    MIXED: "some calls read pages, others gather",
    GATHER: "stored in pages, gathered to attend",
    OWN: "nothing paged: recurrent, hybrid or indexer layers, no cache, or one that is not a DynamicCache",
    REFUSED: "an error at load time says what to use",
    UNBUILT: "no tiny config is known, or dense itself does not generate",
    WRONG: "differs from dense",
}


@dataclass(frozen=True)
class Outcome:
    """What became of one model type, and why it is not better."""

    kind: str
    reason: str = ""


def ragged_batch() -> dict[str, torch.Tensor]:
    """Two left-padded prompts of 4 and 11 tokens, longer than the tiny windows."""
    ids = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[0, :7] = mask[0, :7] = 0
    return {"input_ids": ids, "attention_mask": mask}


def try_type(model_type: str) -> Outcome:
    """Generate in every mode, dense and paged, with tiny models of that type."""
    try:
        dense = tiny_model(tiny_config(model_type), None)
        expected = {mode: _generate(dense, options) for mode, options in MODES.items()}
    except Exception as error:  # Whatever a config or model of an unknown kind may raise: it is in the table.
        return Outcome(UNBUILT, _first_line(error))
    try:
        paged = tiny_model(tiny_config(model_type), "paged")
    except hf_paged.UnsupportedError:
        return Outcome(REFUSED, "attention classes of its own")
    for mode, options in MODES.items():
        if isinstance(expected[mode], Exception):
            continue
        result = _generate(paged, options)
        if isinstance(result, Exception):
            return Outcome(WRONG, f"{mode}: {_first_line(result)}")
        if any(not difference.is_tie for difference in differences(dense, ragged_batch(), expected[mode], result)):
            return Outcome(WRONG, f"{mode}: other tokens")
    return _judge(hf_paged.stats(paged), expected)


def _generate(model, options: dict) -> torch.Tensor | Exception:
    torch.manual_seed(1)
    try:
        return model.generate(**ragged_batch(), max_new_tokens=8, min_new_tokens=8, pad_token_id=0, **options)
    except Exception as error:  # Some types have no beams, or no cache to reorder: an outcome like any other.
        return error


def _judge(stats: hf_paged.Stats, expected: dict) -> Outcome:
    if all(isinstance(result, Exception) for result in expected.values()):
        return Outcome(UNBUILT, _first_line(expected["greedy"]))
    applied = "the model applies "  # Which operation it was says little to a reader.
    reasons = {"the model computes with its keys and values" if r.startswith(applied) else r for r in stats.gathers}
    reasons = ", ".join(sorted(reasons))
    if stats.page_reads:
        return Outcome(MIXED if stats.gathers else PAGES, reasons)
    return Outcome(GATHER if stats.gathers else OWN, reasons)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def table(outcomes: dict[str, Outcome]) -> str:
    """The outcomes as Markdown, one row for each kind and reason."""
    rows: dict[tuple[str, str], list[str]] = defaultdict(list)
    for model_type, outcome in outcomes.items():
        # Why a type could not be tried differs from type to type and says nothing about pages.
        rows[outcome.kind, "" if outcome.kind == UNBUILT else outcome.reason].append(model_type)
    counts = Counter(outcome.kind for outcome in outcomes.values())
    lines = ["| Outcome | Why | Model types |", "|---|---|---|"]
    for kind, meaning in _MEANING.items():
        for (_, reason), types in sorted(item for item in rows.items() if item[0][0] == kind):
            lines.append(f"| {kind} ({counts[kind]}) | {reason or meaning} | {', '.join(sorted(types))} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types (default: all causal ones)")
    parser.add_argument("--write", action="store_true", help="replace the table of docs/models.md in this checkout")
    arguments = parser.parse_args()
    if arguments.write and arguments.types:
        parser.error("--write makes the whole table: name no types")
    page = find_page("models.md") if arguments.write else None  # Before the table is made: that takes long.
    logging.set_verbosity_error()
    outcomes = {}
    for model_type in arguments.types or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        with contextlib.redirect_stdout(sys.stderr):  # Some models print while they generate.
            outcomes[model_type] = outcome = try_type(model_type)
        print(f"{model_type:24} {outcome.kind:18} {outcome.reason}", file=sys.stderr, flush=True)
    text = table(outcomes)
    print(text)
    if page is not None:
        rewrite("zoo", text, page)
    return int(any(outcome.kind == WRONG for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
