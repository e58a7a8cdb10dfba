"""Where a step's time goes: a few steps under torch.profiler, as a trace and a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from rosetrainer.validation import ConfigError

WARM_UP = 5
"""Steps before those that are recorded: first ones allocate, compile and choose kernels."""

ROWS = 15


def check_profile(recorded: int, steps: int) -> None:
    """Raises ConfigError if a run of `steps` ends before `recorded` are."""
    if recorded and steps < WARM_UP + recorded:
        possible = (
            f"profile can be at most {steps - WARM_UP}, or steps at least {WARM_UP + recorded}"
            if steps > WARM_UP
            else f"steps must be at least {WARM_UP + recorded}"
        )
        raise ConfigError(
            f"profile={recorded} begins after {WARM_UP} steps and steps={steps}; {possible}"
        )


class StepProfile:
    """Records steps on this rank, beginning with the sixth."""

    name = "profile"

    def __init__(self, recorded: int, folder: Path, rank: int, device: torch.device) -> None:
        """recorded: how many steps. folder: where each rank writes its trace."""
        self.path = folder / f"trace_rank_{rank:05}.json"
        self.recorded, self.device, self.text = recorded, device, ""
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # In the step before, the profiler runs and throws away: its own start costs time.
        plan = schedule(skip_first=WARM_UP - 1, wait=0, warmup=1, active=recorded, repeat=1)
        self._profile: Any = profile(
            activities=activities, schedule=plan, on_trace_ready=self._take, acc_events=True
        )
        self._profile.start()

    def after_step(self) -> str:
        """Once, where the trace is and what took longest; "" after other steps."""
        if self._profile is not None:
            self._profile.step()
            if self.text:
                self.close()
        text, self.text = self.text, ""
        return text

    def close(self) -> bool:
        """Ends recording; whether it was not complete, in which case nothing is written."""
        if self._profile is None:
            return False
        ended, self._profile = self._profile, None
        ended.on_trace_ready = None  # half of what was asked for would mislead
        ended.stop()
        return True

    def _take(self, profiled: Any) -> None:
        profiled.export_chrome_trace(str(self.path))
        rows = table(profiled.key_averages(), self.device, self.recorded)
        self.text = (
            f"profile of {self.recorded} steps: {self.path}, one for each rank; open it at "
            f"https://ui.perfetto.dev or in chrome://tracing\n{rows}"
        )


def table(events: Any, device: torch.device, steps: int) -> str:
    """The ROWS operations with most time of their own on the device, at most 100 columns wide.

    events: what torch.profiler's key_averages() gives; times are in milliseconds a step.
    """
    on_gpu = device.type == "cuda"

    def own(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    # A step's own marker spans everything in it; what is left of it is no operation.
    found = [event for event in events if not event.key.startswith("ProfilerStep")]
    if on_gpu:  # kernels alone: what launched them, and marks around them, tell their time again
        found = [e for e in found if e.device_type.name != "CPU" and not e.is_user_annotation]
    whole = sum(map(own, found)) or 1.0
    title = f"own time on the {device.type.upper()}"
    lines = [f"{title:62} {'ms a step':>10} {'share':>7} {'calls':>9}"]
    for event in sorted(found, key=own, reverse=True)[:ROWS]:
        name = event.key if len(event.key) <= 62 else event.key[:59] + "..."
        lines.append(
            f"{name:62} {own(event) / 1e3 / steps:10.3f} {own(event) / whole:7.1%} "
            f"{event.count / steps:9.1f}"
        )
    return "\n".join(lines)
