"""Loads data: from files on the disk to batches of tensors.

`folders` finds the images in folders of classes. `datasets` opens them, timm's other datasets, or the built-in digits, and
`summary` says what lies in them. `images` turns any image into the mode that a model takes, `samples` reads and decodes single
images, and `cache` keeps decoded ones. `transforms` turns images into tensors, and `batch_transform` runs timm's augmentation
on a whole batch. `loaders` makes batches in an order that depends only on the seed.
"""
