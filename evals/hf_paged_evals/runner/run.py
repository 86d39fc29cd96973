"""Runs the tasks sample by sample, sharded over the processes of ``accelerate launch``, and resumes them."""

import dataclasses
import datetime
import time
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from hf_paged_evals.models.pair import ModelPair
from hf_paged_evals.runner import store
from hf_paged_evals.runner.options import Options
from hf_paged_evals.runner.section import Section
from hf_paged_evals.runner.task import Sample, Task

_PATIENCE = datetime.timedelta(days=7)  # One process may run timed tasks for hours while the others wait.


def run_tasks(options: Options, tasks: list[Task]) -> list[Section] | None:
    """Run every sample that is not finished yet, and summarise all of them.

    Parameters
    ----------
    tasks : list of Task
        Those that `options` names.

    Returns
    -------
    list of Section or None
        None in all processes but the main one.

    Raises
    ------
    ValueError, ImportError, PagedError
        If a task cannot be run as the options say; before any sample is run.
    """
    # Without a GPU, accelerate knows of other processes only if it is told to use the CPU.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)
    folder = Path(options.out)
    with state.local_main_process_first():
        store.claim(options, tasks, folder)
    samples = {task.name: _samples(task, options) for task in tasks}
    models, sections = ModelPair(options), []
    for task in tasks:
        lines = _finish(task, samples[task.name], models, state, folder)
        if lines is not None:
            section = task.summarise([line["record"] for line in lines], options)
            sections.append(dataclasses.replace(section, seconds=sum(line["seconds"] for line in lines)))
    return sections if state.is_main_process else None


def _samples(task: Task, options: Options) -> list[Sample]:
    samples = task.samples(options)
    ids = [sample.id for sample in samples]
    if not ids:
        raise ValueError(f"{task.name} has no samples under these options: raise --limit or change its settings")
    assert len(set(ids)) == len(ids), f"{task.name} names two samples alike"
    return samples


def _finish(
    task: Task, samples: list[Sample], models: ModelPair, state: PartialState, folder: Path
) -> list[dict] | None:
    """Run this process' share of the samples that are left.

    Returns
    -------
    list of dict or None
        The lines of all samples; None in all processes but the main one.
    """
    shard = store.Shard(folder, task.name, state.process_index)
    shard.repair()
    lines = shard.finished()
    if not task.is_timed:
        # A sample keeps its process, finished or not: no two processes can both take it.
        mine = samples[state.process_index :: state.num_processes]
    else:
        mine = samples if state.is_main_process else []
    done = sum(sample.id in lines for sample in mine)
    with tqdm(
        total=len(mine), initial=done, desc=task.name, unit="sample", disable=not state.is_main_process
    ) as progress:
        for sample in mine:
            if sample.id in lines:
                continue
            start = time.perf_counter()
            record = task.run(sample, models)
            lines[sample.id] = shard.append(sample.id, time.perf_counter() - start, record)
            progress.update()
    if state.num_processes > 1:  # Machines need share no folder: the lines travel.
        lines = {line["id"]: line for line in gather_object(list(lines.values()))}
    return [lines[sample.id] for sample in samples] if state.is_main_process else None
