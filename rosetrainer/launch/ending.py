"""How the launcher ends its ranks: after a failure soon, after a signal when they have saved."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from rosetrainer.launch.rank import STOP_MESSAGE, STOP_SECONDS_FILE, stop_line

LOOK_SECONDS = 0.05
"""Time between two looks at the ranks."""

GRACE_SECONDS = 3
"""Time that a rank has to end by itself after another one has failed."""

STOP_SECONDS = 9
"""Time that the ranks have, at least, to save and leave after a signal."""

MARGIN = 1.5
"""Times what the ranks were measured to need, for they may be slower now."""

SECOND_SIGNAL_SECONDS = 1
"""A terminal and a parent process may both send a signal; so soon again it is no impatience."""

SUSPENDED_SECONDS = 5
"""How long a rank may be suspended (SIGSTOP) after a signal; it takes no notice of that signal."""

Ranks = list[subprocess.Popen[bytes]]


def end(ranks: Ranks, received: list[tuple[int, float]]) -> None:
    """Ends the ranks that another one's failure has left; at once if a signal comes meanwhile."""
    for rank in ranks:
        rank.terminate()
    end = time.monotonic() + GRACE_SECONDS
    while None in [rank.poll() for rank in ranks] and time.monotonic() < end and not received:
        time.sleep(LOOK_SECONDS)
    kill(ranks)


def stop(ranks: Ranks, received: list[tuple[int, float]], folder: str, grace: float) -> int:
    """Passes the signal on, lets the ranks save and leave, and kills those that do not.

    They have as long as rank 0 has measured that they need, and up to `grace` seconds. Says it in
    one line, with rank 0's last words if it had any.
    """
    signum, since = received[0]
    interrupted = signum == signal.SIGINT
    said = "interrupted" if interrupted else f"stopped by {signal.Signals(signum).name}"
    for rank in ranks:
        rank.send_signal(signal.SIGINT if interrupted else signal.SIGTERM)
    end, needed = since + min(STOP_SECONDS, grace), 0.0
    killed: list[int] = []
    stopped: dict[int, float] = {}  # rank -> since when
    while running := [number for number, rank in enumerate(ranks) if rank.poll() is None]:
        now = time.monotonic()
        if received[-1][1] > since + SECOND_SIGNAL_SECONDS:
            kill(ranks)
            say(f"{said}; all ranks were killed")
            return 128 + signum
        if not needed and (needed := stop_seconds(folder)):
            end = since + min(max(STOP_SECONDS, MARGIN * needed), grace)
            if needed >= STOP_SECONDS:
                say(stop_line(needed) + f"; --grace gives {grace:g} s" * (needed > grace))
        stopped = {n: stopped.get(n, now) for n in running if is_suspended(ranks[n].pid)}
        frozen = [n for n in stopped if now >= stopped[n] + SUSPENDED_SECONDS]
        for number in running if now >= end else frozen:
            ranks[number].kill()
            killed = sorted({*killed, number})
            end = min(end, now + GRACE_SECONDS)  # without it its peers wait in vain
        time.sleep(LOOK_SECONDS)
    names = f"rank{'s' * (len(killed) > 1)} {', '.join(map(str, killed))}"
    fate = f", {names} {'were' if len(killed) > 1 else 'was'} killed" if killed else ""
    if killed and needed > grace:
        fate += f" after {grace:g} s; --grace gives them longer"
    words = Path(folder) / STOP_MESSAGE
    told = words.read_text() if words.exists() else "all ranks have ended"
    say(f"{said}; {told}{fate}")
    saved = signum == signal.SIGTERM and not any(rank.returncode for rank in ranks)
    return 0 if saved else 128 + signum


def stop_seconds(folder: str) -> float:
    """What rank 0 has measured that it takes to stop; 0 if it has not said so."""
    path = Path(folder) / STOP_SECONDS_FILE
    return float(path.read_text()) if path.exists() else 0.0


def is_suspended(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    if stat.exists():
        state = stat.read_text().rpartition(")")[2]
    else:
        ps = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True)
        state = ps.stdout
    return state.strip().startswith(("T", "t"))


def kill(ranks: Ranks) -> None:
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.wait()


def say(text: str) -> None:
    """Prints to standard error; on a terminal below the progress bar that may stand there."""
    print("\n" * sys.stderr.isatty() + text, file=sys.stderr)
