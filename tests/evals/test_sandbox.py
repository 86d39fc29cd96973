"""Programs of HumanEval: what passes, what fails, and what they may not do."""

import time

import pytest

from hf_paged_evals.accuracy.humaneval import completions, program
from hf_paged_evals.accuracy.sandbox import run_program

SECONDS = 5.0


@pytest.mark.parametrize("source", ["x = 1", "import math, re, hashlib, collections, typing", "print('a' * 3_000_000)"])
def test_a_program_that_comes_to_its_end_passes(source):
    assert run_program(source, SECONDS) is None


@pytest.mark.parametrize(
    "source, words",
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "left with 0 before its end"),
        ("import os; os._exit(0)", "left with 0 before its end"),
        ("x = 'a' * (2 << 30)", "MemoryError"),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "PermissionError: socket"),
        ("import os; os.system('true')", "PermissionError: os.system is not allowed here"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError: subprocess.Popen is not allowed"),
        ("import os; os.fork()", "PermissionError: os.fork"),
        ("open('here', 'w')", "PermissionError: files can be read only"),
        ("import os; os.open('here', os.O_CREAT | os.O_WRONLY)", "PermissionError: files can be read only"),
        ("import numpy", "ModuleNotFoundError"),
    ],
)
def test_what_a_program_may_not_do(source, words):
    assert words in run_program(source, SECONDS)


def test_a_program_without_end_is_stopped():
    start = time.monotonic()
    assert run_program("while True: pass", 0.5) == "took more than 0.5 s"
    assert time.monotonic() - start < 5


def test_the_environment_is_not_handed_down(monkeypatch):
    monkeypatch.setenv("A_SECRET", "1")
    assert run_program("import os; assert 'A_SECRET' not in os.environ", SECONDS) is None


PROBLEM = {
    "prompt": "def double(x):\n    '''Twice x.'''\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    "entry_point": "double",
}


@pytest.mark.parametrize("completion, passes", [("\n    return 2 * x", True), ("\n    return x", False), ("", False)])
def test_a_problem(completion, passes):
    assert (run_program(program(PROBLEM, completion), SECONDS) is None) == passes


def test_a_completion_ends_where_its_function_does():
    class Letters:
        def decode(self, ids, skip_special_tokens):
            return "".join(map(chr, ids))

    row = list(map(ord, "    return x\n\ndef other():\n    pass"))
    assert completions(Letters(), [[65, 66]], [row]) == ["    return x\n"]
