"""The C++ kernels under the address sanitiser: no read or write outside the tensors, on any instruction set."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_paged_kernels.cpu import build
from hf_paged_kernels.cpu.compiler import find_compiler
from support.op_matrix import ISAS

FLAGS = "-O1 -std=c++17 -w -fsanitize=address -fno-omit-frame-pointer -pthread".split()


@pytest.mark.slow
def test_address_sanitizer(tmp_path):
    compiler = find_compiler().command
    objects = [job for job in build._kernel_objects() if job[0].name != "binding.cpp"]
    objects.append((Path(__file__).with_name("sanitize.cpp"), []))

    def compile_one(job):
        index, (source, flags) = job
        target = str(tmp_path / f"{index}.o")
        subprocess.run([*compiler, *FLAGS, *flags, f"-I{build.SOURCES}", "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        targets = list(threads.map(compile_one, enumerate(objects)))
    program = str(tmp_path / "sanitize")
    subprocess.run([*compiler, *FLAGS, *targets, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[:3000]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == list(ISAS)
