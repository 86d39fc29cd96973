"""The accuracy tasks, in the order of the report."""

from .batches import BatchInvariance
from .choice import MultipleChoice
from .greedy import GreedyMatch
from .humaneval import HumanEval
from .logits import ForcedLogits
from .needle import NeedleInHaystack
from .perplexity import Perplexity

TASKS = (
    GreedyMatch(),
    ForcedLogits(),
    BatchInvariance(),
    Perplexity(),
    HumanEval(),
    MultipleChoice(),
    NeedleInHaystack(),
)
