"""The command ``timm-sfr``.

`main` finds the verb and `parser` reads its options. Each verb is in the module of its name (``list`` in ``list_zoo.py``).
"""
