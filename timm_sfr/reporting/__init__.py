"""What a run looks like, on one page.

`curves` reads the runs' figures, `gallery` shows images, `lessons` shows which features taught which, `figures` draws, and
`page` puts all of it together.
"""
