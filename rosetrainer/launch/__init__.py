"""Ranks as processes: started, watched, and ended with one error for all of them.

launcher starts and ends them; rank is a rank's own life and its signals, errors what is told of its
end; process_group, machines and interfaces connect ranks; watch names the one that hangs.
"""
