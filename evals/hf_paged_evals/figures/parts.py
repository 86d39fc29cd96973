"""The runs that measure the published figures. Each has a results file ``evals/results/NAME.json``."""

import json
from dataclasses import dataclass

MODEL, DATASET = "model", "dataset"  # Options that a run takes.


@dataclass(frozen=True)
class Part:
    """One run of ``hf-paged eval``.

    Attributes
    ----------
    name : str
        Of its results file, and the word on the command line.
    words : tuple of str
        Follow ``hf-paged eval``.
    quick : tuple of str
        Added for a trial: small settings under which the figures have the same names.
    takes : tuple of str
        `MODEL`, `DATASET` or both: what a trial can replace.
    """

    name: str
    words: tuple[str, ...]
    quick: tuple[str, ...] = ("--quick",)
    takes: tuple[str, ...] = (MODEL,)

    @property
    def is_report(self) -> bool:
        """The run writes a folder with a report, and can go on where it was cut off."""
        return self.words[0].startswith("--")


def parts_named(names: list[str]) -> list[Part]:
    """The parts that `names` stand for: a name, or its beginning before a dash.

    Raises
    ------
    ValueError
        If a name stands for none.
    """
    chosen = []
    for name in names:
        found = [part for part in PARTS if part.name == name or part.name.startswith(f"{name}-")]
        if not found:
            raise ValueError(f"no part is called {name}: there are {', '.join(part.name for part in PARTS)}")
        chosen += found
    return [part for part in PARTS if part in chosen]


def _set(task: str, **settings) -> tuple[str, ...]:
    """Words that set the settings of a task."""
    pairs = (f"{task}.{name}={json.dumps(value, separators=(',', ':'))}" for name, value in settings.items())
    return tuple(word for pair in pairs for word in ("--set", pair))


def _task(name: str, task: str, dtype: str, settings: dict, quick: dict, *options: str) -> Part:
    words = ("--tasks", task, "--dtype", dtype, *options, *_set(task, **settings))
    return Part(name, words, _set(task, **quick), (MODEL, DATASET))


def _microbench(name: str, module: str, *words: str, **fields) -> Part:
    return Part(name, ("microbench", module, *words), **fields)


_THROUGHPUT = {"workloads": ["ragged"], "new_tokens": 128, "batches": [8, 32], "extras": False}
_THROUGHPUT_QUICK = {"new_tokens": 2, "max_prompt": 64, "repeats": 1}
_BLOCKS_QUICK = {"max_prompt": 64, "waste_new_tokens": 2, "long_prompt": 64, "long_new_tokens": 4}
_MEMORY = {"rows": 0, "generate_batch": False, "repeats": 2}
_ATTENTION = ("--case", "8x2048", "32x1024", "prefill", "--order", "random", "in-order")
_STEP = ("--case", "32x1024", "8x128")
_ACCURACY_QUICK = ("--quick", "--limit", "2")

PARTS = (
    _task("throughput-bfloat16", "throughput", "bfloat16", _THROUGHPUT, _THROUGHPUT_QUICK),
    _task("throughput-float32", "throughput", "float32", _THROUGHPUT, _THROUGHPUT_QUICK),
    _task("memory-float32", "memory", "float32", _MEMORY, {"long_rows": 2, "long_prompt": 32, "new_tokens": 2}),
    _task("blocks-16", "paper", "float32", {"kinds": ["waste", "long"]}, _BLOCKS_QUICK),
    _task("blocks-32", "paper", "float32", {"kinds": ["waste"]}, _BLOCKS_QUICK, "--block-size", "32"),
    _microbench("attention-bfloat16", "attention_kernel", "--dtype", "bfloat16", *_ATTENTION, takes=()),
    _microbench("attention-float32", "attention_kernel", "--dtype", "float32", *_ATTENTION, takes=()),
    _microbench("decode-step-bfloat16", "decode_step", "--dtype", "bfloat16", *_STEP),
    _microbench("decode-step-float32", "decode_step", "--dtype", "float32", *_STEP),
    _microbench("short-prompt-bfloat16", "short_prompt", "--dtype", "bfloat16"),
    _microbench("short-prompt-float32", "short_prompt", "--dtype", "float32"),
    _microbench("prefix-bfloat16", "prefix", "--dtype", "bfloat16"),
    _microbench("threads-bfloat16", "threads", "--dtype", "bfloat16", takes=(MODEL, DATASET)),
    _microbench("threads-float32", "threads", "--dtype", "float32", takes=(MODEL, DATASET)),
    _microbench("pipeline-bfloat16", "pipeline_speed", "--dtype", "bfloat16", takes=(MODEL, DATASET)),
    _microbench("async-bfloat16", "async_latency", "--dtype", "bfloat16", takes=(MODEL, DATASET)),
    _microbench(
        "scheduler",
        "scheduler_cost",
        "--rows",
        "64",
        "256",
        "1024",
        quick=("--context", "32", "--steps", "2"),
        takes=(),
    ),
    _microbench("identity-float32", "identity_cost", "--dtype", "float32", "--rows", "1"),
    _microbench("autoload", "autoload_cost", takes=()),
    Part("triton", ("triton",), takes=()),
    Part(
        "accuracy-bfloat16",
        ("--tasks", "greedy", "logits", "perplexity", "humaneval", "--dtype", "bfloat16", *_set("greedy", batch=16)),
        _ACCURACY_QUICK,
    ),
    Part(
        "accuracy-float32",
        ("--tasks", "greedy", "logits", "batch", "perplexity", "choice", "needle", "--dtype", "float32")
        + _set("greedy", batch=16),
        _ACCURACY_QUICK,
    ),
    _task("needle-float32", "needle", "float32", {}, {"lengths": [160], "depths": [0.5]}),
    _task(
        "paper-bfloat16",
        "paper",
        "bfloat16",
        {
            "kinds": ["waste", "sharing", "prefix"],
            "prompts": 1,
            "rows": [4],
            "new_tokens": 128,
            "repeats": 1,
            "prefix_prompts": 8,
        },
        {
            **_BLOCKS_QUICK,
            "new_tokens": 4,
            "short_prompt": 64,
            "short_new_tokens": 4,
            "prefix_prompts": 2,
            "prefix_new_tokens": 2,
        },
    ),
    Part("model-types", ("model-types",), takes=()),
)
