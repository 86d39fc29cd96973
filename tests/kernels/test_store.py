"""The folder of compiled kernels: nothing is loaded from it that others could have written, or that is not whole."""

import errno
import fcntl
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from hf_paged_kernels.cpu import loader, store
from hf_paged_kernels.cpu.compiler import BuildError
from support.small_library import build_one, plant

USE = """
import torch
from hf_paged_kernels import ops
from hf_paged_kernels.cpu import loader
caches = [torch.ones(2, 1, 4, 8) for _ in range(2)]
ops.copy_blocks(*caches, torch.tensor([0]), torch.tensor([1]))
print(loader.state().available)
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_PAGED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load_one(path) -> int:
    return store.load_library(store.open_library(path), path).one()


def test_the_folder_is_of_its_user_alone(cache, tmp_path):
    before = os.umask(0)
    try:
        path = build_one(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in cache.glob("*.s*")} == {0o644}
    record = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
    assert path.with_name(f"{path.name}.sha256").read_text() == record and load_one(path) == 1


def test_others_may_write_the_parent_if_it_is_like_tmp(cache, tmp_path):
    tmp_path.chmod(0o1777)
    assert load_one(build_one(tmp_path)) == 1


DAMAGES = {
    "empty": lambda path, record: path.write_bytes(b""),
    "truncated": lambda path, record: path.write_bytes(path.read_bytes()[:5000]),
    "one bit": lambda path, record: path.write_bytes(path.read_bytes()[:-1] + b"\1"),
    "no record": lambda path, record: record.unlink(),
    "an empty record": lambda path, record: record.write_bytes(b""),
    "no library": lambda path, record: path.unlink(),
    "another's record": lambda path, record: record.write_text(record.read_text().replace("one-", "cpu-")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_not_whole_is_compiled_anew(damage, cache, tmp_path):
    path = build_one(tmp_path)
    content, number = path.read_bytes(), path.stat().st_ino
    damage(path, path.with_name(f"{path.name}.sha256"))
    assert not store.has_library(path)
    assert build_one(tmp_path) == path and path.stat().st_ino != number
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(content).digest() and load_one(path) == 1


def disown(path, monkeypatch):
    """Make a file another user's."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:  # Only root can; then this is another user's process.
        monkeypatch.setattr(os, "geteuid", lambda: 12345)


UNTRUSTED = {
    "a folder that all may write": (lambda path, patch: path.parent.chmod(0o777), "cache can be written .*mode 777"),
    "a folder like /tmp": (lambda path, patch: path.parent.chmod(0o1777), "cache can be written .*mode 1777"),
    "a folder of a group": (lambda path, patch: path.parent.chmod(0o770), "cache can be written .*mode 770"),
    "another's folder": (lambda path, patch: disown(path.parent, patch), "belongs to another user"),
    "a library that all may write": (lambda path, patch: path.chmod(0o666), "so can be written .*mode 666"),
    "another's library": (lambda path, patch: disown(path, patch), "belongs to another user"),
    "another's record": (lambda path, patch: disown(f"{path}.sha256", patch), "belongs to another user"),
    "a record that all may write": (lambda path, patch: os.chmod(f"{path}.sha256", 0o606), "sha256 can be written"),
    "a pipe": (lambda path, patch: (path.unlink(), os.mkfifo(path)), "so is not what compiled kernels are kept in"),
    "a folder for a library": (lambda path, patch: (path.unlink(), path.mkdir()), "so is not what compiled kernels"),
}


@pytest.mark.parametrize("case", UNTRUSTED)
def test_what_others_could_have_written_is_refused(case, cache, tmp_path, monkeypatch):
    make_untrusted, words = UNTRUSTED[case]
    path = build_one(tmp_path)
    make_untrusted(path, monkeypatch)
    with pytest.raises(BuildError, match=f"{words}.*set HF_PAGED_CACHE to a folder that does not exist yet"):
        build_one(tmp_path)


@pytest.mark.parametrize("owner, mode, is_trusted", [
    (0, 0o755, True), (0, 0o555, True), (1000, 0o700, True), (1000, 0o755, True),
    (0, 0o775, False), (1000, 0o757, False), (1001, 0o500, False), (65534, 0o755, False),
])  # fmt: skip
def test_root_and_the_user_are_trusted(owner, mode, is_trusted, monkeypatch):
    """As in an image that root has made, in which another user runs."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    found = SimpleNamespace(st_uid=owner, st_mode=stat.S_IFDIR | mode)
    try:
        store._check_writers("a folder", found, stat.S_ISDIR)
        assert is_trusted
    except BuildError:
        assert not is_trusted


def test_a_system_without_owners_is_trusted(cache, tmp_path, monkeypatch):
    path = build_one(tmp_path)
    path.chmod(0o666)
    monkeypatch.delattr(os, "geteuid")
    assert load_one(path) == 1


def test_a_planted_library_does_not_run(tmp_path):
    """It lies in a folder that is shared, under the right name, and with a record of its own content."""
    library, marker = plant(tmp_path)
    (shared := tmp_path / "shared").mkdir()
    path = shared / loader.state().path.name
    shutil.copy(library, path)
    path.with_name(f"{path.name}.sha256").write_bytes(store._record(path.read_bytes(), path))
    shared.chmod(0o777)
    environment = {**os.environ, "HF_PAGED_CACHE": str(shared)}
    done = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "False\n" and not marker.exists()
    assert done.stderr.count("is not trusted: set HF_PAGED_CACHE") == 1


@pytest.mark.parametrize("has_proc", [True, False])
def test_a_library_that_is_swapped_after_the_check_does_not_run(has_proc, cache, tmp_path, monkeypatch):
    library, marker = plant(tmp_path)
    path = build_one(tmp_path)
    descriptor = store.open_library(path)
    os.replace(library, path)
    if not has_proc:
        monkeypatch.setattr(store.os.path, "exists", lambda path: False)
    assert store.load_library(descriptor, path).one() == 1 and not marker.exists()


def test_two_libraries_are_two(cache, tmp_path):
    """The loader knows a library by its path: that of a descriptor must not come back."""
    assert [load_one(build_one(tmp_path, number)) for number in (1, 2)] == [1, 2]


def test_what_cannot_be_loaded_is_said(cache, tmp_path):
    path = build_one(tmp_path)
    content = b"no library"
    path.write_bytes(content), path.with_name(f"{path.name}.sha256").write_bytes(store._record(content, path))
    with pytest.raises(BuildError, match="cannot be loaded .*: delete it and run `hf-paged build`"):
        load_one(path)


def test_a_lock_that_never_opens_is_not_waited_for(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_LOCK_SECONDS", 0.3)
    path = build_one(tmp_path)
    path.unlink()
    with path.with_suffix(".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert load_one(build_one(tmp_path)) == 1


def test_a_lock_is_given_up_though_a_fork_has_it(cache, tmp_path, monkeypatch):
    path = build_one(tmp_path)
    with store.lock_library(path):
        child = os.fork()
        if not child:  # It knows nothing of the lock, and lives on.
            time.sleep(60)
            os._exit(0)
    try:
        with path.with_suffix(".lock").open() as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_system_without_locks(cache, tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert load_one(build_one(tmp_path)) == 1


def test_a_full_disk(cache, tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(BuildError, match="cannot be written .No space left on device.: set HF_PAGED_CACHE"):
        build_one(tmp_path)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


NAMES = ["two words", "a,b 'c' \"d\" $e %f @g", "größe-猫", os.fsdecode(b"no-utf8-\xff"), "-lm"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_unusual_names(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_PAGED_CACHE", os.path.join(name, "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / name))
    assert load_one(build_one(tmp_path)) == 1
