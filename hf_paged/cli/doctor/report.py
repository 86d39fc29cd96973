"""``hf-paged doctor``: what this machine offers, what is used for what, and whether "paged" works here."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

from hf_paged import __version__
from hf_paged.cli.doctor.gpu_check import check_gpu
from hf_paged.cli.doctor.known_pairs import known_trouble
from hf_paged.cli.doctor.machine import gpu_driver, gpus, vector_units
from hf_paged.cli.plan.report import size
from hf_paged.compat.requirements import as_requirement, is_tested
from hf_paged.config import VARIABLES, PagedConfig
from hf_paged.errors import PagedError
from hf_paged.memory.limits import memory_limits
from hf_paged.memory.sizing import DEFAULT_TOKENS_GPU, DEVICE_SHARE, HOST_SHARE, budget_bytes, step_tokens
from hf_paged_integrations import autoload
from hf_paged_integrations.transformers.hooks import NAME, enable
from hf_paged_integrations.transformers.self_check import check_paged
from hf_paged_kernels import backends
from hf_paged_kernels.cpu import loader
from hf_paged_kernels.cpu.compiler import BuildError, find_compiler
from hf_paged_kernels.triton import dispatch

Line = tuple[str, str]  # A label and what there is to say.
_TESTED = as_requirement()
_AFTER_A_FAILED_CHECK = (
    'use attn_implementation="sdpa"; install another transformers of those tested, which stand above, '
    "and report this output if that does not help"
)
_LABELS = {"prefix_cache_share": "prefix share"}  # Of fields whose name is too long for a label.
_CAPTURES = {
    "auto": "decode steps on CUDA, as CUDA graphs",
    "off": "no steps",
    "ops": "decode steps on every device, as lists of operators",
    "compile": "decode steps on every device, compiled",
}
_MODEL_DTYPE = "that of the model"
_WITHOUT_GPU_KERNELS = "set HF_PAGED_TRITON=0, which gathers instead, and report this output"


def run_doctor() -> bool:
    """Print the report.

    Returns
    -------
    bool
        True if ``attn_implementation="paged"`` works here.
    """
    gpu_lines = gpus()
    _print_machine(gpu_lines)
    works = _is_enabled() and _passes_check() and _is_environment_valid()
    if works:
        _print("What is used", kernel_state(bool(gpu_lines)))
        works = not gpu_lines or not dispatch.state().available or _passes_gpu_check()
    if works:
        print("\nmodel.config._attn_implementation names the implementation of a model that you have loaded.")
        print(f'\nattn_implementation="{NAME}" works here.')
    return works


def kernel_state(has_gpu: bool) -> list[Line]:
    """Return the code that attends on each kind of device, and why better code is there but not used."""
    built_in = [("CPU attention", _cpu_attention()), ("GPU attention", _gpu_attention(has_gpu))]
    return [*built_in, *_other_backends()]


def _print(title: str, lines: list[Line]) -> None:
    print(title)
    for label, text in lines:
        print(f"  {label:<16}{text}")


def _print_machine(gpu_lines: list[str]) -> None:
    _print("Versions", [*_versions(), *known_trouble()])
    _print("Processor", _processor())
    _print("Compiler", _compiler())
    _print("GPU", _gpu(gpu_lines, gpu_driver()))
    _print("Defaults on this machine, without hf_paged.configure", _defaults())


def _is_enabled() -> bool:
    """Tell whether transformers takes the hooks; print why not."""
    try:
        enable()
    except PagedError as error:
        _print("Check", [("a tiny llama", "not run")])
        print(f'\nattn_implementation="{NAME}" cannot work here: {error}.')
        print(f"In a fresh environment: pip install 'transformers{_TESTED}'")
        return False
    return True


def _passes_check() -> bool:
    """Tell whether a tiny model generates the same tokens dense and paged; print how it went."""
    try:
        counted = check_paged()  # Compiles the C++ kernels if that was never done.
    except Exception as error:  # Any code may fail in there, and the report must say how.
        _print("Check", [("a tiny llama", _failure(error))])
        print(f'\nattn_implementation="{NAME}" does not work here: {_AFTER_A_FAILED_CHECK}.')
        return False
    gathers = sum(counted.gathers.values())
    passed = f"same tokens dense and paged; {counted.page_reads} page reads, {gathers} gathers, every block returned"
    together = "its items run together over a list, with the texts of the dense one"
    _print("Check", [("a tiny llama", passed), ("a tiny pipeline", together)])
    return True


def _is_environment_valid() -> bool:
    """Tell whether a pool can be made from the environment; print why not."""
    try:
        PagedConfig.from_environment()
    except PagedError as error:
        print(f'\nattn_implementation="{NAME}" cannot work with this environment: {error}. Or unset the variable.')
        return False
    return True


def _passes_gpu_check() -> bool:
    """Tell whether the kernels are right on the first GPU; print that and their speed."""
    try:
        found = check_gpu(torch.device("cuda", 0))
    except Exception as error:  # As above.
        _print("GPU kernels", [("against torch", _failure(error))])
        print(f'\nattn_implementation="{NAME}" does not work on this GPU: {_WITHOUT_GPU_KERNELS}.')
        return False
    attention, copy = found.attention / 1e9, found.copy / 1e9
    lines = [
        ("against torch", f"{found.cases} calls agree with the reference"),
        ("decode attention", f"reads keys and values at {attention:,.0f} GB/s"),
        ("a plain copy", f"reads and writes at {copy:,.0f} GB/s: attention reaches {attention / copy:.0%} of it"),
    ]
    _print("GPU kernels", lines)
    return True


def _failure(error: Exception) -> str:
    return f"failed: {str(error) or type(error).__name__}"


def _cpu_attention() -> str:
    kernels = loader.state()
    if kernels.available:
        return f"C++ kernels for {kernels.isa} read the pages in place (float32, bfloat16, float16)"
    reason = " ".join((kernels.reason or "").split())
    return f"plain torch, several times slower: gathers the blocks of a layer, then SDPA. No C++ kernels: {reason}"


def _gpu_attention(has_gpu: bool) -> str:
    if not has_gpu:
        return "nothing: torch sees no GPU"
    kernels = dispatch.state()
    if kernels.available:
        return "Triton kernels read the pages in place (float32, bfloat16, float16)"
    return f"plain torch: gathers the blocks of a layer, then SDPA. No Triton kernels: {kernels.reason}"


def _other_backends() -> list[Line]:
    """Attention backends that are not built in, in the order in which they are asked."""
    lines = []
    for backend in backends.registered():
        if backend.name not in ("cpp", "triton", "torch"):
            state = backend.state()
            use = "can be used" if state.available else f"cannot be used: {state.reason}"
            lines.append((backend.name, f"a backend for {backend.device_type or 'every device'}, {use}"))
    return lines


def _versions() -> list[Line]:
    return [
        ("hf_paged", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("transformers", f"{_version('transformers')} ({'tested' if is_tested() else 'not tested'}: {_TESTED})"),
        ("accelerate", _version("accelerate")),
        ("triton", _version("triton")),
    ]


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> list[Line]:
    about, units = torch.cpu.get_capabilities(), vector_units()
    cores = psutil.cpu_count(logical=False) or "number unknown"
    has = ", ".join(f"{title} {'yes' if present else 'no'}" for title, present in units.items()) or "none known"
    return [
        ("name", f"{about.get('cpu_name', 'unknown')} ({platform.machine()})"),
        ("cores", f"{cores}; {psutil.cpu_count()} logical; torch uses {torch.get_num_threads()} threads"),
        ("vector units", f"{has}; torch's own kernels use {torch.backends.cpu.get_cpu_capability()}"),
        ("memory", _memory()),
    ]


def _memory() -> str:
    machine, *others = memory_limits()
    said = f"{size(machine.left)} available of {size(machine.total)}"
    least = min(others, key=lambda limit: limit.left, default=machine)
    if least.left >= machine.left:
        return said
    return f"{said}; {size(least.left)} of them for this process: {least.name} is {size(least.total)}"


def _compiler() -> list[Line]:
    try:
        found = find_compiler()
    except BuildError as error:
        return [("C++", " ".join(str(error).split()))]
    return [("C++", next(iter(found.version.splitlines()), " ".join(found.command)))]


def _gpu(lines: list[str], driver: str | None) -> list[Line]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    if lines:
        about = [(f"cuda:{index}", line) for index, line in enumerate(lines)]
        return [*about, ("torch", f"built with {build}"), ("driver", driver or "version unknown")]
    if torch.version.cuda is None and torch.version.hip is None:
        why = "none that torch can use: this torch is built for the CPU alone"
    else:
        why = f"none found, though torch is built with {build}"
    return [("device", why), ("driver", f"NVIDIA {driver}" if driver else "no NVIDIA driver found")]


def _defaults() -> list[Line]:
    """The configuration of a model that `hf_paged.configure` was not called for, and where each value comes from."""
    try:
        config = PagedConfig.from_environment()
    except PagedError as error:
        return [("environment", str(error)), ("zero-code", _zero_code())]
    budget = budget_bytes(config, torch.device("cpu"))
    share = f": {HOST_SHARE:.0%} of what is available now, {DEVICE_SHARE:.0%} of it on a GPU"
    share = share if config.memory_budget is None else ""
    on_gpus = f", {DEFAULT_TOKENS_GPU:,} on a GPU" if config.token_budget is None else ""
    texts = {
        "block_size": f"{config.block_size} tokens",
        "memory_budget": f"{budget:,} bytes ({size(budget)}){share}",
        "token_budget": f"{step_tokens(config, torch.device('cpu')):,} tokens a step{on_gpus}",
        "prefix_cache": "on" if config.prefix_cache else "off",
        "prefix_cache_share": f"{config.prefix_cache_share:.1%} of the memory budget",
        "prepack_weights": "on" if config.prepack_weights else "off",
        "cache_salt": "set" if config.cache_salt else "none",  # It may be a secret, and reports are passed on.
        "eviction_policy": config.eviction_policy,
        "capture": _CAPTURES[config.capture],
        "kv_dtype": config.kv_dtype or _MODEL_DTYPE,
        "kv_dtype_window": config.kv_dtype_window or _MODEL_DTYPE,
    }
    lines = [(_LABELS.get(name, name.replace("_", " ")), f"{text}{_source(name)}") for name, text in texts.items()]
    return [*lines, ("zero-code", _zero_code())]


def _source(field: str) -> str:
    variable = VARIABLES[field]
    return f", by {variable}" if os.environ.get(variable, "").strip() else ""


def _zero_code() -> str:
    obstacle = autoload.why_off()
    if obstacle is None:
        return f'on: attn_implementation="{NAME}" works without `import hf_paged`'
    return f'off, attn_implementation="{NAME}" needs `import hf_paged`: {obstacle}'
