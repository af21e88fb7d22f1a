"""Whole training jobs: a recipe as a value, its configuration, its command line, and the predictor made of it.

May import: everything. Nothing else imports it: it is loaded on first use.
Read first: `recipe` (build and run), then `defaults` (the parts that a recipe has unless it is given others).
"""

from fntrain.jobs import recipe

__all__ = ["recipe"]
