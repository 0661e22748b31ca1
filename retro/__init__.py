"""Retrieval-enhanced language models: see README.md."""

import importlib
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_AUTO = "transformers.models.auto.configuration_auto"


class _WhenImported:
    """Registers our models with the Auto classes of transformers at the moment these are imported.

    Importing them here would make every command that needs no model wait for seconds. A finder on sys.meta_path is told of their
    import by Python itself, whoever does it, and costs nothing until then.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                importlib.import_module("retro.auto").register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _AUTO in sys.modules:
    importlib.import_module("retro.auto").register()
else:
    sys.meta_path.insert(0, _WhenImported())
