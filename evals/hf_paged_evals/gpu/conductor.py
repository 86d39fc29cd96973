"""Runs the stages one after another, each in a forked child with a limit. This process never touches CUDA."""

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
from transformers.utils import logging

import hf_paged  # Imported once, here: the children begin with it.
from hf_paged_evals.gpu.bars import describe, judge
from hf_paged_evals.gpu.context import Context
from hf_paged_evals.gpu.plan import STAGES, Stage
from hf_paged_evals.gpu.recorder import FILE, Recorder, read_lines
from hf_paged_evals.gpu.report import write_report

_LEAST = 5.0  # Seconds with which a stage is begun at all.
_OWN_STAGE = "run"


def conduct(options: argparse.Namespace, stages: tuple[Stage, ...] = STAGES) -> int:
    """Run the stages, say the verdicts, and write the report.

    Parameters
    ----------
    options : argparse.Namespace
        As `options.parse` returns them.
    stages : tuple of Stage
        Those to choose from.

    Returns
    -------
    int
        The exit code: 0 if every stage came to its end, whatever the verdicts are.

    Raises
    ------
    ValueError
        If the folder holds a run already, or there is no GPU and the run is no dry one.
    """
    path = options.out / FILE
    if path.exists():
        raise ValueError(f"{options.out} holds a run already: name another folder with --out, or delete it")
    if not options.dry and not _has_gpu():
        raise ValueError(
            f"torch {torch.__version__} finds no CUDA GPU here: run this on a machine with one, under a torch that is "
            "built for it, or add --dry for a trial on the CPU"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    recorder = Recorder(path, _OWN_STAGE, time.monotonic())
    recorder.say(
        "begin",
        card=_card_name(options.dry),
        dry=options.dry,
        seconds=options.seconds,
        hf_paged=hf_paged.__version__,
        command=["hf-paged", "eval", "gpu", *sys.argv[1:]],
    )
    chosen = [stage for stage in stages if options.only is None or stage.name in options.only]
    _import_for(chosen)
    outcomes = [_run_stage(stage, options, recorder) for stage in chosen]
    verdicts = judge(read_lines(path))
    for verdict in verdicts:
        recorder.say("verdict", **vars(verdict))
    print(describe(verdicts))
    for written in write_report(options.out, options.out):
        print(written)
    return 0 if all(outcome == "done" for outcome in outcomes) else 1


def _has_gpu() -> bool:
    """Tell whether torch finds a GPU. A child asks: the question may initialise CUDA."""
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(Exception):
            status = 0 if torch.cuda.is_available() else 1
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _card_name(is_dry: bool) -> str:
    """The first card's name, by a tool that leaves this process without CUDA."""
    if is_dry:
        return "CPU, dry run"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown card"
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else "unknown card"


def _import_for(stages: list[Stage]) -> None:
    """Import what the stages import, once for all of them; one that cannot be imported says so in its own process."""
    for stage in stages:
        with contextlib.suppress(Exception):
            stage.load()
    importlib.import_module("transformers.models.llama.modeling_llama")


def _run_stage(stage: Stage, options: argparse.Namespace, recorder: Recorder) -> str:
    """Run a stage in a child, record how it ended, and return that."""
    began, mine = time.monotonic(), recorder.of(stage.name)
    limit = min(stage.seconds, options.seconds - (began - recorder.began))
    if limit < _LEAST:
        outcome = f"not run: the {options.seconds:.0f} seconds of the run are over"
    else:
        compiled = _num_compiled()
        child = os.fork()
        if child == 0:
            _be_stage(stage, options, mine, began + limit)
        outcome = _wait(child, began + limit, limit)
        compiled = _num_compiled() - compiled
        mine.say("end", outcome=outcome, seconds=time.monotonic() - began, kernels_compiled=compiled)
        return outcome
    mine.say("end", outcome=outcome, seconds=0.0, kernels_compiled=0)
    return outcome


def _be_stage(stage: Stage, options: argparse.Namespace, recorder: Recorder, deadline: float) -> None:
    """Run a stage in this process, which is a child, and end it."""
    os.setsid()  # What the stage starts is of its group, and ends with it.
    code = 1
    try:
        device = torch.device("cpu" if options.dry else "cuda:0")
        stage.load()(Context(device, options.dry, options.out, recorder, deadline))
        code = 0
    except BaseException:
        recorder.say("error", error=traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # No clean-up of the parent's: it is the parent's.


def _wait(child: int, deadline: float, limit: float) -> str:
    """Wait for a child until its deadline, and say how it ended. All of its group ends with it."""
    status = None
    while status is None and time.monotonic() < deadline:
        done, found = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(found) if done else None
        if status is None:
            time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)  # If it has no group of its own yet.
        os.waitpid(child, 0)
        return f"killed after its {limit:.0f} seconds"
    if status < 0:
        return f"died of {signal.Signals(-status).name}"
    return "done" if status == 0 else "failed: its error stands above"


def _num_compiled() -> int:
    """Kernels in Triton's cache on disk."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    return sum(1 for _ in folder.glob("*/*.ttir")) if folder.is_dir() else 0
