"""Tokens/s of the same tiny model under different layouts on this machine, by torchrun and gloo. It shows what parallelism costs
where it cannot gain (ranks share the cores), not what it gains on GPUs.

    python launch/bench/layouts.py [--steps 12 --rounds 2]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from train import make

LAYOUTS = {
    "1 process": {},
    "dp2": {"data_shard": 2},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "cp2": {"context": 2},
    "tp2 x pp2": {"tensor": 2, "pipeline": 2},
    "tp2 x dp2 x pp2": {"tensor": 2, "data_shard": 2, "pipeline": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(
        hidden=256, layers=4, seq_len=256, rows=8, vocab=4096, steps=12, rounds=2, document=80
    ).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.set_defaults(dtype="float32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make(options, Path(folder))
        rates = {name: [] for name in LAYOUTS}
        for _ in range(options.rounds):
            for name, degrees in LAYOUTS.items():
                rates[name].append(run(folder, degrees, options))
    print(
        f"{options.rows} rows of {options.seq_len} a step, a row a micro-batch, hidden {options.hidden}, {os.cpu_count()} cores\n"
    )
    print("| layout | processes | tokens/s | of one process |\n|---|---|---|---|")
    one = np.median(rates["1 process"])
    for name, values in rates.items():
        print(
            f"| {name} | {int(np.prod(list(LAYOUTS[name].values())))} | {np.median(values):,.0f} | {np.median(values) / one:.2f} |"
        )


def run(folder: str, degrees: dict[str, int], options) -> float:
    """Median tokens/s after the first three steps."""
    subprocess.run(["rm", "-rf", f"{folder}/run"], check=True)
    processes = int(np.prod(list(degrees.values())))
    flags = [f"--parallel.{axis}={degree}" for axis, degree in degrees.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    more = [f"--parallel.micro_batch_tokens={options.seq_len}", "--log.tensorboard=false"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, "-m", "megacpt", "train", f"{folder}/recipe.toml", *flags, *more],
        check=True,
        capture_output=True,
        env=environment,
    )
    rows = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")]
    return float(np.median([row["tokens_per_second"] for row in rows[3:]]))


if __name__ == "__main__":
    main()
