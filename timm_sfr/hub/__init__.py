"""Publishing: what goes into a repository on the Hub, and the push.

`card` writes the model card, `model_folder` the folder that plain timm loads; `push` checks everything before training and
uploads the folder after it.
"""
