"""Publishing on the Hugging Face Hub.

`card` writes the model card, `model_folder` writes the folder that plain timm loads, and `space` writes a demo beside it.
`preflight` checks everything before training and before a push, and `push` uploads the files.
"""
