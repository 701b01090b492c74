"""Helpers that do not depend on SFR: errors, options, files, console output, seeds, processes and the client of the Hub.

The other modules raise the exceptions of `errors`. Options are checked dataclasses. Files are written atomically.
"""
