"""The command ``timm-sfr``: the verb VERB is in ``VERB.py`` (``list`` in ``list_zoo.py``), found by `main`, parsed by `parser`."""
