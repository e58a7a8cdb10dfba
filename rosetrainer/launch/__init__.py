"""Ranks as processes: started, watched, and ended with one error for all of them.

launcher starts and ends them; rank is a rank's own life and errors, stop its signals;
process_group, machines and interfaces connect ranks; watch names the one that hangs.
"""
