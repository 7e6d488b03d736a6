"""Soak: a real federation under steady work; memory, disk and file handles must stay flat.

    python scripts/soak.py --hours 1 --devices 2 --out runs/soak

Runs `alignfed up` with the built-in corpus and no other end than the time, samples all of its
processes every few seconds, and compares the last half of the time with the first: the median of
memory, of bytes on disk and of open file handles. Memory is anonymous pages, where the system tells
them: pages of libraries would count for less the more other programs map them.
Exit code 0 says that none grew by more than the limit. The samples stay in OUT.jsonl, beside OUT.

The first tenth, at least two minutes, is left out: processes are still loading then. What must grow
with the work is left out of the disk and reported apart: the journal's rows and metrics.jsonl. What
is kept for replays and logs are reported apart too: they grow to `serving.replay_bytes` and to what
the `log` table of `deploy.toml` says, and must stop there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from alignfed.deploy.session import MARK

SAMPLE_EVERY_S = 5.0
MEASURES = ("memory_bytes", "disk_bytes", "handles")
KEPT = "checkpoints"
LIMITS = {"kept_bytes": int(1.25 * 256_000_000), "log_bytes": 12 * 4 * 10 * 1024**2}
"""What is kept for replays by default, and a quarter more for files that are written anew; of logs,
four files of 10 MiB for each of a dozen processes."""

GROWS = ("journal.sqlite", "journal.sqlite-wal", "metrics.jsonl")


def processes_of(root: int, mark: bytes | None) -> tuple[set[int], bytes | None]:
    """Return the ids of a command's processes, and the mark they carry once it is known."""
    found = {root}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        carried = next((one for one in environment if one.startswith(MARK.encode())), None)
        if mark is None and parent == root and carried is not None:
            mark = carried
        if mark is not None and carried == mark:
            found.add(int(entry.name))
    return found, mark


def memory_of(pid: int) -> int:
    """Return a process's proportional share of anonymous memory, or its resident memory."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def handles_of(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def disk_of(folder: Path) -> dict[str, int]:
    """Return bytes on disk: what should stay, replays, logs, and what grows with the work."""
    found = dict.fromkeys(("disk_bytes", "kept_bytes", "log_bytes", "journal_bytes"), 0)
    for path in folder.rglob("*"):
        try:
            size = path.stat().st_blocks * 512 if path.is_file() else 0
        except OSError:
            continue
        if path.parent == folder and path.name in GROWS:
            found["journal_bytes"] += size
        elif path.parent == folder / KEPT:
            found["kept_bytes"] += size
        elif path.parent.name == "logs":
            found["log_bytes"] += size
        else:
            found["disk_bytes"] += size
    return found


def status_of(folder: Path) -> dict:
    try:
        return json.loads((folder / "deployment" / "state" / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def watch(process: subprocess.Popen, folder: Path, until_s: float) -> list[dict]:
    samples, mark, began_s = [], None, time.monotonic()
    with folder.with_name(folder.name + ".jsonl").open("w") as file:
        while time.monotonic() - began_s < until_s and process.poll() is None:
            time.sleep(SAMPLE_EVERY_S)
            pids, mark = processes_of(process.pid, mark)
            status = status_of(folder)
            sample = {
                "time_s": time.monotonic() - began_s,
                "processes": len(pids),
                "memory_bytes": sum(map(memory_of, pids)),
                "handles": sum(map(handles_of, pids)),
                **disk_of(folder),
                "uploads": status.get("received", 0),
                "version": status.get("version", 0),
            }
            samples.append(sample)
            file.write(json.dumps(sample) + "\n")
            file.flush()
    return samples


def compare(samples: list[dict], limit: float) -> bool:
    last_s = samples[-1]["time_s"]
    steady = [one for one in samples if one["time_s"] >= max(120.0, last_s / 10)]
    if len(steady) < 8:
        print(f"{len(steady)} samples after the start are too few; run for longer")
        return False
    half = len(steady) // 2
    flat = True
    for name in MEASURES:
        first = statistics.median(one[name] for one in steady[:half])
        second = statistics.median(one[name] for one in steady[half:])
        change = second / first - 1.0
        flat = flat and change <= limit
        verdict = "flat" if change <= limit else "GROWS"
        print(f"{name:>13}: {first:14,.0f} -> {second:14,.0f}  {change:+.1%}  {verdict}")
    for name, most in LIMITS.items():
        seen = max(one[name] for one in samples)
        flat = flat and seen <= most
        print(f"{name:>13}: {seen:14,} at most, {'within' if seen <= most else 'BEYOND'} {most:,}")
    print(f"{samples[-1]['uploads']} uploads, {samples[-1]['version']} versions in {last_s:.0f} s")
    print(f"journal: {samples[-1]['journal_bytes']:,} bytes")
    return flat


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--limit", type=float, default=0.05, help="largest growth of a median")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "alignfed", "up", "--devices", str(arguments.devices)]
    changes = ("stop.uploads=1000000", "training.steps=2", "evaluation.every_versions=20")
    for change in changes:
        command += ["--set", change]
    process = subprocess.Popen([*command, "--out", str(arguments.out)], stdout=subprocess.DEVNULL)
    try:
        samples = watch(process, arguments.out, arguments.hours * 3600)
        ended = process.poll()
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
    if ended is not None:
        print(f"the federation ended by itself with exit code {ended}")
        return 1
    return 0 if compare(samples, arguments.limit) else 1


if __name__ == "__main__":
    sys.exit(main())
