"""Optimizers: adamw, muon, clip (the true global norm), optimizer (decay groups, schedule),
precision (bf16 products), non_finite (what a nan costs)."""
