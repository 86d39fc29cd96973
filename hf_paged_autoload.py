"""Zero-code activation: torch calls `install` when it is imported, where hf_paged is installed.

``attn_implementation="paged"`` then works without ``import hf_paged``. Every program that imports torch runs this
module, so it lies outside the package, imports next to nothing and lets no error of its own out. It waits for
transformers' modelling code, and then for a model that is to be "paged": only that imports hf_paged.
"""

import functools
import os
import sys
import types
import warnings

# As in hf_paged_kernels/switches.py, which cannot be imported without hf_paged.
_SWITCH, _OFF = "HF_PAGED_AUTOLOAD", ("0", "false", "no", "off", "f", "n")
_MODULE, _CLASS, _CHECK = "transformers.modeling_utils", "PreTrainedModel", "get_correct_attn_implementation"


def install() -> None:
    """Begin to wait. The entry point of the group ``torch.backends``: an error here would break ``import torch``."""
    try:
        if os.environ.get(_SWITCH, "").strip().lower() in _OFF:
            return
        module = sys.modules.get(_MODULE)
        if module is None:
            sys.meta_path.insert(0, _Finder())
        elif hasattr(module, _CLASS):
            _await_request(module)
        else:  # It is being imported, and has come as far as its own `import torch`.
            module.__class__ = _UnfinishedModule
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    try:
        warnings.warn(
            f'hf_paged: attn_implementation="paged" does not work without `import hf_paged` here, '
            f"{type(error).__name__}: {error}",
            stacklevel=2,
        )
    except Exception:  # Warnings are errors in this program; this one is not worth an import.
        pass


class _Finder:
    """Finds modules as the other finders do, to learn when transformers' modelling code has run."""

    def find_spec(self, name, path=None, target=None):
        if name != _MODULE:
            return None
        others = (getattr(finder, "find_spec", None) for finder in sys.meta_path if finder is not self)
        specs = (find(name, path, target) for find in others if find is not None)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader) -> None:
        """Let `loader` wait for a request when it has executed the module; it is itself again after that."""

        def exec_module(module):
            if module.__name__ != _MODULE:  # Some loaders serve several modules.
                return execute(module)
            loader.__dict__.pop("exec_module", None)
            execute(module)
            try:
                _await_request(module)
                sys.meta_path.remove(self)
            except Exception as error:
                _warn(error)

        try:
            execute = loader.exec_module
            loader.exec_module = exec_module
        except Exception as error:
            _warn(error)


class _UnfinishedModule(types.ModuleType):
    """A module that is still being imported. The first access to its model class finds it finished."""

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name == _CLASS:
            try:
                self.__class__ = types.ModuleType  # type: ignore[assignment]  # The stubs allow only derived classes.
                _await_request(self)
            except Exception as error:
                _warn(error)
        return found


def _await_request(module: types.ModuleType) -> None:
    """Let transformers' check of attention implementations import hf_paged when it meets "paged"."""
    owner = getattr(module, _CLASS)
    check = getattr(owner, _CHECK)

    @functools.wraps(check)
    def check_or_activate(self, requested_attention, *args, **kwargs):
        if requested_attention != "paged":
            return check(self, requested_attention, *args, **kwargs)
        before = getattr(owner, _CHECK)
        _activate()
        after = getattr(owner, _CHECK)  # That of hf_paged, which ends here again.
        return (check if after is before else after)(self, requested_attention, *args, **kwargs)

    setattr(owner, _CHECK, check_or_activate)


def _activate() -> None:
    try:
        import hf_paged  # noqa: F401  Importing it registers "paged".
    except Exception as error:
        raise ImportError(
            f'attn_implementation="paged" is that of hf_paged, which cannot be imported here: '
            f'{type(error).__name__}: {error}. `hf-paged doctor` says more; "sdpa" and "eager" work without it'
        ) from error
