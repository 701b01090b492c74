"""Measurements of timm_sfr against its peers; `docs/results.md` says how to repeat them."""
