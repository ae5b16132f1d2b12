"""How long training stands still for a save: written while it waits, and behind it. Medians of alternating saves of one state, with the
host memory before and after.

    python launch/bench/saves.py [--megabytes 600] [--saves 7] [--directory DIR]

Leaves with 1 if the stall behind the training is 5 % of a waiting save or more.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=600, help="weights and moments together")
    parser.add_argument("--saves", type=int, default=7)
    parser.add_argument("--directory", default=None, help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    import torch
    from torch import nn
    from torch.distributed.tensor import DTensor, Replicate

    from megacpt.checkpoint.background import Saver
    from megacpt.checkpoint.manifest import State
    from megacpt.checkpoint.save import prune, tensors_of
    from megacpt.config.layout import Layout
    from megacpt.optim.adamw import AdamW
    from megacpt.parallel.mesh import build_mesh, device_of_process, start_process_group
    from megacpt.train.metrics import resident_gib

    device = device_of_process()
    start_process_group(device)
    mesh = build_mesh(Layout(), device)
    count = max(1, options.megabytes * 10**6 // (3 * 4 * 2**20))

    def make():
        return nn.Parameter(DTensor.from_local(torch.randn(1024, 1024, device=device), mesh.tensor, [Replicate()]))

    parameters = {f"w{i}": make() for i in range(count)}
    optimizer = AdamW(parameters)
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        path = Path(folder)
        saver = Saver("rename", lambda: prune(path, 1, None))
        waiting, stalls, whole, step = [], [], [], 0
        before = resident_gib()
        for i in range(options.saves + 1):  # the first round makes the host's copies, and does not count
            for behind in (False, True):
                step += 1
                tensors, state = tensors_of(parameters, optimizer), State(step, step, step, "s")
                begin = time.perf_counter()
                if behind:
                    stall = saver.start(path, tensors, state, {})
                    saver.wait()
                    if i:
                        stalls.append(stall)
                        whole.append(time.perf_counter() - begin)
                else:
                    saver.now(path, tensors, state, {})
                    if i:
                        waiting.append(time.perf_counter() - begin)
            if i == 0:
                before = resident_gib()
        errors = [outcome.error for outcome in saver.outcomes if outcome.error]
        assert not errors, errors
        after = resident_gib()
    share = statistics.median(stalls) / statistics.median(waiting)
    print(f"{count} M weights, {count * 12 * 2**20 / 1e6:.0f} MB, {options.saves} saves of each kind on {device.type}")
    print("| | median seconds | least | most |\n|---|---|---|---|")
    kinds = {
        "save, training waits": waiting,
        "save behind, training waits": stalls,
        "save behind, until published": whole,
    }
    for name, times in kinds.items():
        print(f"| {name} | {statistics.median(times):.3f} | {min(times):.3f} | {max(times):.3f} |")
    print(
        f"\nstall {100 * share:.1f} % of a waiting save; host memory after the first round {before:.2f} GiB, at the end {after:.2f} GiB"
    )
    sys.exit(1 if share >= 0.05 else 0)


if __name__ == "__main__":
    main()
