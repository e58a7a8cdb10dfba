"""Optimizers: adamw, muon, clip (the true global norm), optimizer (decay groups, schedule)."""
