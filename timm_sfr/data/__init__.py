"""Loads data: from files on the disk to batches of tensors.

`folders` finds the images in folders of classes, and `tables` those in CSV and Parquet files. `datasets` opens them, timm's other
datasets, or the built-in digits, and `summary` says what lies in them. `images` turns any image into the mode that a model takes,
`samples` reads and decodes single images, and `cache` keeps decoded ones. `transforms` turns images into tensors;
`batch_transform` does that faster for a whole batch of cached images. `loaders` makes batches, in an `order` that depends only on
the seed and the epoch; `sizes` chooses sizes that change from batch to batch. `class_weights` weighs the classes.
"""
