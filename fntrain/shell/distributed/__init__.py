"""A step that several processes do together, by means of torch's DistributedDataParallel and fully_shard.

Read first: `distribute`.
"""
