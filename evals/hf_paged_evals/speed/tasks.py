"""The speed and memory tasks, in the order of the report."""

from hf_paged_evals.speed.context import Context
from hf_paged_evals.speed.latency import Latency
from hf_paged_evals.speed.memory import Memory
from hf_paged_evals.speed.paper import Paper
from hf_paged_evals.speed.pressure import Pressure
from hf_paged_evals.speed.throughput import Throughput

TASKS = (Throughput(), Latency(), Memory(), Pressure(), Paper(), Context())
