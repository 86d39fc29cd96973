"""An extension of Griffe: finds the modules of hf_paged that do not lie in its folder.

``hf_paged.integrations`` is a folder beside ``hf_paged``, so a look into the files of the package misses it. Python's
import system knows where it is.
"""

import importlib.util
from pathlib import Path

import griffe


class NestedPackages(griffe.Extension):
    """Adds the modules that the names of a package come from, where Griffe has not found them."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs) -> None:
        """Called by Griffe when all files of a package are read."""
        sources = [member.target_path for member in pkg.members.values() if member.is_alias]
        for name in sorted({source.rpartition(".")[0] for source in sources}):
            if name.startswith(f"{pkg.path}."):
                self._add(pkg, name.split(".")[1:], loader)

    @staticmethod
    def _add(module: griffe.Module, names: list[str], loader: griffe.GriffeLoader) -> None:
        """Add ``names[0].names[1]...`` below a module, as far as it is missing."""
        for name in names:
            if name not in module.members:
                spec = importlib.util.find_spec(f"{module.path}.{name}")
                if spec is None:
                    return  # A name of a class or a function: not a module.
                path = Path(spec.origin) if spec.origin else None
                module[name] = griffe.visit(
                    name,
                    filepath=path or Path(next(iter(spec.submodule_search_locations))),
                    code=path.read_text(encoding="utf-8") if path else "",
                    extensions=loader.extensions,
                    parent=module,
                    docstring_parser=loader.docstring_parser,
                    docstring_options=loader.docstring_options,
                    lines_collection=loader.lines_collection,
                    modules_collection=loader.modules_collection,
                )
            module = module[name]
