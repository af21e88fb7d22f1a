"""Starts the processes of a job, on one machine or several, and ends all when one fails. Loaded on first use.

`signals` is the exception: `fntrain.hooks` imports it, so it imports nothing else of this package.
May import: `fntrain.core`; no other room of the shell.
Read first: `launch`, then `local`.
"""
