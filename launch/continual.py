"""A whole continual pre-training on a CPU: a tiny English base learns Chinese and code, with a vocabulary grown for it, weights that
adjust, three context lengths behind gates, an anneal and an average; once with English replay and once without.

    python launch/continual.py EN.jsonl.zst ZH.jsonl.zst DIR [--report docs/continual.md]

EN and ZH hold one document a line with `text` and `topic`; code is the standard library's sources. A second call goes on where the first
stopped. The report is made of what the runs wrote.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from quickstart import sources

EOS = "<|end_of_text|>"
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "initializer_range": 0.02, "eos_token_id": 0,
}  # fmt: skip
BASE = """
run = {{name = "base", directory = "{out}/base"}}
model = {{config = "{out}/config.json", tokenizer = "{out}/tokenizer-en"}}
parallel = {{micro_batch_tokens = 4096}}
packing = {{directory = "{out}/packing"}}
log = {{every_steps = 50, tensorboard = false, peak_tflops = 0.1}}
checkpoint = {{every_steps = 1000}}
data = {{en = {{paths = ["{out}/base-en"], holdout_documents = 20}}}}
validation = [{{domains = ["en"], max_tokens = 40000}}]
[[stages]]
name = "base"
tokens = "1M"
seq_len = 128
batch_tokens = 4096
lr = {{shape = "wsd", peak = 4e-3, warmup_tokens = "80K", decay_tokens = "250K", min = 4e-4}}
mixture = {{en = 1.0}}
"""
GROWN = """
run = {{name = "{name}", directory = "{out}/{name}"}}
model = {{pretrained = "{out}/grown"}}
parallel = {{micro_batch_tokens = 4096}}
packing = {{directory = "{out}/packing"}}
log = {{every_steps = 50, peak_tflops = 0.1}}
checkpoint = {{every_steps = 1000, asynchronous = true}}
validation = [{{domains = ["zh-library", "zh-c", "zh-rest", "code", "en"], max_tokens = 40000}}]

[data]
zh-library = {{paths = ["{out}/zh"], labels = ["library"], holdout_documents = 15}}
zh-c       = {{paths = ["{out}/zh"], labels = ["c-api"], holdout_documents = 6}}
zh-rest    = {{paths = ["{out}/zh"], labels = [{rest}], holdout_documents = 10}}
code       = {{paths = ["{out}/code"], holdout_documents = 20}}
en         = {{paths = ["{out}/en"], holdout_documents = 20}}

[mixture]
groups = {{zh = ["zh-library", "zh-c", "zh-rest"]}}
online = {{every_tokens = "100K", start_tokens = "100K", alpha = 4.0}}

[gates]
needle = {{kind = "needle", haystack = "en", depths = 5, minimum = 0.0}}   # a model of this size finds none: for the map
forget = {{kind = "forgetting", domains = ["en"], max_rise = 0.15}}
short  = {{kind = "recovery", domains = ["en"], tolerance = 0.05}}

[[stages]]
name = "rows"
tokens = "80K"
seq_len = 128
batch_tokens = 4096
freeze = ["model.layers.*", "model.norm.weight"]
lr = {{shape = "linear", peak = 2e-3, min = 1e-3, warmup_tokens = "16K"}}
mixture = {mixture}

[[stages]]
name = "128"
tokens = "350K"
seq_len = 128
batch_tokens = [["0", 4096], ["200K", 8192]]
lr = {{shape = "constant", peak = 2e-3, warmup_tokens = "50K"}}
mixture = {mixture}
gates = ["forget"]
on_fail = {{action = "warn"}}

[[stages]]
name = "256"
tokens = "200K"
seq_len = 256
batch_tokens = 8192
rope = {{rule = "ntk2"}}
lr = {{shape = "constant", peak = 1.5e-3}}
mixture = {mixture}
gates = ["needle", "short"]
on_fail = {{action = "warn"}}

[[stages]]
name = "512"
tokens = "200K"
seq_len = 512
batch_tokens = 8192
rope = {{rule = "ntk2"}}
lr = {{shape = "constant", peak = 1.5e-3}}
mixture = {mixture}
gates = ["needle", "short", "forget"]
on_fail = {{action = "warn"}}

[[stages]]
name = "anneal"
tokens = "200K"
seq_len = 512
batch_tokens = 8192
lr = {{shape = "linear", peak = 1.5e-3, min = 0.0}}
mixture = {mixture}
gates = ["needle", "short", "forget"]
on_fail = {{action = "warn"}}
average = {{last = 4, every_tokens = "50K"}}
"""
MIXTURES = {
    "replay": "{zh-library = 0.25, zh-c = 0.1, zh-rest = 0.15, code = 0.25, en = 0.25}",
    "no-replay": "{zh-library = 0.33, zh-c = 0.14, zh-rest = 0.2, code = 0.33}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("en")
    parser.add_argument("zh")
    parser.add_argument("output", type=Path)
    parser.add_argument("--report", type=Path, help="write the figures there, as Markdown")
    options = parser.parse_args()
    begin, out = time.monotonic(), options.output
    out.mkdir(parents=True, exist_ok=True)
    once(out / "code.jsonl", lambda path: write_code(path))
    once(out / "tokenizer-en", lambda p: megacpt("vocab", "train", options.en, "--output", p, "--vocab-size", 3000))
    once(out / "tokenizer-zh", lambda p: megacpt("vocab", "train", options.zh, "--output", p, "--vocab-size", 2500))
    once(
        out / "base-en.json",
        lambda p: megacpt("prepare", options.en, "--tokenizer", out / "tokenizer-en", "--output", out / "base-en"),
    )
    size = len(json.loads((out / "tokenizer-en/tokenizer.json").read_text())["model"]["vocab"])
    (out / "config.json").write_text(json.dumps(MODEL | {"vocab_size": size}))
    train(out, "base", BASE.format(out=out))
    once(out / "base-export", lambda p: megacpt("export", out / "base", "--output", p))
    once(
        out / "tokenizer",
        lambda p: megacpt("vocab", "merge", out / "tokenizer-en", out / "tokenizer-zh", "--output", p),
    )
    growth = out / "growth.txt"
    if not (out / "grown").exists():
        command = (
            "vocab",
            "expand",
            out / "base-export",
            out / "tokenizer",
            "--output",
            out / "grown",
            "--sample",
            options.zh,
            options.en,
        )
        growth.write_text(megacpt(*command))
    for name, source in (("en", options.en), ("zh", options.zh), ("code", out / "code.jsonl")):
        more = [] if name == "code" else ["--domain-field", "topic"]
        once(
            out / f"{name}.json",
            lambda p, n=name, s=source, m=more: megacpt(
                "prepare", s, "--tokenizer", out / "grown", "--output", out / n, *m
            ),
        )
    labels = json.loads((out / "zh.json").read_text())["labels"]["names"]
    rest = ", ".join(json.dumps(name) for name in labels if name not in ("library", "c-api"))
    for name, mixture in MIXTURES.items():
        train(out, name, GROWN.format(out=out, name=name, rest=rest, mixture=mixture))
    seconds = time.monotonic() - begin
    text = report(out, seconds, growth.read_text())
    print(text)
    if options.report:
        options.report.write_text(text, encoding="utf-8")
        pictures = sorted((out / "replay/gates").glob("anneal-needle*.png"))
        if pictures:
            shutil.copyfile(pictures[-1], options.report.with_name("continual-needle.png"))


def once(path: Path, make) -> None:
    if not path.exists():
        make(path)


def megacpt(*arguments) -> str:
    """Runs a verb and returns what it prints."""
    done = subprocess.run([sys.executable, "-m", "megacpt", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"megacpt {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}")
    return done.stdout


def train(out: Path, name: str, recipe: str) -> None:
    path = out / f"{name}.toml"
    path.write_text(recipe)
    status = out / name / "run.json"
    if not status.exists() or json.loads(status.read_text())["status"] != "finished":
        subprocess.run([sys.executable, "-m", "megacpt", "train", str(path), "--require", "finished"], check=True)


def write_code(path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in sources()[:400])


def rows_of(path: Path, kind: str | None = None) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if kind is None or row["kind"] == kind]


def report(out: Path, seconds: float, growth: str) -> str:
    """Markdown, from what the runs wrote."""
    runs = {name: rows_of(out / name / "events.jsonl") for name in MIXTURES}

    def kinds(name, kind):
        return [row for row in runs[name] if row["kind"] == kind]

    first, last = (
        {n: kinds(n, "validation")[0]["losses"] for n in runs},
        {n: kinds(n, "validation")[-1]["losses"] for n in runs},
    )
    parameters = rows_of(out / "replay/metrics.jsonl")[-1]
    lines = [
        "# A continual pre-training on two cores", "",
        "`python launch/continual.py EN ZH DIR --report docs/continual.md` writes this page from the files of its runs. The text is",
        "Python's manual in English and Chinese, with the manual's folders as topics, and the standard library's sources as code. A base",
        "model of 4 layers and 128 features is trained on English, its vocabulary is grown for Chinese, and its pre-training continues for",
        f"{parameters['tokens']:,} tokens, with and without replay. All of this took {seconds:.0f} s.", "",
        "```", *re.sub(r"\S*/", "", growth).strip().splitlines(), "```", "",
        "## Loss by domain", "",
        "Losses before the run, and after it with a quarter of English replay and without, in rows of the stage: 128 tokens before, 512",
        "after.", "",
        "| domain | before | after, with replay | after, without |", "|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {d} | {first['replay'][d]:.3f} | {last['replay'][d]:.3f} | {last['no-replay'][d]:.3f} |"
        for d in first["replay"]
    ]
    lines += ["", "## Gates", "", "| run | stage | gate | verdict | numbers |", "|---|---|---|---|---|"]
    for name in runs:
        for event in kinds(name, "gates"):
            for result in event["results"]:
                numbers = {k: v for k, v in result["numbers"].items() if v}
                word = "passed" if result["passed"] else f"not passed ({event['action']})"
                lines.append(f"| {name} | {event['stage']} | {result['gate']} | {word} | `{json.dumps(numbers)}` |")
        for event in kinds(name, "extend"):
            lines.append(f"| {name} | {event['stage']} | | extended by {event['by_tokens']:,} tokens | |")
    lines += [
        "",
        "![recall of the needle by length and depth, at the end](continual-needle.png)",
        "",
        "## Mixture over time",
        "",
    ]
    lines += ["Shares of the Chinese topics inside their group, in the run with replay. Their sum does not change.", ""]
    lines += ["| stage | tokens | zh-library | zh-c | zh-rest | sum |", "|---|---|---|---|---|---|"]
    for event in kinds("replay", "mixture"):
        if event["weights"]:
            parts = [event["weights"][d] for d in ("zh-library", "zh-c", "zh-rest")]
            lines.append(
                f"| {event['stage']} | {event['tokens']:,} | "
                + " | ".join(f"{p:.4f}" for p in parts)
                + f" | {sum(parts):.4f} |"
            )
    lines += [
        "",
        "## Forgetting",
        "",
        "Loss on English in rows of 128 tokens, as the gates measured it at the end of each stage.",
        "",
    ]
    lines += ["| stage | with replay | without |", "|---|---|---|"]
    english = {name: {e["stage"]: r["numbers"]["losses"]["en"] for e in kinds(name, "gates") for r in e["results"]
                      if "losses" in r["numbers"]} for name in runs}  # fmt: skip
    start = {name: kinds(name, "baseline")[0]["losses"]["en"] for name in runs}
    lines.append(f"| start | {start['replay']:.3f} | {start['no-replay']:.3f} |")
    lines += [
        f"| {stage} | {loss:.3f} | {english['no-replay'][stage]:.3f} |" for stage, loss in english["replay"].items()
    ]
    lines += ["", "## Average", "", "| run | last | average | better |", "|---|---|---|---|"]
    for name in runs:
        for event in kinds(name, "average"):
            mean = {k: sum(v.values()) / len(v) for k, v in event["losses"].items()}
            lines.append(f"| {name} | {mean['last']:.4f} | {mean['average']:.4f} | {event['better']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
