"""From a configuration to a finished run.

`run` sets up the device (`devices`), the batch size (`batch_size`), the task (`tasks`), the optimizer and the schedule
(`optimizer`), and trains. `trainer` is the loop. For each batch, it does this: erasing and mixup (`step`) -> task (one pass, all
losses) -> backward -> check of the loss (`guards`) -> clip -> check of the gradients (`guards`) -> update -> schedule -> moving
average. After an epoch, `evaluate` scores it, `recorder` writes its files and `trackers` send its scores; after the last one,
`final_test` scores the test split. `run_state` collects and restores what a checkpoint keeps, `progress` shows the progress,
`forecast` warns before training starts, and `lr_find` is the range test of learning rates.
"""
