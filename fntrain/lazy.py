"""Exports that are imported when they are first asked for: `import fntrain` costs what training needs, no more."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def imported_on_first_use(
    package: dict[str, Any], exports: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package that imports some of its exports on first use.

    Args:
      package: the package's `globals()`; an export stays there once it was asked for.
      exports: name of a module, relative to the package -> the names that it exports, with spaces between them. The
        sub-packages that hold these modules are imported on first use too.
    Example:
      >>> names = {"__name__": "os", "__all__": ["join"]}
      >>> find, list_names = imported_on_first_use(names, {"path": "join split"})
      >>> find("join")("runs", "digits"), "join" in names, list_names()
      ('runs/digits', True, ['join'])

    Source: PEP 562
    """
    modules = {name: module for module, names in exports.items() for name in names.split()}
    subpackages = {module.partition(".")[0] for module in exports}

    def find(name: str) -> Any:
        if name in modules:
            package[name] = getattr(importlib.import_module(f"{package['__name__']}.{modules[name]}"), name)
        elif name in subpackages:
            package[name] = importlib.import_module(f"{package['__name__']}.{name}")
        else:
            raise AttributeError(f"module {package['__name__']!r} has no attribute {name!r}")
        return package[name]

    return find, lambda: package["__all__"]
