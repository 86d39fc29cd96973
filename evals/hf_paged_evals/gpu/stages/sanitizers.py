"""compute-sanitizer over the kernels: accesses out of bounds, and races in shared memory."""

import os
import re
import shutil
import subprocess
import sys

from hf_paged_evals.gpu import sanitized
from hf_paged_evals.gpu.context import Context

TOOLS = ("memcheck", "racecheck")
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", re.IGNORECASE)


def run(context: Context) -> None:
    """Run `sanitized` under each tool; without a card, by itself."""
    command = [sys.executable, "-m", sanitized.__name__]
    # torch's allocator would keep freed memory, in which nothing is out of bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitizer = shutil.which("compute-sanitizer")
    if context.device.type != "cuda" or sanitizer is None:
        why = "the CPU needs none" if context.device.type != "cuda" else "compute-sanitizer is not on the path"
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        context.say("unsanitized", ran=sanitized.DONE in done.stdout, tail=done.stderr[-400:])
        for tool in TOOLS:
            context.refuse(tool, why)
        return
    for number, tool in enumerate(TOOLS):
        # The tools share the time that is left; reports of what one found must not be lost with it.
        limit = (context.seconds_left - 3) / (len(TOOLS) - number)
        try:
            done = subprocess.run(
                [sanitizer, "--tool", tool, *command], capture_output=True, text=True, env=environment, timeout=limit
            )
        except subprocess.TimeoutExpired:
            context.refuse(tool, f"it was not done after {limit:.0f} seconds")
            continue
        context.say("sanitizer", tool=tool, **verdict(done.stdout + done.stderr))


def verdict(output: str) -> dict:
    """Read a tool's output.

    Returns
    -------
    dict
        ``findings``: the errors or hazards counted, None without a summary; ``ran``: all calls were made; and the end
        of the output.
    """
    found = _SUMMARY.search(output)
    return {"findings": int(found[1]) if found else None, "ran": sanitized.DONE in output, "tail": output[-500:]}
