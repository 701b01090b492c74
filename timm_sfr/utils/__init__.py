"""Knows nothing of SFR: errors, options, files, lines on the console, seeds, processes, and the client of the Hub.

Errors first: everything below raises them. Options are checked dataclasses; files are written whole or not at all.
"""
