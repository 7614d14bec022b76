"""Time to make distinct feasible offspring, per generation: `python benchmarks/mutation.py`.

The aims are 1 ms for 128 offspring of 224 units with 5 levels, and 20 ms for 128 of 20,000 units.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import record

from discopt import SearchSpace
from discopt.mutation import RULES, offspring

SIZES = ((32, 16), (224, 16), (224, 128), (2_000, 128), (20_000, 16), (20_000, 128))  # (units, offspring)
LEVELS = 5
AIMS = {(224, 128): 1.0, (20_000, 128): 20.0}  # ms


def measure(n: int, count: int, rule: str, repeats: int, seed: int) -> list[float]:
    """Milliseconds of each repeat, after three to warm up."""
    rng = np.random.default_rng(seed)
    sizes = np.ones(n, dtype=np.int64) if rule == "within" else rng.integers(1, 9, size=n)
    space = SearchSpace.build(np.outer(sizes, np.arange(LEVELS)), int(2 * sizes.sum()))
    parent = np.full((1, n), 2, dtype=np.int16)
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        rows = offspring(parent, count, space, rng, rule=rule)
        times.append(1e3 * (time.perf_counter() - start))
        assert len(rows) == count
    return times[3:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=record.HERE / "results" / "mutation.json")
    arguments = parser.parse_args()
    rows = []
    print(f"{'rule':8} {'units':>7} {'offspring':>9} {'median ms':>10} {'min ms':>8} {'aim ms':>7}")
    for rule in RULES:
        for n, count in SIZES:
            times = measure(n, count, rule, arguments.repeats, arguments.seed)
            aim = AIMS.get((n, count))
            row = {
                "rule": rule,
                "units": n,
                "offspring": count,
                "median_ms": float(np.median(times)),
                "min_ms": min(times),
            }
            rows.append({**row, "aim_ms": aim})
            print(f"{rule:8} {n:7,} {count:9} {row['median_ms']:10.3f} {row['min_ms']:8.3f} {aim or '':>7}")
    record.write(arguments.out, {"levels": LEVELS, "rows": rows}, seed=arguments.seed)


if __name__ == "__main__":
    main()
