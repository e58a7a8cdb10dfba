"""Optimizers: adamw, muon, clip (the true global norm), optimizer (decay groups, schedule), frozen
(what is not trained), precision (bf16 products), casts (of each weight, once a step), non_finite
(what a nan costs)."""
