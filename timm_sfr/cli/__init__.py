"""The command ``timm-sfr``.

`main` finds the verb, `parser` reads its options, and the verb VERB runs in ``VERB.py`` (``list`` in ``list_zoo.py``).
"""
