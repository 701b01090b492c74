"""The folder of a run: training writes it, all other commands read it.

`folder` makes and locks it. `checkpoints` stores resumable states, `records` stores the summary and the metrics, and
`predictions` stores the best model's predictions for all validation images. `scores` names the scores.
"""
