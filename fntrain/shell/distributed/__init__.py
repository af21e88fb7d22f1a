"""A step that several processes do together, by means of torch's DistributedDataParallel and fully_shard.

May import: `fntrain.core`, `steps`, `events`, and `shell.steps`.
Read first: `distribute`.
"""
