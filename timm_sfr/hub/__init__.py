"""Publishing on the Hugging Face Hub.

`card` writes the model card, `model_folder` the folder that plain timm loads, `space` a demo beside it. `preflight` has what is
checked before training and before a push, and `push` uploads the files.
"""
