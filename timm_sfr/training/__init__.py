"""From a configuration to a finished run.

`run` builds the device (`devices`), the task (`tasks`), the optimizer and the schedule (`optimizer`), and trains. `trainer` is
the loop. It does this for each batch: mixup -> task (one pass, all losses) -> backward -> `guards` -> clip -> update ->
schedule -> moving average. After an epoch, `evaluate` scores it, `recorder` writes its files and `trackers` send its scores.
`run_state` is what a checkpoint keeps, `progress` shows the progress, and `forecast` warns before training starts.
"""
