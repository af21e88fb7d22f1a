"""A step on the module's own memory: in place, as CUDA graphs, as compiled programs.

Read first: `in_place`.
"""
