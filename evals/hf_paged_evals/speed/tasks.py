"""The speed and memory tasks, in the order of the report."""

from .context import Context
from .latency import Latency
from .memory import Memory
from .paper import Paper
from .pressure import Pressure
from .throughput import Throughput

TASKS = (Throughput(), Latency(), Memory(), Pressure(), Paper(), Context())
