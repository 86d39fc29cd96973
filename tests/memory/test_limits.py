"""The memory that this process may take: by the machine, its control groups and its resource limits."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from hf_paged import PagedConfig
from hf_paged.cli.doctor import report
from hf_paged.config import parse_bytes
from hf_paged.memory import limits, sizing
from hf_paged.memory.limits import Limit, memory_limits
from hf_paged.memory.sizing import available_memory, budget_bytes, physical_memory

CPU = torch.device("cpu")
MIB = 2**20
V2 = "31 23 0:27 {top} {point} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 {top} {point} rw,relatime shared:9 - cgroup cgroup rw,memory"
OTHER = "33 31 0:30 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"


def make_tree(root, files: dict):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def version_2(root, group="/app", top="/", point="/sys/fs/cgroup", **files):
    """A machine with version 2; `files` below the mount point."""
    make_tree(root, {"proc/self/cgroup": f"0::{group}", "proc/self/mountinfo": V2.format(top=top, point=point)})
    return make_tree(root, {f"sys/fs/cgroup/{name}": content for name, content in files.items()})


def of_groups(root) -> dict[str, Limit]:
    """The limits of the control groups in a tree."""
    return {limit.name: limit for limit in limits._control_groups(root)}


def test_a_container_of_version_2(tmp_path):
    version_2(tmp_path, group="/", **{
        "memory.max": 512 * MIB, "memory.high": "max", "memory.current": 300 * MIB,
        "memory.stat": f"anon {100 * MIB}\ninactive_file {150 * MIB}\nactive_file {50 * MIB}",
    })  # fmt: skip
    assert list(of_groups(tmp_path).values()) == [Limit("memory.max of /sys/fs/cgroup", 512 * MIB, 362 * MIB)]


def test_groups_above_count_and_those_beside_do_not(tmp_path):
    version_2(tmp_path, group="/pods/one", **{
        "pods/one/memory.max": 800 * MIB, "pods/one/memory.high": 700 * MIB, "pods/one/memory.current": 100 * MIB,
        "pods/memory.max": 900 * MIB, "pods/memory.current": 850 * MIB,
        "pods/two/memory.max": 1, "pods/two/memory.current": 1,
    })  # fmt: skip
    assert {name: limit.left // MIB for name, limit in of_groups(tmp_path).items()} == {
        "memory.max of /sys/fs/cgroup/pods/one": 700,
        "memory.high of /sys/fs/cgroup/pods/one": 600,
        "memory.max of /sys/fs/cgroup/pods": 50,
    }


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path):
    version_2(tmp_path, **{"app/memory.high": 100, "app/memory.current": 130})
    assert [(limit.total, limit.left) for limit in of_groups(tmp_path).values()] == [(100, 0)]


def test_a_mount_that_begins_inside_the_hierarchy(tmp_path):
    """As Docker mounts version 1 without a namespace: /docker/id is what the container sees as the top."""
    make_tree(tmp_path, {
        "proc/self/cgroup": "5:cpu:/docker/id\n4:memory,hugetlb:/docker/id\n0::/",
        "proc/self/mountinfo": f"{OTHER}\n{V1.format(top='/docker/id', point='/sys/fs/cgroup/memory')}",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 2**63 - 4096,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 50 * MIB,
        "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\nhierarchical_memory_limit {200 * MIB}\n"
        f"total_inactive_file {20 * MIB}",
    })  # fmt: skip
    name = "hierarchical_memory_limit of /sys/fs/cgroup/memory"
    assert list(of_groups(tmp_path).values()) == [Limit(name, 200 * MIB, 170 * MIB)]


@pytest.mark.parametrize("is_inherited", [1, 0])
def test_version_1_with_and_without_inheritance(is_inherited, tmp_path):
    base = "sys/fs/cgroup/memory"
    make_tree(tmp_path, {
        "proc/self/cgroup": "4:memory:/a/b",
        "proc/self/mountinfo": V1.format(top="/", point="/sys/fs/cgroup/memory"),
        f"{base}/a/b/memory.limit_in_bytes": 500, f"{base}/a/b/memory.usage_in_bytes": 100,
        f"{base}/a/memory.limit_in_bytes": 450, f"{base}/a/memory.usage_in_bytes": 440,
        f"{base}/a/memory.use_hierarchy": is_inherited,
    })  # fmt: skip
    assert [limit.left for limit in of_groups(tmp_path).values()] == ([400, 10] if is_inherited else [400])


def test_names_that_are_escaped_or_of_another_namespace(tmp_path):
    point = "/mnt/c groups"
    version_2(tmp_path, group="/../../elsewhere", top="/pods/x", point=point.replace(" ", "\\040"))
    make_tree(tmp_path, {"mnt/c groups/memory.max": 77, "mnt/c groups/memory.current": 7})
    assert list(of_groups(tmp_path).values()) == [Limit(f"memory.max of {point}", 77, 70)]


def test_a_machine_without_control_groups(tmp_path):
    (machine, *rest) = memory_limits(tmp_path)
    assert machine.total == psutil.virtual_memory().total and not rest


@pytest.mark.parametrize("mode, expected", [(0, []), (1, []), (2, [(1000 * 1024, 400 * 1024)])])
def test_strict_overcommit(mode, expected, tmp_path):
    make_tree(tmp_path, {
        "proc/sys/vm/overcommit_memory": mode,
        "proc/meminfo": "MemTotal:  5000 kB\nCommitLimit:  1000 kB\nCommitted_AS:  600 kB\nHugePages_Total: 0",
    })  # fmt: skip
    found = [(limit.total, limit.left) for limit in memory_limits(tmp_path) if limit.counts_addresses]
    assert found == expected


@pytest.fixture
def least(monkeypatch):
    """A machine of 1,000 MiB with one more limit."""

    def set_limit(*limit, **options):
        known = [Limit("this machine's memory", 1000 * MIB, 800 * MIB), Limit(*limit, **options)]
        monkeypatch.setattr(sizing, "memory_limits", lambda: known)
        monkeypatch.setattr(report, "memory_limits", lambda: known)

    return set_limit


def test_the_least_is_what_the_budget_is_a_share_of(least):
    least("memory.max of /a", 300 * MIB, 200 * MIB)
    assert (available_memory(CPU), physical_memory(CPU)) == (200 * MIB, 300 * MIB)
    assert budget_bytes(PagedConfig(), CPU) == 50 * MIB
    said = "800 MiB available of 0.98 GiB; 200 MiB of them for this process: memory.max of /a is 300 MiB"
    assert report._memory() == said
    least("memory.max of /a", 2000 * MIB, 1900 * MIB)
    assert (available_memory(CPU), physical_memory(CPU)) == (800 * MIB, 1000 * MIB)
    assert report._memory() == "800 MiB available of 0.98 GiB"


def test_half_of_a_limited_address_space_stays_free(least):
    least("RLIMIT_AS", 900 * MIB, 400 * MIB, counts_addresses=True)
    assert (available_memory(CPU), physical_memory(CPU)) == (400 * MIB, 200 * MIB)
    assert budget_bytes(PagedConfig(memory_budget="300MiB"), CPU) == 300 * MIB


@pytest.mark.parametrize("budget", [2**70, 10**5000, f"1{400 * '0'}GiB", "1001MiB"], ids=range(4))
def test_a_budget_that_no_machine_has_is_lowered(budget, least, monkeypatch):
    least("memory.max of /a", 2000 * MIB, 1900 * MIB)
    said = []
    monkeypatch.setattr(sizing.logger, "warning_once", said.append)
    assert budget_bytes(PagedConfig(memory_budget=budget), CPU) == 1000 * MIB
    assert len(said) == 1 and "larger than this machine's memory, 1,048,576,000 bytes" in said[0]


def test_amounts_are_exact():
    assert parse_bytes("1.5GiB") == 3 * 2**29 and parse_bytes("9007199254740993") == 9007199254740993


LIMITED = """
import resource, sys
import psutil, torch
from support import zoo
from hf_paged.models import registry
import hf_paged


dense, paged = zoo.pair("llama")
inputs = zoo.prompts([30, 20, 10])
expected = [dense.generate(**inputs, max_new_tokens=12, num_beams=beams) for beams in (1, 2)]
paged.generate(**inputs, max_new_tokens=2)  # Loads the kernels.
hf_paged.release(paged)
used = getattr(psutil.Process().memory_info(), sys.argv[2])
resource.setrlimit(getattr(resource, sys.argv[1]), (used + 2**30, resource.RLIM_INFINITY))
got = [paged.generate(**inputs, max_new_tokens=12, num_beams=beams) for beams in (1, 2)]
(group,) = registry.pools_under(paged)[0].groups.values()
reserved = sum(page.nbytes for layer in group.layers.values() for page in layer.pages)
budget = group.budget_blocks * sum(layer.block_bytes for layer in group.layers.values())
stats = hf_paged.stats(paged)
print(all(map(torch.equal, expected, got)), stats.page_reads > 0, budget, reserved)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name, used", [("RLIMIT_AS", "vms"), ("RLIMIT_DATA", "data")])
def test_a_process_with_a_resource_limit(name, used):
    """The pool reserved as much address space as the machine has memory, and could not be made."""
    command = [sys.executable, "-c", LIMITED, name, used]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    are_equal, are_read, budget, reserved = done.stdout.split()
    assert (are_equal, are_read) == ("True", "True")
    assert 2**30 * 0.2 < int(budget) <= 2**28 and int(budget) < int(reserved) <= 2**29
