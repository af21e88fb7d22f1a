"""What a step is made of: model, loss, optimizer, gradients and precision, joined in `supervised_step`.

May import: `fntrain.core` and `fntrain.events`; no clocks, files, logs or processes.
Read first: `supervised` (the settings of a step and its pure form).
"""
