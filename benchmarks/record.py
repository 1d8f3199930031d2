"""Timing in turns, and records: what was measured, by which command, on what machine."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RECORDS = Path(__file__).parent / "records"
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "safetensors")
QUIET = 0.06
"""Share of the machine that others may take while a measurement counts as undisturbed."""

ALLOCATOR = ("GLIBC_TUNABLES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def spread(values: Iterable[float], digits: int = 6) -> dict[str, float]:
    """Least, median and greatest of the measurements, and how many there are."""
    kept = list(values)
    return {
        "min": round(min(kept), digits),
        "median": round(statistics.median(kept), digits),
        "max": round(max(kept), digits),
        "n": len(kept),
    }


def in_turns(
    functions: Mapping[str, Callable[[], Any]],
    *,
    repetitions: int,
    warm_up: int = 2,
    patience: float = 0.0,
    before: Callable[[], Any] = lambda: None,
    untimed: int = 0,
) -> dict[str, dict[str, list[float]]]:
    """Call each function once a round, so that a disturbed machine disturbs all of them alike.

    Every other round goes backwards: what runs before a function decides what it finds in caches.
    ``before`` runs untimed before each call, and then the function itself ``untimed`` times: for
    what is called again and again, and never after something that emptied the caches. Returns
    {name: {"wall": seconds, "cpu": seconds of all threads of the process, "others": share of the
    machine that other processes took}}. A
    round in which others took more than ``QUIET`` of the machine does not count towards
    ``repetitions`` for ``patience`` seconds, and is dropped if enough quiet ones came.
    """
    rounds: list[dict[str, tuple[float, float, float]]] = []
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    try:
        while True:
            found = {}
            order = list(functions.items())
            for name, function in order if len(rounds) % 2 else order[::-1]:
                before()
                for _ in range(untimed):
                    function()
                found[name] = _timed(function)
            rounds.append(found)
            measured = rounds[warm_up:]
            quiet = [r for r in measured if max(others for _, _, others in r.values()) <= QUIET]
            waited = time.perf_counter() - start >= patience
            if len(quiet) >= repetitions or (waited and len(measured) >= repetitions):
                break
    finally:
        gc.enable()
    kept = quiet if len(quiet) >= min(3, repetitions) else measured
    kinds = ("wall", "cpu", "others")
    return {n: {k: [r[n][i] for r in kept] for i, k in enumerate(kinds)} for n in functions}


def _timed(function: Callable[[], Any]) -> tuple[float, float, float]:
    busy, wall, cpu = _busy(), time.perf_counter(), time.process_time()
    function()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    others = (_busy() - busy - cpu) / (wall * (os.cpu_count() or 1))
    return wall, cpu, max(others, 0.0)


def _busy() -> float:
    """Seconds that all processors together have worked, for anyone, since the start."""
    for line in _lines("/proc/stat"):
        user, nice, system, _idle, _wait, irq, soft, steal = map(int, line.split()[1:9])
        ticks = user + nice + system + irq + soft + steal
        return ticks / os.sysconf("SC_CLK_TCK")
    return 0.0


def summary(times: Mapping[str, Mapping[str, list[float]]], base: str) -> dict[str, Any]:
    """Spreads, and ratios to ``base`` of median and least wall times and of least CPU times."""
    found = {}
    for name, kinds in times.items():
        found[name] = {kind: spread(values) for kind, values in kinds.items()}
        found[name]["ratio"] = {
            f"{pick} {kind}": round(found[name][kind][pick] / spread(times[base][kind], 9)[pick], 3)
            for pick, kind in (("median", "wall"), ("min", "wall"), ("min", "cpu"))
        }
    return found


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most memory that ``run`` holds above what was held at its start, by torch's profiler."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        run()
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _when, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def machine() -> dict[str, Any]:
    """Processor, memory, system, load and versions."""
    cpu = platform.processor() or platform.machine()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = next((line.split()[1] for line in _lines("/proc/meminfo")), "0")
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory) / 2**20, 1),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
        "threads": torch.get_num_threads(),
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def allocator() -> dict[str, str]:
    """What decides how fast fresh memory is: settings of malloc, a preloaded one, large pages."""
    found = {
        name: value
        for name, value in os.environ.items()
        if name in ALLOCATOR or name.startswith("MALLOC_")
    }
    preloaded = os.environ.get("LD_PRELOAD", "")
    found["preloaded"] = " ".join(Path(part).name for part in preloaded.split()) or "none"
    pages = next(_lines("/sys/kernel/mm/transparent_hugepage/enabled"), "")
    found["transparent_hugepage"] = pages.partition("[")[2].partition("]")[0] or "unknown"
    return found


def write(name: str, results: Mapping[str, Any], *, seeds: Iterable[int], note: str = "") -> Path:
    """Write ``records/<name>.json`` with the results and all that is needed to repeat them."""
    script = Path(sys.argv[0])
    record = {
        "name": name,
        "command": " ".join(["python", f"benchmarks/{script.name}", *sys.argv[1:]]),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "allocator": allocator(),
        "seeds": list(seeds),
        "note": note,
        "results": results,
    }
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _lines(path: str) -> Iterable[str]:
    try:
        return iter(Path(path).read_text().splitlines())
    except OSError:
        return iter(())
