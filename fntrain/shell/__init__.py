"""The shell: the only place with effects. Steps on a device, checkpoints in files."""

from fntrain.shell.in_place import in_place

__all__ = ["in_place"]
