"""Every program in `examples/` runs to its end, and the line that would differ if it were wrong is right."""

import os
import re
import subprocess
import sys

import pytest

from support.installed import CHECKOUT, ROOT

EXAMPLES = ROOT / "examples"
# (program, arguments, a line of its output)
RUNS = [
    ("chat.py", "--max-new-tokens 20", r"3 of 3 answers equal those of the dense cache, token for token"),
    ("batch_dataset.py", "--rows 6 --max-new-tokens 12", r"6 of 6 rows ran packed; \d+ tokens .* prefix cache"),
    ("streaming_server.py", "--self-test", r"2 of 2 answers equal those of the dense cache"),
    ("lm_eval_harness.py", "", r"complete +exact_match +paged (0\.[1-9]\d*) +dense \1"),
    ("trl_grpo.py", "--completions 2 --max-completion-length 8", r"paged .* 2 packed calls, .* fallbacks \{\}"),
    ("peft_adapters.py", "--steps 2 --max-new-tokens 8", r"6 of 6 answers equal .*; 6 calls ran packed"),
    ("saved_prefix.py", "--books 12", r"A new process, with the file: .* s, [1-9]\d\d of \d+ prompt tokens found"),
    ("long_context.py", "--days 40", r"  first token after .* s, [1-9]\d* of \d+ prompt tokens from the prefix cache"),
]
NEEDED_MODULES = {"lm_eval_harness.py": "lm_eval", "trl_grpo.py": "trl"}


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.needs_module(NEEDED_MODULES[name])] if name in NEEDED_MODULES else []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "line"), [pytest.param(*run, id=run[0], marks=marks_of(run[0])) for run in RUNS]
)
def test_program(name, arguments, line, tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments.split()],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(map(str, CHECKOUT))},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(f"^{line}$", done.stdout, re.M), done.stdout


def test_no_program_is_forgotten():
    programs = {path.name for path in EXAMPLES.glob("[!_]*.py")}
    assert programs == {name for name, *_ in RUNS}
    assert programs == set(re.findall(r"^\| \[(\w+\.py)\]", (EXAMPLES / "README.md").read_text(), re.M))
