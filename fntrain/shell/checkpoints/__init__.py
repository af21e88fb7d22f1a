"""Checkpoints: directories of safetensors files that are there whole or not at all.

Read first: `save_load`.
"""
