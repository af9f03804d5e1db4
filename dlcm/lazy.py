"""Public names that are imported on first use.

`dlcm --help` must answer at once, so importing a package may not import torch, pandas or submitit. The house also names
a function after its module (`flops.count`, `sweeps.plan`, `analysis.fit`); the import system would rebind the name to the
module as soon as the module is loaded, so the package object here keeps the function.
"""

import importlib
import sys
import types
from collections.abc import Mapping


class _LazyPackage(types.ModuleType):
    _exports: Mapping[str, str]

    def __getattr__(self, name: str) -> object:
        if name not in self._exports:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module = importlib.import_module(self._exports[name])
        value = (
            module
            if self._exports[name] == f"{self.__name__}.{name}" and not hasattr(module, name)
            else getattr(module, name)
        )
        types.ModuleType.__setattr__(self, name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # The import system calls this with the submodule after loading it: the public function of that name wins.
        if isinstance(value, types.ModuleType) and self._exports.get(name) == value.__name__ and hasattr(value, name):
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._exports})


def lazy_exports(package: str, exports: Mapping[str, str]) -> None:
    """Make the names of `exports` attributes of `package`, imported on first use.

    Args:
        package: the package's `__name__`.
        exports: public name -> the module that defines it. A name that its module does not define is the module itself.
    """
    module = sys.modules[package]
    module.__class__ = _LazyPackage
    types.ModuleType.__setattr__(module, "_exports", exports)
    types.ModuleType.__setattr__(module, "__all__", sorted(exports))
