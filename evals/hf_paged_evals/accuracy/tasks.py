"""The accuracy tasks, in the order of the report."""

from hf_paged_evals.accuracy.batches import BatchInvariance
from hf_paged_evals.accuracy.choice import MultipleChoice
from hf_paged_evals.accuracy.greedy import GreedyMatch
from hf_paged_evals.accuracy.humaneval import HumanEval
from hf_paged_evals.accuracy.logits import ForcedLogits
from hf_paged_evals.accuracy.needle import NeedleInHaystack
from hf_paged_evals.accuracy.perplexity import Perplexity

TASKS = (
    GreedyMatch(),
    ForcedLogits(),
    BatchInvariance(),
    Perplexity(),
    HumanEval(),
    MultipleChoice(),
    NeedleInHaystack(),
)
