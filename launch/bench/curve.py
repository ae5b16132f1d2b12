"""The loss of every step of a recipe under a layout, beside one process: both through torchrun, on the same data.

python launch/bench/curve.py RECIPE --steps 40 --parallel.tensor=2 --parallel.context=2 --parallel.pipeline=2 --parallel.data_shard=2
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile

from megacpt.config.load import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=40)
    options, flags = parser.parse_known_args()
    parallel = load_recipe(options.recipe, flags).parallel
    ranks = math.prod(
        [parallel.tensor, parallel.context, parallel.pipeline, parallel.data_replicate, parallel.data_shard or 1]
    )
    common = [f"--run.stop_at_step={options.steps}", "--validation=[]", "--log.tensorboard=false"]
    with tempfile.TemporaryDirectory() as folder:
        ours = run(options.recipe, ranks, [*common, *flags, f"--run.directory={folder}/many"])
        one = run(options.recipe, 1, [*common, f"--run.directory={folder}/one"])
    print(
        f"{ranks} ranks, {' '.join(flags)}\n\n| step | tokens | {ranks} ranks | one process | relative difference |\n|---|---|---|---|---|"
    )
    for a, b in zip(ours, one, strict=True):
        if a["step"] == 1 or a["step"] % max(1, options.steps // 8) == 0:
            print(
                f"| {a['step']} | {a['tokens']:,} | {a['loss']:.6f} | {b['loss']:.6f} | {abs(a['loss'] - b['loss']) / b['loss']:.1e} |"
            )
    worst = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(ours, one, strict=True))
    print(f"\nlargest relative difference of {len(one)} losses: {worst:.1e}")


def run(recipe: str, ranks: int, flags: list[str]) -> list[dict]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        "-m",
        "megacpt",
        "train",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, recipe, *flags], check=True, stdout=subprocess.DEVNULL, env=environment)
    directory = next(flag.split("=", 1)[1] for flag in flags if flag.startswith("--run.directory="))
    return [json.loads(line) for line in open(f"{directory}/metrics.jsonl")]


if __name__ == "__main__":
    main()
