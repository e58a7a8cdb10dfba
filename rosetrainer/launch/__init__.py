"""Ranks as processes: started, watched, and ended with one error for all of them.

launcher starts them and ending ends them; rank is a rank's own life, stop its signals;
process_group and interfaces connect ranks; watch and failures name the one that hangs or fails.
"""
