"""The folder that keeps compiled kernels, and the conditions on which a library is loaded from it.

Loading a library runs its code. It is loaded only if root and this user alone could have written it, and if its content
is what was recorded when it was compiled. Both are checked on an open descriptor, and that descriptor is loaded: a file
that takes the library's place meanwhile changes nothing, and users who can write the folders above gain nothing.
"""

import contextlib
import ctypes
import hashlib
import os
import stat
import tempfile
import time
from pathlib import Path

from hf_paged_kernels.cpu.compiler import BuildError

_REMEDY = "set HF_PAGED_CACHE to a folder that does not exist yet, which only you will be able to write"
_LOCK_SECONDS = 400  # How long a library is waited for that another process compiles: as long as compiling may take.
_PAUSE = 0.1  # Seconds between two looks at the lock.


def cache_folder() -> Path:
    """The folder of compiled kernels: ``$HF_PAGED_CACHE``, else hf_paged in the user's cache folder.

    Raises
    ------
    BuildError
        If the user has none.
    """
    try:
        if stated := os.environ.get("HF_PAGED_CACHE"):
            return Path(stated).absolute()
        users = os.environ.get("XDG_CACHE_HOME")
        return (Path(users) if users else Path.home() / ".cache").absolute() / "hf_paged"
    except (OSError, RuntimeError) as error:  # No HOME and no entry for the user; a working folder that was deleted.
        raise BuildError(f"there is no folder for compiled kernels ({error}): {_REMEDY}") from error


def open_library(path: Path) -> int | None:
    """A descriptor of a library that may be loaded; None if it is missing or damaged and has to be compiled.

    Raises
    ------
    BuildError
        If other users could have written it, or it cannot be read.
    """
    try:
        _check_writers(path.parent, os.stat(path.parent), stat.S_ISDIR)
        with contextlib.ExitStack() as closing:
            descriptor, content = _open_checked(path)
            closing.callback(os.close, descriptor)
            record, recorded = _open_checked(_record_path(path))
            os.close(record)
            if recorded == _record(content, path):
                closing.pop_all()
                return descriptor
    except FileNotFoundError:
        pass
    except OSError as error:
        raise BuildError(f"{path} cannot be read ({error.strerror}): {_REMEDY}") from error
    return None


def has_library(path: Path) -> bool:
    """Tell whether `open_library` would open it."""
    descriptor = open_library(path)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is not None


def load_library(descriptor: int, path: Path) -> ctypes.CDLL:
    """Load what `open_library` has opened. The descriptor stays open.

    Raises
    ------
    BuildError
        If the system cannot load it.
    """
    try:
        # Its number is never used again in this process: the loader knows libraries that it has by their path.
        by_descriptor = f"/proc/self/fd/{descriptor}"
        if os.path.exists(by_descriptor):
            return ctypes.CDLL(by_descriptor)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as private:  # Of this user alone.
            copy = Path(private) / path.name
            with open(descriptor, "rb", closefd=False) as file:
                file.seek(0)
                copy.write_bytes(file.read())
            return ctypes.CDLL(str(copy))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded ({error}): delete it and run `hf-paged build`") from error


def keep_library(built: Path, path: Path) -> None:
    """Put a library that was just compiled in the cache, with a record of its content beside it.

    Raises
    ------
    BuildError
        If the folder cannot be written.
    """
    with _writing(path.parent):
        content = built.read_bytes()
        # The record first: a library without the right one is compiled anew, so a crash between the two does no harm.
        _replace(_record_path(path), _record(content, path))
        _replace(path, content)


@contextlib.contextmanager
def lock_library(path: Path):
    """Hold the lock of a library while it is compiled: processes that start together compile it once.

    The lock saves work, nothing depends on it: where there are no locks, or after a long wait, the block runs without.
    """
    with _writing(path.parent):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(path.with_suffix(".lock"), flags, 0o600)
    try:
        with _lock(descriptor):
            yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _lock(descriptor: int):
    try:
        import fcntl
    except ImportError:
        yield
        return
    give_up = time.monotonic() + _LOCK_SECONDS
    while time.monotonic() < give_up:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(_PAUSE)
        except OSError:  # A file system that knows no locks.
            break
    try:
        yield
    finally:
        # Closing is not enough: a process that was forked meanwhile has the descriptor, too.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


@contextlib.contextmanager
def _writing(folder: Path):
    try:
        yield
    except OSError as error:
        remedy = "set HF_PAGED_CACHE to a folder that can, and has room"
        raise BuildError(f"{folder} cannot be written ({error.strerror}): {remedy}") from error


def _check_writers(path: Path, found: os.stat_result, is_expected) -> None:
    if not is_expected(found.st_mode):
        raise BuildError(f"{path} is not what compiled kernels are kept in: delete it, or {_REMEDY}")
    if not hasattr(os, "geteuid"):  # Windows: these numbers say nothing there.
        return
    if found.st_uid not in (0, os.geteuid()):
        raise BuildError(f"{path} belongs to another user ({found.st_uid}) and is not trusted: {_REMEDY}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(found.st_mode)
        raise BuildError(f"{path} can be written by other users (mode {mode:o}) and is not trusted: {_REMEDY}")


def _open_checked(path: Path) -> tuple[int, bytes]:
    """An open file that can be trusted, and what it holds."""
    # Not blocking: opening a pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_writers(path, os.fstat(descriptor), stat.S_ISREG)
        with open(descriptor, "rb", closefd=False) as file:
            return descriptor, file.read()
    except BaseException:
        os.close(descriptor)
        raise


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _record(content: bytes, path: Path) -> bytes:
    """The line that `sha256sum` prints for a library."""
    return f"{hashlib.sha256(content).hexdigest()}  {path.name}\n".encode()


def _replace(path: Path, content: bytes) -> None:
    """Write a file under another name first: processes that read meanwhile find the old one or the new one, whole."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)  # A folder that root has filled for others must be of use to them.
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
