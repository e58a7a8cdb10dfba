#!/usr/bin/env bash
# torch on CPUs: the infinity norm takes many times as long as the 2-norm.
#
# Versions: torch 2.13.0.
# Why it matters: a maximum looks cheaper than a root of a sum of squares, and it cannot overflow,
# so it is what one takes to look for inf and nan in gradients, or for clipping
# (`clip_grad_norm_(.., norm_type=inf)`). On a CPU `linalg.vector_norm` and `_foreach_norm` have a
# vectorised way for orders 1 and 2 only; for infinity they go number by number. In a step of 25
# million weights on one core that is 70 ms, as much as the rest of the optimizer. `aminmax` is
# vectorised, hands nan on, and says the same: the larger of -least and most.
# Documented: no.
#
# Exits 0 while it is so (at least 4 times, by medians), 1 once it has changed, 2 if the packages do
# not install.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy || exit 2

cat >"$work/look.py" <<'PY'
import math
import statistics
import sys
import time

import torch

WAYS = {
    "vector_norm(2)": lambda x: torch.linalg.vector_norm(x),
    "vector_norm(inf)": lambda x: torch.linalg.vector_norm(x, math.inf),
    "aminmax": lambda x: torch.maximum(*(side.abs() for side in x.aminmax())),
}
torch.set_num_threads(1)
gradient = torch.randn(512, 2048)
times: dict[str, list[float]] = {name: [] for name in WAYS}
for _ in range(30):
    for name, way in WAYS.items():
        since = time.perf_counter()
        way(gradient)
        times[name].append(time.perf_counter() - since)
found = {name: statistics.median(seconds[5:]) for name, seconds in times.items()}
print(f"torch {torch.__version__}, one CPU thread, a gradient of 4 MiB in fp32")
print("guess: a maximum takes no longer than a sum of squares")
for name, seconds in found.items():
    print(f"seen:  {name} {seconds * 1e3:.2f} ms, {seconds / found['vector_norm(2)']:.1f} times")
same = WAYS["vector_norm(inf)"](gradient) == WAYS["aminmax"](gradient)
sys.exit(not (same and found["vector_norm(inf)"] > 4 * found["vector_norm(2)"]))
PY

if "$work/venv/bin/python" -W ignore "$work/look.py"; then
    echo "it is still so"
else
    echo "it has changed" && exit 1
fi
