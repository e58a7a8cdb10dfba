"""Layers divided among ranks, which pass activations on and gradients back.

Read schedule (what each rank does, in which order, as data), then simulation, which checks one.
"""
