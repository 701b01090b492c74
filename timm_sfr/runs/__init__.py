"""The folder of a run: training writes it, all other commands read it.

`folder` makes and locks it, `checkpoints` keeps resumable states, `records` the summary and the metrics, `predictions` what
the best model said of every validation image.
"""
