"""The cost of seeing that a model is still the same: per call and per step of `generate`, SmolLM2-135M-Instruct.

    python evals/identity_cost.py [--rows 1 --rows 32] [--context 128] [--repeats 60]

`identify` runs once per call, `Identity.holds` once per step. Medians in milliseconds, in turns with one decode step
of the given rows, as shares of which they are printed, too.
"""

import argparse

import torch
from bench_step import stepper
from interleave import machine, median, take_turns
from transformers.utils import logging

from hf_paged.cli.demo_model import load_model
from hf_paged.models.fingerprint import identify


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, action="append")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=60)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    print(machine())
    model = load_model("paged", torch.float32)
    identity = identify(model)
    looks = {"identify, per call": lambda turn: identify(model), "holds, per step": lambda turn: identity.holds()}
    for rows in arguments.rows or [1, 32]:
        step = stepper(model, rows, arguments.context, with_mask=False)
        times = take_turns({**looks, "step": step}, arguments.repeats)
        medians = {name: median(seconds) * 1e3 for name, seconds in times.items()}
        assert identity.holds(), "a step changes the model"
        for name in looks:
            share = medians[name] / medians["step"]
            print(f"{rows:3} rows: {name} {medians[name]:.2f} ms, {share:.1%} of a step of {medians['step']:.1f} ms")


if __name__ == "__main__":
    main()
