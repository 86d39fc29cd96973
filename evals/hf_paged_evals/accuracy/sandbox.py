"""Runs a generated program in a subprocess: without network, with limits on time, memory, files and processes."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from hf_paged_evals.accuracy.guard import FINISHED

_GUARD = Path(__file__).with_name("guard.py")
_MEMORY = 1 << 30  # bytes
_FILE = 1 << 20  # bytes


def run_program(source: str, seconds: float) -> str | None:
    """Run a Python program; what went wrong in one line, or None.

    The program gets an empty folder and environment, and no packages but Python's own. It cannot open sockets, start
    processes or write files: Python refuses, and where the kernel lets an ordinary user have it, the process is in
    a network without devices. This holds off a program that goes astray, not one that attacks the interpreter.

    Parameters
    ----------
    source : str
    seconds : float
        Time it may take.
    """
    limits = [str(int(seconds) + 1), str(_MEMORY), str(_FILE)]
    command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_GUARD), *limits]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": errors}
        child = subprocess.Popen(command, cwd=folder, env={}, start_new_session=True, **streams)
        try:
            child.communicate(source.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"took more than {seconds:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if child.returncode == FINISHED:
            return None
        errors.seek(0)
        said = errors.read().decode(errors="replace").split("\n")
        return next(
            (line[:200] for line in reversed(said) if line.strip()), f"left with {child.returncode} before its end"
        )
