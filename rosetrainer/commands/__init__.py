"""The commands: flags in, lines out, nothing else; `python -m rosetrainer NAME` runs NAME.py.

train, parity, plan, generate, checkpoint, convert, prepare, tour; they share flags (flag_fields:
which there are; flag_help) and presets.
"""
