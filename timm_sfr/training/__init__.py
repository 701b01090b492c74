"""From a configuration to a finished run.

`run` puts it together: the device (`devices`), the task (`tasks`), optimizer and schedule (`optimizer`), and trains. `trainer` is
the loop; one batch, top to bottom: batch -> mixup -> task (one pass, all losses) -> backward -> `guards` -> clip -> update
-> schedule -> moving average. After an epoch `evaluate` scores it, `recorder` writes it, `trackers` send it; `run_state` is
what a checkpoint keeps; `progress` shows how far it is; `forecast` warns before it begins.
"""
