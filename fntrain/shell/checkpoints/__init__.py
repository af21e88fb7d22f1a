"""Checkpoints: directories of safetensors files that are visible whole or not at all.

Read first `save_load` (what users call; `resume` and `saver` beside it), then `commit`: the order of effects, on one of
two stores (`local`, `objects`; `store` says what both can do). Below are `reading`, `contents`, the records of the
`manifest`, and `tensor_file`. Calls only go down this list. May import the core and shell.distributed.
"""
