"""What a run looks like: predictions, pictures of SFR, figures, and the page that holds them."""
