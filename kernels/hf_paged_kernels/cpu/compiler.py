"""The system's C++ compiler: it is found, and run to its end within a limit."""

import contextlib
import errno
import os
import shlex
import subprocess
from dataclasses import dataclass

import psutil

_NAMES = ("c++", "g++", "clang++")
_ANSWER_SECONDS = 30  # For `--version`.
_COMPILE_SECONDS = 180  # For one file: an object takes 10 seconds, twenty times as long on a machine that is busy.
_ERROR_LINES = 5


class BuildError(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why and what to do."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that answers ``--version``.

    Attributes
    ----------
    command : list of str
        The words that run it, arguments of ``$CXX`` included.
    version : str
        Its answer.
    """

    command: list[str]
    version: str


def find_compiler() -> Compiler:
    """The first of c++, g++ and clang++ that runs; ``$CXX`` alone, where it is set.

    Raises
    ------
    BuildError
        If none does.
    """
    stated = os.environ.get("CXX", "").strip()
    if stated:
        try:
            return _ask(shlex.split(stated))
        except (BuildError, ValueError) as error:  # ValueError: a quotation mark that is never closed.
            raise BuildError(
                f"CXX={stated} is no C++ compiler that runs here: {error}. Set CXX to one that does, or unset it"
            ) from error
    for name in _NAMES:
        with contextlib.suppress(BuildError):
            return _ask([name])
    raise BuildError(
        f"no C++ compiler was found that runs ({', '.join(_NAMES)}): install one (apt install g++, "
        "dnf install gcc-c++, or xcode-select --install), or set CXX to one"
    )


def run_compiler(compiler: Compiler, arguments: list[str]) -> None:
    """Run a compiler to its end.

    Raises
    ------
    BuildError
        If it fails, or does not end.
    """
    try:
        _run([*compiler.command, *arguments], _COMPILE_SECONDS)
    except BuildError as error:
        remedy = "Set CXX to a compiler of C++17, such as g++ 9 or clang++ 10"
        if os.strerror(errno.ENOSPC) in str(error):
            remedy = "Free some space, or set TMPDIR to a folder that has more"
        raise BuildError(f"the C++ compiler {error}\n  {remedy}") from error


def _ask(command: list[str]) -> Compiler:
    return Compiler(command, _run([*command, "--version"], _ANSWER_SECONDS).strip())


def _run(command: list[str], limit: float) -> str:
    """Run a command and return its output. Waits no longer than `limit` seconds."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",  # A compiler may speak another encoding than this locale's.
        )
    except OSError as error:
        raise BuildError(f"{command[0]!r} cannot be run ({error})") from error
    with process:
        try:
            printed, complaints = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            raise BuildError(f"{command[0]!r} did not end within {limit:g} seconds") from None
        finally:
            _end(process)
    if process.returncode:
        said = (complaints or printed).strip().splitlines()[:_ERROR_LINES]
        raise BuildError("\n  ".join([f"{command[0]!r} failed (exit code {process.returncode}):", *said]))
    return printed


def _end(process: subprocess.Popen) -> None:
    """End a compiler that still runs, and what it started: its driver alone leaves the rest of it at work."""
    if process.poll() is None:
        with contextlib.suppress(psutil.Error):
            family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for child in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
