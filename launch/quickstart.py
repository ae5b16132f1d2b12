"""Helpers of quickstart.sh: `text DIR` makes the text and the tokenizer, `show RUN_DIR` prints gain, forgetting and a sample."""

import json
import pydoc_data.topics
import sys
import sysconfig
from pathlib import Path

VOCABULARY = 4096
SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "turtledemo",
    "pydoc_data",
    "ensurepip",
    "__pycache__",
}


def documentation() -> list[str]:
    """The topics of the language reference, in parts of about 1,500 characters cut between paragraphs."""
    parts = []
    for name in sorted(pydoc_data.topics.topics):
        part = ""
        for paragraph in pydoc_data.topics.topics[name].split("\n\n"):
            part += paragraph + "\n\n"
            if len(part) > 1500:
                parts.append(part)
                part = ""
        if part.strip():
            parts.append(part)
    return parts


def sources() -> list[str]:
    """The standard library's modules, without tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (path for path in sorted(root.rglob("*.py")) if not SKIPPED & set(path.relative_to(root).parts))
    texts = (path.read_text(encoding="utf-8", errors="ignore") for path in files)
    return [text for text in texts if 200 < len(text) < 200_000]


def make_text(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    directory.mkdir(parents=True, exist_ok=True)
    domains = {"docs": documentation(), "code": sources()}
    for name, texts in domains.items():
        with open(directory / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        print(f"{name}: {len(texts)} documents, {sum(map(len, texts)) / 1e6:.1f} M characters")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for texts in domains.values() for text in texts), trainer)
    (directory / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end_of_text|>", "model_max_length": 256}
    (directory / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    model = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "eos_token_id": 0,
    }
    (directory / "config.json").write_text(json.dumps(model, indent=2))


def show(run: Path) -> None:
    import torch
    import transformers

    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    losses = [row["losses"] for row in rows if row["kind"] == "validation"]
    print("validation loss   before    after")
    for name, meaning in (("code", "gain"), ("docs", "forgetting")):
        before, after = losses[0][name], losses[-1][name]
        word = meaning if (after < before) == (meaning == "gain") else "no " + meaning
        print(f"{name:<16}{before:8.4f} {after:8.4f}   {word}: {after - before:+.4f}")
    export = run / "export"
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    model = transformers.AutoModelForCausalLM.from_pretrained(export)
    torch.manual_seed(0)
    prompt = tokenizer("def read(self, size):\n", return_tensors="pt")
    out = model.generate(
        input_ids=prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        max_new_tokens=60,
        do_sample=True,
        top_k=20,
        pad_token_id=0,
    )
    print(f"\n{export} loaded with transformers {transformers.__version__}; a sample:\n")
    print("\n".join("    " + line for line in tokenizer.decode(out[0]).splitlines()))


if __name__ == "__main__":
    {"text": make_text, "show": show}[sys.argv[1]](Path(sys.argv[2]))
