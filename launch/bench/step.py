"""One training step of a model of Llama-3-8B's shapes, with as many layers as fit, on one GPU: tokens/s, both MFUs, peak memory, where the
kernels' time goes and how long the host takes, beside the same model in transformers (eager and compiled) and in torchtitan where it
can be imported.

    bash launch/bench_train.sh                         # 8,192 and 131,072 tokens, packed documents
    python launch/bench/step.py --tokens 8192 --layers 8 [--compile] [--document 1000] [--csv step.csv]
    python launch/bench/step.py --tiny                 # small shapes on any device: to see that it works

Every program runs in a process of its own. A step is forward, backward, clip and AdamW on random tokens; the median of --steps after three.
"""

import argparse
import csv
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

PROGRAMS = ("megacpt", "megacpt compiled", "transformers", "transformers compiled", "torchtitan")
SHAPE = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    rope_theta=500000.0, max_position_embeddings=131072,
)  # fmt: skip
TINY = dict(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    rope_theta=10000.0, max_position_embeddings=4096,
)  # fmt: skip
BYTES = 18
"""A parameter, while training: weight, gradient and two moments in fp32, and the bfloat16 copy."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 131072], help="of a step, one row")
    parser.add_argument("--layers", type=int, help="default: as many as fit, the loss and activations left room")
    parser.add_argument("--document", type=int, default=1000, help="mean length of the packed documents")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    parser.add_argument("--csv", metavar="FILE")
    parser.add_argument("--tiny", action="store_true", help="small shapes, any device")
    parser.add_argument("--one", metavar="PROGRAM", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options)))
        return
    import torch

    if not torch.cuda.is_available() and not options.tiny:
        sys.exit("This needs a GPU: it measures one. `--tiny` runs the whole program on small shapes here.")
    print(
        "| program | tokens | layers | tokens/s | MFU, PaLM | MFU, exact | peak GiB | GPU busy | host, ms | step, ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for tokens in [256] if options.tiny else options.tokens:
        for program in options.programs:
            if program == "torchtitan" and importlib.util.find_spec("torchtitan") is None:
                print("  torchtitan: cannot be imported")
                continue
            row = run(program, tokens, options)
            if row:
                rows.append(row)
                print(line(row), flush=True)
    for row in rows:
        if row["kernels"]:
            print(f"\n{row['program']}, {row['tokens']} tokens: share of the kernels' time")
            for name, share in row["kernels"]:
                print(f"  {share:5.1f} %  {name}")
    if options.csv and rows:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows([row | {"kernels": json.dumps(row["kernels"])} for row in rows])


def run(program: str, tokens: int, options) -> dict | None:
    command = [sys.executable, __file__, "--one", program, "--tokens", str(tokens), "--document", str(options.document)]
    command += ["--steps", str(options.steps), *(["--layers", str(options.layers)] if options.layers else [])]
    out = subprocess.run([*command, *(["--tiny"] if options.tiny else [])], capture_output=True, text=True)
    if out.returncode:
        print(
            f"  {program}, {tokens} tokens: {out.stderr.strip().splitlines()[-1][:160] if out.stderr.strip() else out.returncode}"
        )
        return None
    return json.loads(out.stdout.strip().splitlines()[-1])


def line(row: dict) -> str:
    def share(x):
        return "" if x is None else f"{100 * x:.1f} %"

    cells = [
        row["program"], row["tokens"], row["layers"], f"{row['tokens_per_second']:.0f}", share(row["mfu"]), share(row["mfu_exact"]),
        f"{row['peak_gib']:.1f}", share(row["gpu_busy"]), f"{row['host_ms']:.1f}", f"{row['step_ms']:.1f}",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def measure(options) -> dict:
    """Runs one program in this process."""
    import numpy as np
    import torch

    from megacpt.family.read import parse_config
    from megacpt.model.flops import PEAK_FLOPS, step_flops

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, shape = options.tokens[0], TINY if options.tiny else SHAPE
    layers = options.layers or (2 if options.tiny else fitting_layers(shape, tokens, device))
    raw = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers, "hidden_act": "silu",
           "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "eos_token_id": 0, **shape}  # fmt: skip
    random = np.random.default_rng(0)
    cuts = np.cumsum(
        np.clip(random.exponential(options.document, 4 + 4 * tokens // options.document), 2, None).astype(np.int64)
    )
    starts = np.concatenate([[0], cuts[cuts < tokens - 1]])
    ids = random.integers(1, shape["vocab_size"], tokens)
    program, compiled = options.one.split()[0], options.one.endswith("compiled")
    step = {"megacpt": ours, "transformers": transformers_step, "torchtitan": torchtitan_step}[program](
        raw, ids, starts, device, compiled
    )
    numbers = timed(step, options.steps, device)
    lengths = np.diff(np.append(starts, tokens))
    dense, exact = step_flops(parse_config(raw, "bench"), tokens, tokens, int((lengths * (lengths + 1) // 2).sum()))
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)

    def rate(flops):
        return flops / (numbers["step_ms"] / 1e3) / peak if peak else None

    facts = {"program": options.one, "tokens": tokens, "layers": layers, "documents": len(starts)}
    facts |= {"device": name or "CPU", "torch": torch.__version__}
    facts |= {"tokens_per_second": tokens / numbers["step_ms"] * 1e3, "mfu": rate(dense), "mfu_exact": rate(exact)}
    return facts | numbers


def fitting_layers(shape: dict, tokens: int, device) -> int:
    """Layers whose training state and activations (34 h bytes a token and layer, Korthikanti et al. 2022, without recomputation, plus FFN
    width) leave 15 % and the loss's two gradients free."""
    import torch

    h, f, kv = shape["hidden_size"], shape["intermediate_size"], shape["num_key_value_heads"] * shape["head_dim"]
    layer = 2 * h * h + 2 * h * kv + 3 * h * f
    ends = 2 * shape["vocab_size"] * h
    free = 0.85 * torch.cuda.get_device_properties(device).total_memory - BYTES * ends - (3 << 30)
    activations = tokens * 2 * (7 * h + 2 * kv + 4 * f)
    return max(1, min(32, int(free // (BYTES * layer + activations))))


def timed(step: Callable[[], None], steps: int, device) -> dict:
    """Median of a step; what the host takes to issue it; how much of it the GPU computes; kernels by their share."""
    import torch

    cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    for _ in range(3):
        step()
    wait()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    whole, host = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        step()
        host.append(1e3 * (time.perf_counter() - begin))
        wait()
        whole.append(1e3 * (time.perf_counter() - begin))
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        wait()

    def time_of(event):
        return event.self_device_time_total if cuda else event.self_cpu_time_total

    events = sorted(profile.key_averages(), key=time_of, reverse=True)
    total = sum(map(time_of, events)) or 1.0
    median = statistics.median(whole)
    return {
        "step_ms": median,
        "host_ms": statistics.median(host),
        "gpu_busy": min(1.0, total / 1e3 / median) if cuda else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        "kernels": [(event.key[:90], 100 * time_of(event) / total) for event in events[:15]],
    }


def ours(raw: dict, ids, starts, device, compiled: bool) -> Callable[[], None]:
    import numpy as np
    import torch

    from megacpt.config.layout import Layout
    from megacpt.data.loader import Batch, StepCounts, StepData
    from megacpt.family.read import parse_config
    from megacpt.model.build import build_model
    from megacpt.model.decoder import ModelOptions
    from megacpt.model.hf import initialize
    from megacpt.optim.adamw import AdamW
    from megacpt.parallel.mesh import build_mesh, start_process_group
    from megacpt.train.step import Update, train_step

    start_process_group(device)
    config = parse_config(raw, "bench")
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build_model(config, build_mesh(Layout(), device), compute, ModelOptions(compile=compiled))
    initialize(model, config, 0)
    optimizer = AdamW(dict(model.named_parameters()), decayed=[p.name for p in config.parameters if p.decay])
    ends = np.append(starts[1:], len(ids))
    positions = np.arange(len(ids)) - np.repeat(starts, ends - starts)
    labels = np.append(ids[1:], -100)
    labels[ends - 1] = -100
    batch = Batch(ids[None], labels[None], positions[None], starts, np.array([0, len(starts)]), [""])
    update = Update(1e-5, (0.9, 0.95), 1e-8, 0.1, 1.0)
    count = int((labels >= 0).sum())
    return lambda: train_step(
        model, optimizer, StepData([batch], StepCounts(count, count, len(starts)), 0), "step", update
    )


def transformers_step(raw: dict, ids, starts, device, compiled: bool) -> Callable[[], None]:
    """Its own masking of packed documents: position ids that restart, flash-attn 2 where installed, else SDPA."""
    import numpy as np
    import torch
    import transformers

    names = {k: v for k, v in raw.items() if k not in ("architectures", "model_type")}
    config = transformers.LlamaConfig(**names)
    config._attn_implementation = (
        "flash_attention_2" if device.type == "cuda" and importlib.util.find_spec("flash_attn") else "sdpa"
    )
    model = transformers.LlamaForCausalLM(config).to(device)
    if compiled:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)
    ends = np.append(starts[1:], len(ids))

    def place(array):
        return torch.from_numpy(array)[None].to(device)

    tokens, positions = place(ids), place(np.arange(len(ids)) - np.repeat(starts, ends - starts))

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(tokens, labels=tokens, position_ids=positions, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def torchtitan_step(raw: dict, ids, starts, device, compiled: bool) -> Callable[[], None]:
    """Its Llama 3 with causal attention (no documents), compiled block by block as its recipes do."""
    import torch
    from torchtitan.models.llama3 import Transformer, TransformerModelArgs

    args = TransformerModelArgs(
        dim=raw["hidden_size"], n_layers=raw["num_hidden_layers"], n_heads=raw["num_attention_heads"],
        n_kv_heads=raw["num_key_value_heads"], vocab_size=raw["vocab_size"], max_seq_len=len(ids), ffn_dim_multiplier=1.3,
        multiple_of=1024, rope_theta=raw["rope_theta"],
    )  # fmt: skip
    with device:
        model = Transformer(args)
    model.init_weights()
    for name, block in list(model.layers.named_children()):
        model.layers.register_module(name, torch.compile(block, fullgraph=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)
    tokens = torch.from_numpy(ids)[None].to(device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(tokens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float()[:-1], tokens[0, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
