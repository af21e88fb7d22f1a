"""How much longer does `import fntrain` take than `import torch` alone, and does it import what is used later only?

    python benchmarks/import_time.py [--rounds 15] [--json FILE]

Each import runs in a fresh interpreter, which times it itself, so starting Python does not count. The two take turns;
the ratio is formed within each round. Bytecode of both is cached in a temporary folder, as after an installation.
A pass of the garbage collector over all that torch has made takes some 50 ms and falls due soon after `import torch`,
whatever comes next; so the times are given with the collector as it is and with it switched off.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory

LATER = ("tensorboard", "torch.utils.tensorboard", "torch.distributed.checkpoint", "tqdm", "sklearn")
TIMED = "import gc, time; {}; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
COLLECTOR = {"on": "gc.enable()", "off": "gc.disable()"}
LOADED = "import sys, {}; print(*(name for name in {} if name in sys.modules))"


def python(code: str, **env: str) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | env
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=variables)
    return result.stdout.strip()


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names) or '?'} cores"


def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by collector, import and round, after a first round that writes bytecode and fills the disk cache."""
    times: dict[str, dict[str, list[float]]] = {gc: {"torch": [], "fntrain": []} for gc in COLLECTOR}
    with TemporaryDirectory() as cache:
        for index in range(rounds + 1):
            for gc, setting in COLLECTOR.items():
                for name in ("torch", "fntrain") if index % 2 else ("fntrain", "torch"):
                    seconds = float(python(TIMED.format(setting, name), PYTHONPYCACHEPREFIX=cache))
                    if index > 0:
                        times[gc][name].append(seconds)
    return times


def row(gc: str, torch_s: list[float], fntrain_s: list[float]) -> str:
    ratios = [ours / its for its, ours in zip(torch_s, fntrain_s, strict=True)]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    cells = [gc, f"{1e3 * median(torch_s):.0f}", f"{1e3 * median(fntrain_s):.0f}"]
    return f"| {' | '.join([*cells, f'{median(ratios):.3f} ({low:.3f} to {high:.3f})'])} |"


def loaded_by(name: str) -> str:
    """Those of LATER that an import brings in."""
    return python(LOADED.format(name, LATER), PYTHONDONTWRITEBYTECODE="1") or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the raw seconds here")
    args = parser.parse_args()
    times = measure(args.rounds)
    version = python("import torch; print(torch.__version__)", PYTHONDONTWRITEBYTECODE="1")
    print("# Import time\n")
    facts = {
        "date": date.today().isoformat(),
        "hardware": cpu_model(),
        "versions": f"Python {platform.python_version()}, torch {version}",
        "command": " ".join(["python", "benchmarks/import_time.py", *sys.argv[1:]]),
    }
    print("\n".join(f"- {key}: {value}" for key, value in facts.items()) + "\n")
    print("| garbage collector | import torch, ms | import fntrain, ms | ratio |\n|---|---|---|---|")
    for gc, one in times.items():
        print(row(gc, one["torch"], one["fntrain"]))
    print()
    print(f"Medians of {args.rounds} rounds; quartiles in brackets.\n")
    print(f"Of {', '.join(LATER)}:\n")
    print(f"- `import torch` brings in: {loaded_by('torch')}\n- `import fntrain` brings in: {loaded_by('fntrain')}")
    if args.json:
        args.json.write_text(json.dumps({**facts, "seconds": times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
