"""The command ``timm-sfr``.

It starts in ``train_sfr.py`` beside this package, which imports torch only when the options have been read. `main` finds the
verb, `verbs` has each verb's arguments, `parser` parses the command line, and `timm_options` translates timm's options. The
options of training are in `timm_sfr.config` and `timm_sfr.method.config`. The module of the verb's name carries it out.
"""
