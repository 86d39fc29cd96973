"""Every causal model type as a tiny random model: the tokens of "paged" against those of dense, and the way it attends.

Exits with 1 if any type gives other tokens, or fails where dense does not.
"""

import argparse
import contextlib
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import hf_paged
from hf_paged_evals.accuracy.equality import differences
from hf_paged_evals.models.tiny import VOCAB, tiny_config, tiny_model
from hf_paged_evals.runner.script import Script
from hf_paged_evals.runner.section import Figure, Section, Table

NAME = "model-types"
QUICK = {"types": ["llama", "mistral", "bloom", "mamba"]}
MODES = {
    "greedy": {},
    "sample": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
}

PAGES, MIXED, GATHER = "pages", "pages and gathers", "gather"
OWN, REFUSED, UNBUILT, WRONG = "its own cache", "refused", "not tried", "WRONG"
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
    """The way that one model type attends, and the reason why it is not better."""

    kind: str
    reason: str = ""


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this measurement."""
    everything = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    parser.add_argument("--types", nargs="+", metavar="TYPE", default=everything, help="(default: all causal ones)")


def measure(given: argparse.Namespace) -> Section:
    """The outcome of every type, each named on standard error as it comes."""
    outcomes = {}
    for model_type in given.types:
        with contextlib.redirect_stdout(sys.stderr):  # Some models print while they generate.
            outcomes[model_type] = outcome = try_type(model_type)
        print(f"{model_type:24} {outcome.kind:18} {outcome.reason}", file=sys.stderr, flush=True)
    counts = Counter(outcome.kind for outcome in outcomes.values())
    return Section(
        NAME,
        "Causal model types",
        f"{len(outcomes)} types: {', '.join(f'{counts[kind]} {kind}' for kind in _MEANING if counts[kind])}.",
        [Figure(kind, counts[kind], "types") for kind in _MEANING],
        [table(outcomes)],
        flags=[f"{name}: {one.reason}" for name, one in outcomes.items() if one.kind == WRONG],
    )


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
    except Exception as error:  # A config or model of an unknown kind may raise anything: it is in the table.
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


def _generate(model: PreTrainedModel, options: dict) -> torch.Tensor | Exception:
    torch.manual_seed(1)
    try:
        return model.generate(**ragged_batch(), max_new_tokens=8, min_new_tokens=8, pad_token_id=0, **options)
    except Exception as error:  # Some types have no beams, or no cache to reorder: an outcome like any other.
        return error


def _judge(stats: hf_paged.Stats, expected: dict) -> Outcome:
    if all(isinstance(result, Exception) for result in expected.values()):
        return Outcome(UNBUILT, _first_line(expected["greedy"]))
    applied = "the model applies "  # The operation that it was says little to a reader.
    reasons = {"the model computes with its keys and values" if r.startswith(applied) else r for r in stats.gathers}
    reason = ", ".join(sorted(reasons))
    if stats.page_reads:
        return Outcome(MIXED if stats.gathers else PAGES, reason)
    return Outcome(GATHER if stats.gathers else OWN, reason)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def table(outcomes: dict[str, Outcome]) -> Table:
    """The outcomes, a row for each kind and reason."""
    types: dict[tuple[str, str], list[str]] = defaultdict(list)
    for model_type, outcome in outcomes.items():
        # Why a type could not be tried differs from type to type and says nothing about pages.
        types[outcome.kind, "" if outcome.kind == UNBUILT else outcome.reason].append(model_type)
    counts = Counter(outcome.kind for outcome in outcomes.values())
    rows = []
    for kind, meaning in _MEANING.items():
        for reason in sorted(reason for other, reason in types if other == kind):
            names = ", ".join(sorted(types[kind, reason]))
            rows.append([f"{kind} ({counts[kind]})", reason or meaning, names])
    return Table("By outcome", ["Outcome", "Why", "Model types"], rows)


main = Script(NAME, __doc__, add_settings, measure, QUICK).main

if __name__ == "__main__":
    sys.exit(main())
