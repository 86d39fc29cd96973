"""The command ``hf-paged``. It lies outside the package to say in words why ``import hf_paged`` fails."""

import sys
from importlib.metadata import PackageNotFoundError, requires, version


def main() -> int:
    """Run `hf_paged.cli.main.main`; where the package cannot be imported, say what to install."""
    try:
        from hf_paged.cli.main import main as run
    except Exception as error:
        print(f'hf-paged: attn_implementation="paged" cannot work here: {_sentence(error)}', file=sys.stderr)
        for line in _unmet_requirements():
            print(f"hf-paged: {line}", file=sys.stderr)
        return 1
    return run()


def _sentence(error: Exception) -> str:
    return str(error) if type(error).__name__ == "PagedError" else f"{type(error).__name__}: {error}"


def _unmet_requirements() -> list[str]:
    from packaging.requirements import Requirement

    lines = []
    for requirement in map(Requirement, requires("hf-paged") or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = None
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            lines.append(f"{requirement.name} is {found or 'not installed'}: pip install '{wanted}'")
    return lines


if __name__ == "__main__":
    sys.exit(main())
