"""The folder of a run: training writes it, all other commands read it.

`folder` makes and locks it. `checkpoints` stores resumable states, `records` the summary and the metrics, and `predictions`
the best model's predictions for all validation images.
"""
