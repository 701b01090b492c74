"""The method, usable alone; it imports only `timm_sfr.utils`.

`probe` measures a model's features, `taps` chooses a deep one and some shallow ones, `tapped_model` takes them in the one
forward pass; `channels` matches their channels, `sinkhorn` and `transport` their locations, `losses` makes the feature loss
of both, `smoothing` the target; `task` is all of it as a `timm.task.TrainingTask`, with the options in `config`.
"""
