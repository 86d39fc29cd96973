"""The accuracy tasks, in the order of the report."""

from .greedy import GreedyMatch

TASKS = (GreedyMatch(),)
