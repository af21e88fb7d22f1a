"""A step on the module's own memory: in place, as CUDA graphs, as compiled programs.

May import: `fntrain.core`, `steps`, `events`, and `shell.disk`; no other room of the shell.
Read first: `in_place`, then `memory`.
"""
