"""The method. It works on its own: of this package, it imports only `timm_sfr.utils`.

`probe` measures a model's features, `taps` chooses the shallow ones and the deep one, and `tapped_model` takes them from one
forward pass. `channels` matches channels, `sinkhorn` (on GPUs also `sinkhorn_triton`) and `transport` match locations, and
`feature_loss` turns both into the loss of SFR. `smoothing` smooths the target, and `classification` is the loss on it. `task`
joins everything in a `timm.task.TrainingTask`, with the options in `config`.
"""
