"""Loads data: from files on the disk to batches of tensors.

`datasets` opens timm's datasets or the built-in digits, `samples` reads and decodes single images, and `cache` keeps decoded
images. `transforms` turns images into tensors, and `batch_transform` runs timm's augmentation on a whole batch. `loaders`
makes batches in an order that depends only on the seed.
"""
