"""From what is on the disk to batches of tensors.

`datasets` opens timm's datasets or the built-in digits, `samples` reads and decodes one image, `cache` keeps decoded ones;
`transforms` says how images become tensors, `batch_transform` does timm's augmentation on a whole batch; `loaders` makes
batches in an order that depends on the seed alone.
"""
