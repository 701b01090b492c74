"""The command ``timm-sfr``.

`main` finds the verb, `arguments` has what each verb takes, and `parser` reads it, all without importing torch or timm. Then the
module of the verb's name carries it out.
"""
