"""The first token of a process that has just started: dense, paged, and paged with a prefix that was saved before.

One process saves the prefix. Then every contender answers one request in a process of its own, in turns. The clock
runs from the loaded model to the first token, so it counts `load_prefix`, and all that a first call does but once.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

import hf_paged
from hf_paged_evals.data import workloads
from hf_paged_evals.models.pair import load_model, quiet
from hf_paged_evals.runner.arguments import add_model, model_options
from hf_paged_evals.runner.options import Options
from hf_paged_evals.runner.script import Script
from hf_paged_evals.runner.section import Figure, Section, Table

NAME = "saved_prefix"
QUICK = {"prefix": 48, "own": 8, "repeats": 1}
_DENSE, _WITHOUT, _WITH = "dense", "paged", "paged, prefix loaded"
_PROBE = f"from hf_paged_evals.microbench import {NAME}; {NAME}.probe()"


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this microbenchmark."""
    add_model(parser, "bfloat16")
    parser.add_argument("--prefix", type=int, default=1536, help="tokens that are saved (default: %(default)s)")
    parser.add_argument("--own", type=int, default=50, help="tokens that follow them (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="processes of each contender (default: %(default)s)")


def measure(given: argparse.Namespace) -> Section:
    """Median times to the first token, over fresh processes."""
    options = model_options(given, NAME)
    (ids,) = workloads.shared_prefix(options, 1, given.prefix, given.own)
    about = {"model": options.model, "dtype": options.dtype, "seed": options.seed, "ids": ids}
    seen: dict[str, list[dict]] = {_DENSE: [], _WITHOUT: [], _WITH: []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prefix.safetensors"
        saved = _in_a_process({**about, "backend": "paged", "path": str(path), "save": given.prefix})
        size = path.stat().st_size
        for _ in range(given.repeats):
            for name, records in seen.items():
                backend, loads = ("sdpa" if name == _DENSE else "paged"), (str(path) if name == _WITH else None)
                records.append(_in_a_process({**about, "backend": backend, "path": loads, "save": None}))
    totals = {name: median(record["load"] + record["first"] for record in records) for name, records in seen.items()}
    loads = median(record["load"] for record in seen[_WITH])
    hits, equal = seen[_WITH][0]["hits"], sum(record["token"] == seen[_DENSE][0]["token"] for record in seen[_WITH])
    return Section(
        NAME,
        "A saved prefix in a fresh process",
        f"The first token comes after {totals[_WITH]:.2f} s, and without the file after {totals[_WITHOUT]:.2f} s.",
        [
            *(Figure(f"first token: {name}", value, "s", better="lower") for name, value in totals.items()),
            Figure("of it: load_prefix", loads, "s", better="lower"),
            Figure("save_prefix, with the prompt", saved["first"], "s", better="lower"),
            Figure("size of the file", size / 2**20, "MiB", better="lower"),
            Figure("prompt tokens found", hits, f"of {len(ids)}", better="higher"),
            Figure("first tokens equal to dense: prefix loaded", equal, f"of {given.repeats}"),
        ],
        [
            Table(
                "Processes",
                ["Contender", "Turn", "load_prefix (s)", "First token (s)"],
                [
                    [name, turn, record["load"], record["first"]]
                    for name, records in seen.items()
                    for turn, record in enumerate(records, 1)
                ],
            )
        ],
        notes=[
            f"A prompt of {len(ids)} random tokens, {saved['tokens']} of which are in the file. Medians of "
            f"{given.repeats} processes each, in turns; imports and the loading of the model are not counted."
        ],
        flags=[] if hits == saved["tokens"] else ["the prefix was not found as it was saved"],
    )


def _in_a_process(request: dict) -> dict:
    """Hand a request to `probe` in a new process, and return its answer.

    Raises
    ------
    RuntimeError
        If the process fails.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], input=json.dumps(request), capture_output=True, text=True, env=dict(os.environ)
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"a process of {NAME} ended with {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def probe() -> None:
    """Answer the request on stdin: save a prefix, or generate one token. Prints seconds and counts as JSON."""
    quiet()
    request = json.load(sys.stdin)
    options = Options("", (NAME,), request["model"], request["dtype"], seed=request["seed"])
    model, ids = load_model(options, request["backend"]), torch.tensor([request["ids"]])
    began = time.perf_counter()
    if request["save"] is not None:
        tokens = hf_paged.save_prefix(model, request["path"], ids[:, : request["save"]])
        print(json.dumps({"tokens": tokens, "first": time.perf_counter() - began}))
        return
    if request["path"] is not None:
        hf_paged.load_prefix(model, request["path"])
    loaded = time.perf_counter()
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    ended = time.perf_counter()
    hits = hf_paged.stats(model).prefix_hit_tokens
    print(json.dumps({"load": loaded - began, "first": ended - loaded, "hits": hits, "token": int(output[0, -1])}))


main = Script(f"microbench {NAME}", __doc__, add_settings, measure, QUICK).main

if __name__ == "__main__":
    sys.exit(main())
