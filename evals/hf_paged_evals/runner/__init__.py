"""The runner of tasks, its options, its results."""
