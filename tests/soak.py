"""Random faults from a seed, under `megacpt supervise`, until a number of them or a time is reached; then the comparison with runs that had
none, and the effective training time. Not part of the suite.

    python tests/soak.py [--faults 200] [--minutes 60] [--seed 1] [--ranks 2] [--directory DIR]

Rounds of 25 faults: each is a run of 100 steps that saves every 4 and is hit by kills, stop requests, hangs, full disks, flipped bits in
shards that are being written and in checkpoints that are published, and numbers that are none. The last kind changes a run by what it
skips, so the run without faults to compare with has those, and no others. Leaves with 1 if anything was lost.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "faults")]
os.environ["OMP_NUM_THREADS"] = "1"

STEPS, EVERY, ROUND = 100, 4, 25
KINDS = {
    "kill one rank": 5, "kill all ranks": 2, "kill in a save": 4, "stop request": 3, "hang": 2, "stopped process": 1, "lock held": 1,
    "disk full": 3, "bit in a save": 2, "bit in a checkpoint": 2, "not finite": 3,
}  # fmt: skip


def plan(chance: random.Random, folder: Path, ranks: int) -> tuple[list[tuple[str, str]], str]:
    """([(kind, fault)], the faults that are not once) of a round."""
    from megacpt.heartbeat import POINTS

    save_points = [point for point in POINTS if point.startswith("save.")]
    step_points = [point for point in POINTS if point not in (*save_points, "evaluate")]
    faults, lasting, used = [], [], set()
    for i in range(ROUND):
        kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
        step = chance.choice([s for s in range(2, STEPS) if s not in used])
        used.add(step)
        save = -(-step // EVERY) * EVERY
        rank, point = chance.randrange(ranks), chance.choice(step_points)
        saving = chance.choice(save_points)
        anywhere = saving in save_points[:2]
        once = f",once={folder}/{i}"
        text = {
            "kill one rank": f"kill:rank={rank},point={point},step={step}{once}",
            "kill all ranks": f"kill:point={point},step={step}" + f",once={folder}/all{i}",
            "kill in a save": f"kill:rank={rank if anywhere else 0},point={saving},step={save}{once}",
            "stop request": f"term:rank={rank},point={point},step={step}{once}",
            "hang": f"sleep:rank={rank},point={point},step={step}{once}",
            "stopped process": f"stop:rank={rank},point={point},step={step}{once}",
            "lock held": f"hold:rank={rank},point={point},step={step}{once}",
            "disk full": f"full:rank={rank if anywhere else 0},point={saving},step={save}{once}",
            "bit in a save": f"flip:rank={rank},point=save.after_shards,step={save}{once}",
            "bit in a checkpoint": f"kill:rank={rank},point=step.begin,step={step}{once}.flip",
            "not finite": f"nan:rank={rank},point=before_update,step={step}",
        }[kind]
        if kind == "kill all ranks":  # each rank has a file of its own that says it has happened
            text = ";".join(text.replace("kill:", f"kill:rank={r},") + f".{r}" for r in range(ranks))
        if kind == "not finite":
            lasting.append(text)
        faults.append((kind, text))
    return faults, ";".join(lasting)


def one_attempt(arguments: list[str]) -> None:
    """The supervised command: a bit may turn in the newest checkpoint, then forked ranks train."""
    from crash import run_ranks

    path, directory, marks, ranks, fault = arguments
    for mark in sorted(Path(marks).glob("*.flip")):
        done = mark.with_suffix(".flipped")
        shards = sorted(Path(directory).glob("checkpoints/step-*/*.distcp"))
        if (
            not done.exists() and len({shard.parent for shard in shards}) > 1
        ):  # the only one damaged is a loss, and said to be one
            shard = shards[-1]
            raw = bytearray(shard.read_bytes())
            raw[random.Random(mark.name).randrange(len(raw))] ^= 1
            shard.write_bytes(raw)
            done.touch()
    flags = [
        f"--run.directory={directory}",
        f"--checkpoint.every_steps={EVERY}",
        "--checkpoint.keep_last=4",
        "--health.watchdog=true",
    ]
    flags += ["--health.step_timeout_seconds=4", "--health.save_timeout_seconds=20", "--checkpoint.asynchronous=true"]
    codes, _ = run_ranks(int(ranks), path, flags, fault, seconds=300)
    sys.exit(0 if not any(codes) else 1)


def attempt(path: str, run: Path, marks: Path, ranks: int, fault: str, supervised: bool) -> int:
    command = [sys.executable, str(Path(__file__)), "attempt", path, str(run), str(marks), str(ranks), fault]
    if supervised:
        command = [
            sys.executable,
            "-m",
            "megacpt",
            "supervise",
            "--backoff",
            "0.1",
            "--max-restarts",
            "30",
            "--",
            *command,
        ]
        command += [f"--run.directory={run}"]
    with open(run.with_suffix(".log"), "w") as log:
        return subprocess.run(command, stdout=log, stderr=log, cwd=ROOT).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--directory", default=None)
    options = parser.parse_args()
    from crash import exact, rows, weights
    from samples import make_data, make_tokenizer, write_recipe

    from megacpt.config.run_layout import LEDGER
    from megacpt.survive.run_directory import read_status
    from megacpt.survive.supervise import effective_time

    work = Path(options.directory or tempfile.mkdtemp(prefix="soak-"))
    work.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer", "data"):
        (work / name).mkdir(exist_ok=True)
    tokenizer = make_tokenizer(work / "tokenizer")
    rate = {"shape": "constant", "peak": 1e-3}
    stage = {
        "name": "s",
        "tokens": STEPS * 256,
        "seq_len": 64,
        "batch_tokens": 256,
        "mixture": {"a": 0.7, "b": 0.3},
        "lr": rate,
    }
    path = write_recipe(work, make_data(work / "data", tokenizer), tokenizer, stages=[stage])
    chance, begin, ended, lost = random.Random(options.seed), time.monotonic(), Counter(), 0
    met, attempts, shares = Counter(), 0, []
    while sum(met.values()) < options.faults and time.monotonic() - begin < 60 * options.minutes:
        number = len(shares)
        marks, whole, run = work / f"marks{number}", work / f"whole{number}", work / f"run{number}"
        marks.mkdir()
        faults, lasting = plan(chance, marks, options.ranks)
        attempt(path, whole, marks, options.ranks, lasting, supervised=False)
        code = attempt(path, run, marks, options.ranks, ";".join(text for _, text in faults), supervised=True)
        for i, (kind, _) in enumerate(faults):
            if (
                kind == "not finite"
                or list(marks.glob(f"{i}"))
                or list(marks.glob(f"all{i}.*"))
                or list(marks.glob(f"{i}.flip"))
            ):
                met[kind] += 1
        ledger = [json.loads(line) for line in (run / LEDGER).read_text().splitlines()]
        attempts += len(ledger)
        ended += Counter(row["status"] for row in ledger)
        same = code == 0 and read_status(run)["status"] == "finished" and exact(run) == exact(whole)
        same = same and weights(run, STEPS) == weights(whole, STEPS)
        lost += not same
        shares.append(effective_time(run))
        found = Counter(event["kind"] for event in rows(run, "events.jsonl"))
        print(
            f"round {number}: {sum(met.values())} faults so far, {len(ledger)} attempts, effective time {shares[-1]:.2f}, "
            f"{found['save_failed']} saves failed, {found['damaged']} checkpoints found damaged, "
            f"{'the same to the bit' if same else 'DIFFERENT: ' + str(run)}",
            flush=True,
        )
    minutes = (time.monotonic() - begin) / 60
    print(
        f"\n{sum(met.values())} faults in {len(shares)} runs of {STEPS} steps, {attempts} attempts, {minutes:.1f} minutes, seed ",
        end="",
    )
    print(f"{options.seed}\n")
    print("| fault | times |\n|---|---|")
    for kind in KINDS:
        print(f"| {kind} | {met[kind]} |")
    print("\nattempts ended as: " + ", ".join(f"{kind} {count}" for kind, count in ended.most_common()))
    print(
        f"effective training time: mean {sum(shares) / len(shares):.3f}; runs that differ from those without faults: {lost}"
    )
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["attempt"]:
        one_attempt(sys.argv[2:7])
    else:
        main()
