"""Exports that are imported when they are first asked for: `import fntrain` costs what training needs, no more."""

import importlib
from collections.abc import Callable
from typing import Any


def exported_later(package: dict[str, Any], homes: dict[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package whose exports come from the modules named on first use.

    Args:
      package: the package's `globals()`; what was asked for once is kept there.
      homes: name of an export -> name of the module that defines it; of a sub-package, its own name.
    Example:
      >>> names = {"__name__": "here"}
      >>> exported_later(names, {"sqrt": "math"})("sqrt")(4.0), "sqrt" in names
      (2.0, True)

    Source: PEP 562
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package['__name__']!r} has no attribute {name!r}")
        module = importlib.import_module(homes[name])
        package[name] = module if homes[name] == f"{package['__name__']}.{name}" else getattr(module, name)
        return package[name]

    return find
