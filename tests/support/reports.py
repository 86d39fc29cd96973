"""A small run's results, with every kind of plot: what the tests of the report read."""


def figure(name, value, unit="tokens/s", low=None, high=None, better="higher"):
    return {"name": name, "value": value, "unit": unit, "low": low, "high": high, "better": better}


def section(task, **parts):
    empty = {"figures": [], "tables": [], "plots": [], "notes": [], "flags": []}
    return {"task": task, "title": f"About {task}", "summary": f"What {task} says.", "seconds": 75.4, **empty, **parts}


def plot(title, kind, series, **ticks):
    axes = {"x_label": "batch (rows)", "y_label": "rate (tokens/s)", "x_ticks": [], "y_ticks": []}
    return {"title": title, "kind": kind, "series": series, **axes, **ticks}


def results():
    """A new dict at every call: tests change it."""
    line = {"dense": [[1, 15.5], [8, 24.25], [32, 27.125]], "paged": [[1, 16.0], [8, 61.5], [32, 139.75]]}
    bars = {"dense": [[0, 3.5], [1, 6.0]], "paged": [[0, 2.5], [1, 1.5]]}
    heat = {"found (%)": [[100.0, 50.0, 0.0], [100.0, 100.0, 25.0]]}
    return {
        "schema": 1,
        "created": "2026-11-23T18:00:00",
        "machine": {"processor": "A <fast> one", "threads": 2},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "command": "hf-paged eval --quick --out OUT",
        "options": {
            "model": "smollm2",
            "dtype": "float32",
            "seed": 7,
            "limit": None,
            "tasks": ["throughput", "needle"],
        },
        "sections": [
            section(
                "throughput",
                figures=[figure("paged", 139.75), figure("ratio", 5.152, "x", 4.75, 5.5), figure("peak", 613.0, "MiB")],
                tables=[
                    {
                        "title": "Each | contender",
                        "columns": ["contender", "rows", "tokens/s"],
                        "rows": [["dense & <plain>", 32, 27.125], ["paged", 32, 139.75]],
                        "note": "Medians of three turns.",
                    }
                ],
                plots=[plot("Throughput", "line", line), plot("Memory", "bar", bars, x_ticks=["short", "long"])],
                notes=["One turn was slow."],
            ),
            section(
                "needle",
                plots=[plot("Needle", "heatmap", heat, x_ticks=["1k", "2k", "4k"], y_ticks=["0 %", "100 %"])],
                flags=["two rows differ"],
            ),
        ],
    }
