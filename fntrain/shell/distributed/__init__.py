"""A step that several processes do together, on torch's DistributedDataParallel and fully_shard.

Read first: `distribute`.
"""
