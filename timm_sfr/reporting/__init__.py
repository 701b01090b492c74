"""Reports: one HTML page on a run, or on several.

`curves` selects the columns to plot, `gallery` loads images, `tap_matches` computes which deep features teach which shallow
ones, `figures` draws, and `page` puts the page together.
"""
