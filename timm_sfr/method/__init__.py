"""The method. It works on its own and imports only `timm_sfr.utils`.

`probe` measures a model's features, `taps` chooses the shallow ones and the deep one, and `tapped_model` takes them from one
forward pass. `channels` matches channels, `sinkhorn` and `transport` match locations, and `losses` turns both into the feature
loss. `smoothing` smooths the target. `task` joins everything in a `timm.task.TrainingTask`, with the options in `config`.
"""
