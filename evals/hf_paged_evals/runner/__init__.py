"""The runner of tasks: options, samples that survive an interruption, statistics, and results in one schema."""
