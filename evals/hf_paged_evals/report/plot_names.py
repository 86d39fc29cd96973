"""Names of the plots of a run, and their descriptions in words."""

import re


def name(section: dict, index: int, number: int) -> str:
    """The name of a plot's file. Sections are numbered, for a task may run twice."""
    return f"{index + 1}-{re.sub('[^a-z0-9]+', '-', section['task'].lower())}-{number + 1}"


def by_name(results: dict) -> dict[str, dict]:
    """Every plot of a run."""
    return {
        name(section, index, number): plot
        for index, section in enumerate(results["sections"])
        for number, plot in enumerate(section["plots"])
    }


def description(plot: dict) -> str:
    """The plot in words, for a reader who cannot see it."""
    return f"{plot['title']}: {plot['y_label']} against {plot['x_label']}"
