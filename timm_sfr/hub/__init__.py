"""Publishing on the Hugging Face Hub.

`card` writes the model card, `model_folder` the folder that plain timm loads. `push` checks token, repository and card before
training and uploads the files after it.
"""
