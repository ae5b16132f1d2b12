"""Train a classifier of topics from labelled documents, label others with it."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from megacpt.errors import ConfigError


def add_arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="train|label")
    train = actions.add_parser("train", help="from labelled documents", allow_abbrev=False)
    _add_common(train, "DIR")
    train.add_argument("--features", type=int, default=1 << 18, help="hashed features (default: 262144)")
    train.add_argument("--epochs", type=int, default=20)
    train.add_argument("--seed", type=int, default=1)
    label = actions.add_parser("label", help="write documents with their topic", allow_abbrev=False)
    _add_common(label, "FILE.jsonl")
    label.add_argument("--model", required=True, metavar="DIR", help="what `topics train` wrote")


def _add_common(parser: ArgumentParser, output: str) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="jsonl or parquet, .gz and .zst too")
    parser.add_argument("--output", required=True, metavar=output)
    parser.add_argument("--text-field", default="text")
    parser.add_argument("--label-field", default="topic")


def run(options: Namespace) -> None:
    if options.action == "train":
        _train(options)
    else:
        _label(options)


def _train(options: Namespace) -> None:
    from megacpt.data.topics import train

    if options.features < 1024 or options.features & (options.features - 1):
        raise ConfigError([f"--features {options.features}: a power of two of at least 1024."], "the arguments")
    found = train(
        options.inputs,
        Path(options.output),
        text_field=options.text_field,
        label_field=options.label_field,
        features=options.features,
        seed=options.seed,
        epochs=options.epochs,
    )
    print(f"{options.output}: {found['examples']:,} examples, accuracy {found['accuracy']:.3f} on a tenth held out")
    for name, value in found["by_topic"].items():
        print(f"  {name}: {value:.3f}")


def _label(options: Namespace) -> None:
    from megacpt.data.topics import label

    output, model = Path(options.output), Path(options.model)
    counts = label(options.inputs, model, output, text_field=options.text_field, label_field=options.label_field)
    for name, count in sorted(counts.items()):
        print(f"{name}: {count:,} documents")
