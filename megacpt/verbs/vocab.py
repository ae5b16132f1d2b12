"""Train a tokenizer, append it to an old one, grow a model's vocabulary to it."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from megacpt.errors import ConfigError

SAMPLE_BYTES = 1 << 22
"""Of each sample that the two vocabularies are compared on."""


def add_arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="train|merge|expand")

    train = actions.add_parser("train", help="a tokenizer on text", allow_abbrev=False)
    train.add_argument("inputs", nargs="+", metavar="INPUT", help="jsonl, parquet or text, .gz and .zst too")
    train.add_argument("--output", required=True, metavar="DIR")
    train.add_argument(
        "--type",
        choices=["bpe", "sentencepiece"],
        default="bpe",
        help="byte-level BPE as Llama 3 (default), or as Llama 2",
    )
    train.add_argument("--vocab-size", type=int, default=32000)
    train.add_argument("--eos-token", default="<|end_of_text|>", help="bpe: the end-of-text token")
    train.add_argument("--sample-bytes", type=int, help="read at most this much text")

    merge = actions.add_parser(
        "merge", help="append a new tokenizer's entries to an old one, whose ids stay", allow_abbrev=False
    )
    merge.add_argument("base", metavar="OLD_DIR")
    merge.add_argument("new", metavar="NEW_DIR")
    merge.add_argument("--output", required=True, metavar="DIR")
    merge.add_argument("--most", type=int, help="append at most this many entries")
    _add_sample(merge)

    expand = actions.add_parser("expand", help="a model for the larger tokenizer", allow_abbrev=False)
    expand.add_argument("model", metavar="MODEL_DIR")
    expand.add_argument("tokenizer", metavar="TOKENIZER_DIR")
    expand.add_argument("--output", required=True, metavar="DIR")
    expand.add_argument(
        "--init",
        choices=["mean", "weighted"],
        default="mean",
        help="new rows: mean of the old parts' rows, or weighted by length",
    )
    _add_sample(expand)


def _add_sample(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--sample", nargs="*", default=[], metavar="TEXT", help="files on which characters a token are reported"
    )


def run(options: Namespace) -> None:
    {"train": _train, "merge": _merge, "expand": _expand}[options.action](options)


def _train(options: Namespace) -> None:
    from megacpt.data.vocabulary import train

    if options.vocab_size < 300:
        raise ConfigError([f"--vocab-size {options.vocab_size}: at least 300 (256 bytes and some)."], "the arguments")
    size = train(
        options.inputs,
        Path(options.output),
        kind=options.type,
        vocab_size=options.vocab_size,
        eos_token=options.eos_token,
        sample_bytes=options.sample_bytes,
    )
    print(f"{options.output}: {size:,} entries")


def _merge(options: Namespace) -> None:
    from megacpt.data.vocabulary import merge

    before, after = merge(Path(options.base), Path(options.new), Path(options.output), options.most)
    _report(options.base, before, after, options)


def _expand(options: Namespace) -> None:
    from megacpt.model.vocab import expand

    before, after = expand(Path(options.model), Path(options.tokenizer), Path(options.output), options.init)
    _report(options.model, before, after, options)


def _report(old: str, before: int, after: int, options: Namespace) -> None:
    """Sizes, and what the new vocabulary gains on the samples."""
    from megacpt.data.tokenizer import Tokenizer
    from megacpt.data.vocabulary import characters_per_token, texts_of

    print(f"{options.output}: {before:,} -> {after:,} entries")
    for sample in options.sample:
        texts = list(texts_of([sample], most_bytes=SAMPLE_BYTES))
        then, now = (characters_per_token(Tokenizer(path), texts) for path in (old, options.output))
        print(f"{sample}: {then:.3f} -> {now:.3f} characters a token ({now / then - 1:+.1%})")
