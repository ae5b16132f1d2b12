"""Mean loss of every document of a prepared set with a model."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from megacpt.errors import ConfigError
from megacpt.verbs.common import add_dtype

AXES = ("tensor", "context", "pipeline")


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL_DIR")
    add("prefix", metavar="PREFIX")
    add("--output", required=True, metavar="FILE.jsonl")
    add("--seq-len", type=int, default=8192, help="window of long documents (default: 8192)")
    add("--micro-batch-tokens", type=int, help="tokens at once (default: one window)")
    for axis in AXES:
        add(f"--{axis}", type=int, default=1, metavar="N", help=f"{axis} parallelism, under torchrun")
    add_dtype(parser)


def run(options: Namespace) -> None:
    problems = [] if options.seq_len >= 2 else [f"--seq-len {options.seq_len}: at least 2."]
    if not (Path(options.model) / "config.json").is_file():
        problems.append(
            f"{options.model}: no Hugging Face directory. A run is exported first: megacpt export RUN_DIR --output DIR."
        )
    if problems:
        raise ConfigError(problems, "the arguments")
    from megacpt.config.sections.parallel import Parallel
    from megacpt.evaluate.score import score
    from megacpt.train.standalone import open_model

    score(
        open_model(options.model, options.dtype, Parallel(**{axis: getattr(options, axis) for axis in AXES})),
        options.prefix,
        Path(options.output),
        seq_len=options.seq_len,
        micro_batch_tokens=options.micro_batch_tokens or options.seq_len,
        model_dir=options.model,
    )
