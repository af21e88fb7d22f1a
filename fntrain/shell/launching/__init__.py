"""Starting the processes of a job, on one machine or several, and ending all when one fails. Loaded on first use.

Read first: `launch`.
"""
