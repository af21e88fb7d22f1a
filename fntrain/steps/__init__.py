"""What a step is made of: model, loss, optimizer, gradients and precision, joined in `supervised_step`.

May import: `fntrain.core`, `metrics` and `events`; no clocks, files, logs or processes.
Read first: `supervised` (the pure form of a step), then `body`, which every form of a step runs.
"""
