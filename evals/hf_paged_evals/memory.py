"""Peak memory of `generate` above the loaded model, dense and paged, each in a fresh process (Linux).

python evals/memory.py [--batch 8] [--context 2048] [--new-tokens 8]
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048, help="prompt and new tokens together")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--only", choices=["sdpa", "paged"], help="measure in this process and print MiB")
    arguments = parser.parse_args()
    if arguments.only:
        print(f"{measure(arguments):.0f}")
        return
    peaks = {}
    for implementation in ("sdpa", "paged"):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", implementation]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peaks[implementation] = int(done.stdout.split()[-1])
        print(f"{implementation:6} {peaks[implementation]} MiB above the loaded model", flush=True)
    print(f"paged / dense = {peaks['paged'] / peaks['sdpa']:.2f}")


def measure(arguments) -> float:
    """MiB between the resident memory before `generate` and its peak."""
    import torch

    from hf_paged.cli.demo_model import load_model

    model = load_model(arguments.only)
    torch.manual_seed(0)
    ids = torch.randint(100, 40000, (arguments.batch, arguments.context - arguments.new_tokens))
    model.generate(ids[:1, :8], max_new_tokens=2, attention_mask=torch.ones(1, 8, dtype=torch.long))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from what is resident now.
    before = _status("VmRSS")
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=arguments.new_tokens,
        min_new_tokens=arguments.new_tokens,
        do_sample=False,
    )
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """A field of /proc/self/status, in KiB."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    main()
