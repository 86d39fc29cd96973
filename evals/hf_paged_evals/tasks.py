"""The tasks that ``hf-paged eval`` knows, in the order of the report."""

from hf_paged_evals.accuracy.tasks import TASKS as ACCURACY
from hf_paged_evals.runner.task import Task
from hf_paged_evals.speed.tasks import TASKS as SPEED

TASKS: dict[str, Task] = {task.name: task for task in (*ACCURACY, *SPEED)}


def find(names: list[str]) -> list[Task]:
    """Tasks by their names, in the order of the report.

    Raises
    ------
    ValueError
        If there is no such task.
    """
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise ValueError(f"no task is called {', '.join(unknown)}: there are {', '.join(TASKS)}")
    return [task for name, task in TASKS.items() if name in names]
