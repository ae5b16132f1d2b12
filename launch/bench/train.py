"""Tokens/s of `megacpt train` on one process beside a plain loop around transformers' Llama: same shapes, rows, type,
optimizer (fused AdamW, clip 1.0), no torch.compile. Both run in this process tree by turns, so that a busy machine hits both.

    python launch/bench/train.py [--hidden 256 --layers 4 --seq-len 256 --steps 30 --rounds 3]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TRAIN = ["-m", "megacpt", "train"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(hidden=256, layers=4, seq_len=256, rows=8, vocab=4096, steps=30, rounds=3).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--document", type=int, default=0, help="mean document length; 0 is one document a row")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--plain", metavar="DIR", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        return plain(options)
    with tempfile.TemporaryDirectory() as folder:
        make(options, Path(folder))
        rates: dict[str, list[float]] = {"megacpt": [], "transformers": []}
        for _ in range(options.rounds):
            rates["transformers"].append(run_plain(folder))
            rates["megacpt"].append(run_ours(folder, options))
    tokens = options.rows * options.seq_len
    print(
        f"hidden {options.hidden}, layers {options.layers}, vocabulary {options.vocab}, {options.rows} rows of {options.seq_len} "
        f"= {tokens} tokens a step, {options.dtype}, documents of {options.document or options.seq_len}, {os.cpu_count()} cores"
    )
    for name, values in rates.items():
        print(f"{name:14}", "  ".join(f"{v:8.0f}" for v in values), f"  tokens/s, median {np.median(values):.0f}")
    ratios = [a / b for a, b in zip(rates["megacpt"], rates["transformers"], strict=True)]
    print(f"ratio by round {'  '.join(f'{r:.3f}' for r in ratios)}, median {np.median(ratios):.3f}")


def make(options, folder: Path) -> None:
    """A config, a tokenizer folder and prepared data of random tokens."""
    from megacpt.data.indexed import write_index
    from megacpt.data.manifest import FORMAT

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": options.vocab,
        "hidden_size": options.hidden,
        "intermediate_size": 11 * options.hidden // 4,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 32,
        "num_key_value_heads": max(1, options.hidden // 64),
        "hidden_act": "silu",
        "max_position_embeddings": options.seq_len,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    random = np.random.default_rng(0)
    total = options.rows * options.seq_len * (options.steps + 1)
    if options.document:
        lengths = np.clip(
            random.exponential(options.document, 4 * total // options.document), 8, options.seq_len
        ).astype(np.int32)
        lengths = lengths[np.cumsum(lengths) < 2 * total]
    else:
        lengths = np.full(total // options.seq_len + 8, options.seq_len, np.int32)
    random.integers(1, options.vocab, lengths.sum()).astype(np.uint16).tofile(folder / "d.bin")
    write_index(folder / "d.idx", np.dtype(np.uint16), [lengths], len(lengths))
    sizes = {k: {"bytes": (folder / f"d.{k}").stat().st_size, "crc32": 0} for k in ("bin", "idx")}
    (folder / "d.json").write_text(
        json.dumps(
            {
                "format": FORMAT,
                "documents": len(lengths),
                "tokens": int(lengths.sum()),
                **sizes,
                "vocab_size": options.vocab,
                "eos_token_id": 0,
                "tokenizer": {"sha256": ""},
            }
        )
    )
    batch = options.rows * options.seq_len
    (folder / "recipe.toml").write_text(f"""
run = {{name = "bench", directory = "{folder}/run"}}
model = {{config = "{folder}/config.json", tokenizer = "{folder}"}}
parallel = {{micro_batch_tokens = {batch}}}
precision = {{compute = "{options.dtype}"}}
checkpoint = {{every_steps = 1000000}}
packing = {{directory = "{folder}/packing"}}
log = {{peak_tflops = 1.0, every_steps = 1000}}
data = {{d = {{paths = ["{folder}/d"]}}}}
[[stages]]
name = "s"
tokens = {batch * options.steps}
seq_len = {options.seq_len}
batch_tokens = {batch}
lr = {{shape = "constant", peak = 1e-3}}
mixture = {{d = 1.0}}
""")


def run_ours(folder: str, options) -> float:
    """Median tokens/s over the steps after the first five, as metrics.jsonl has them: waiting for data is inside."""
    subprocess.run(["rm", "-rf", f"{folder}/run"], check=True)
    subprocess.run([sys.executable, *TRAIN, f"{folder}/recipe.toml"], check=True, capture_output=True)
    rows = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")]
    return float(np.median([row["tokens_per_second"] for row in rows[5:]]))


def run_plain(folder: str) -> float:
    out = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--plain", folder], check=True, capture_output=True, text=True
    )
    return float(out.stdout.split()[-1])


def plain(options) -> None:
    import torch
    import transformers

    raw = json.loads((Path(options.plain) / "config.json").read_text())
    config = transformers.LlamaConfig(**{k: v for k, v in raw.items() if k not in ("architectures", "model_type")})
    config._attn_implementation = "sdpa"
    dtype = getattr(torch, options.dtype)
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    tokens = torch.from_numpy(np.fromfile(Path(options.plain) / "d.bin", np.uint16).astype(np.int64))
    count, rates = options.rows * options.seq_len, []
    for step in range(options.steps):
        begin = time.perf_counter()
        batch = tokens[step * count : (step + 1) * count].view(options.rows, options.seq_len)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        rates.append(count / (time.perf_counter() - begin))
    print(np.median(rates[5:]))


if __name__ == "__main__":
    main()
