"""The verbs. Thin: each reads its arguments, calls its room, prints. A verb that needs no torch imports none."""

import argparse
import errno
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megacpt import __version__
from megacpt.errors import UNFINISHED, ConfigError, MegacptError, SaveError
from megacpt.files import DISK_ERRORS, disk_told, write_atomically
from megacpt.log import printable, say

_OVERRIDES = "Any key of the recipe can be set with --section.key=value, a stage's with --stages.NAME.key=value."


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a verb and leaves with its exit code: 0 done, 2 arguments or recipe, 3 stopped where the end was required, 75 may be tried
    again, 76 damaged data or checkpoint."""
    try:
        code = run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        sys.exit(code)
    except MegacptError as error:
        say(f"megacpt: {printable(str(error))}")
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno == errno.EPIPE or (error.errno == errno.EIO and _terminal_is_gone()):
            os._exit(128 + signal.SIGPIPE)  # as of any program that such an end stops: its work may not be done
        if error.errno not in DISK_ERRORS:
            raise
        say(f"megacpt: {printable(disk_told(error))}")
        sys.exit(SaveError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _terminal_is_gone() -> bool:
    """Whether what cannot be written to is our terminal, and no disk."""
    try:
        os.write(1, b"\n")
    except OSError:
        return True
    return False


def run(arguments: Sequence[str]) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not getattr(options, "takes_overrides", False):
        parser.error(f"unknown arguments for {options.verb}: {' '.join(rest)}")
    options.overrides = rest
    return options.call(options) or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megacpt",
        description="Continual pre-training of Llama, Qwen2, Qwen3 and Mistral models: text in, Hugging Face checkpoint out.",
    )
    parser.add_argument("--version", action="version", version=f"megacpt {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, call: Callable, text: str, recipe: bool = False) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name, help=text, description=text + (f" {_OVERRIDES}" if recipe else ""), allow_abbrev=False
        )
        sub.set_defaults(call=call, takes_overrides=recipe)
        return sub

    for verbs_of in (_data_verbs, _run_verbs, _model_verbs):
        verbs_of(verb)
    return parser


def _data_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Text, tokens, vocabularies."""
    p = verb("prepare", _prepare, "Tokenize jsonl, parquet or plain text into PREFIX.bin, PREFIX.idx and PREFIX.json.")
    p.add_argument("inputs", nargs="*", metavar="INPUT", help="files or folders; .gz and .zst too")
    p.add_argument("--tokenizer", help="Hugging Face directory, tokenizer.json or sentencepiece .model")
    p.add_argument(
        "--verify", action="store_true", help="compare prepared data (INPUT: its prefixes) with its checksums"
    )
    p.add_argument("--output", metavar="PREFIX", help="prefix of the output; parent folders are made")
    p.add_argument("--adopt", metavar="PREFIX", help="write a manifest for a .bin/.idx that Megatron's tools made")
    p.add_argument("--workers", type=int, default=0, help="processes (default: one a core)")
    p.add_argument("--part", metavar="I/N", help="prepare part I of N (from 0) into PREFIX-0000I")
    p.add_argument("--text-field", default="text", help="field or column with the text (default: text)")
    p.add_argument(
        "--domain-field", metavar="FIELD", help="keep this field (a topic, a source) as each document's label"
    )
    p.add_argument("--format", choices=["auto", "jsonl", "parquet", "text"], default="auto", help="default: by suffix")
    p.add_argument("--no-bos", action="store_true", help="do not prepend BOS where the tokenizer itself would")
    p.add_argument("--no-eos", action="store_true", help="do not append the end-of-text token to each document")
    p.add_argument("--eos-token", help="the end-of-text token, where the tokenizer does not name it")
    p.add_argument("--vocab-size", type=int, help="the model's vocabulary, if it is not the tokenizer's")
    p.add_argument("--max-bad-lines", type=int, default=10, help="unreadable records that are skipped (default: 10)")
    p.add_argument(
        "--engine",
        choices=["tokenizers", "gigatoken"],
        default="tokenizers",
        help="gigatoken is optional; its ids are checked on the first thousand documents of each worker",
    )
    p.add_argument("--overwrite", action="store_true", help="replace an existing output")

    p = verb("topics", _topics, "Train a classifier of topics from labelled documents, label others with it.")
    actions = p.add_subparsers(dest="action", required=True, metavar="train|label")
    for name, text in (("train", "from labelled documents"), ("label", "write documents with their topic")):
        q = actions.add_parser(name, help=text, allow_abbrev=False)
        q.add_argument("inputs", nargs="+", metavar="INPUT", help="jsonl or parquet, .gz and .zst too")
        q.add_argument("--output", required=True, metavar="DIR" if name == "train" else "FILE.jsonl")
        q.add_argument("--text-field", default="text")
        q.add_argument("--label-field", default="topic")
        if name == "train":
            q.add_argument("--features", type=int, default=1 << 18, help="hashed features (default: 262144)")
            q.add_argument("--epochs", type=int, default=20)
            q.add_argument("--seed", type=int, default=1)
        else:
            q.add_argument("--model", required=True, metavar="DIR", help="what `topics train` wrote")

    p = verb("vocab", _vocab, "Train a tokenizer, append it to an old one, grow a model's vocabulary to it.")
    actions = p.add_subparsers(dest="action", required=True, metavar="train|merge|expand")
    q = actions.add_parser("train", help="a tokenizer on text", allow_abbrev=False)
    q.add_argument("inputs", nargs="+", metavar="INPUT", help="jsonl, parquet or text, .gz and .zst too")
    q.add_argument("--output", required=True, metavar="DIR")
    q.add_argument(
        "--type",
        choices=["bpe", "sentencepiece"],
        default="bpe",
        help="byte-level BPE as Llama 3 (default), or as Llama 2",
    )
    q.add_argument("--vocab-size", type=int, default=32000)
    q.add_argument("--eos-token", default="<|end_of_text|>", help="bpe: the end-of-text token")
    q.add_argument("--sample-bytes", type=int, help="read at most this much text")
    q = actions.add_parser(
        "merge", help="append a new tokenizer's entries to an old one, whose ids stay", allow_abbrev=False
    )
    q.add_argument("base", metavar="OLD_DIR")
    q.add_argument("new", metavar="NEW_DIR")
    q.add_argument("--output", required=True, metavar="DIR")
    q.add_argument("--most", type=int, help="append at most this many entries")
    q.add_argument(
        "--sample", nargs="*", default=[], metavar="TEXT", help="files on which characters a token are reported"
    )
    q = actions.add_parser("expand", help="a model for the larger tokenizer", allow_abbrev=False)
    q.add_argument("model", metavar="MODEL_DIR")
    q.add_argument("tokenizer", metavar="TOKENIZER_DIR")
    q.add_argument("--output", required=True, metavar="DIR")
    q.add_argument(
        "--init",
        choices=["mean", "weighted"],
        default="mean",
        help="new rows: mean of the old parts' rows, or weighted by length",
    )
    q.add_argument(
        "--sample", nargs="*", default=[], metavar="TEXT", help="files on which characters a token are reported"
    )


def _run_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """What a recipe describes."""
    p = verb("check", _check, "Validate a recipe and print the resolved run.", recipe=True)
    p.add_argument("recipe")
    p.add_argument("--world-size", type=int, help="processes (default: the product of the recipe's degrees)")
    p.add_argument("--no-files", action="store_true", help="do not read model files and data")
    p.add_argument(
        "--device-memory",
        type=float,
        default=79.1,
        metavar="GIB",
        help="of one card, which every stage must fit (default: 79.1, an 80 GB card; an H200 has 139.8)",
    )
    p.add_argument("--timeline", action="store_true", help="print what happens after which step")
    p.add_argument("--schedule-picture", metavar="FILE.svg", help="draw the pipeline's timeline of the largest step")

    p = verb("index", _index, "Build the packing indices of a recipe before the GPUs start.", recipe=True)
    p.add_argument("recipe")
    p.add_argument("--workers", type=int, default=0, help="processes (default: one a core)")

    p = verb(
        "inspect", _inspect, "Show the exact global batch of a step, with what the run has decided so far.", recipe=True
    )
    p.add_argument("recipe")
    p.add_argument("--step", type=int, required=True, help="step number, from 1")
    p.add_argument("--decode", action="store_true", help="print the text of every document in the batch")
    p.add_argument("--output", metavar="FILE.npz", help="write the arrays")

    p = verb("train", _train, "Train; resumes by itself when the run directory holds a checkpoint.", recipe=True)
    p.add_argument("recipe")
    p.add_argument(
        "--require",
        choices=["finished"],
        help="leave with 3 where a run that is stopped before its end leaves with 0: what comes next needs the end",
    )
    _dtype(p)

    p = verb(
        "supervise",
        _supervise,
        "Run a training command again and again until its run is finished: megacpt supervise -- bash launch/torchrun.sh RECIPE",
    )
    p.add_argument(
        "--max-restarts", type=int, default=10, metavar="N", help="attempts in a row without a new checkpoint"
    )
    p.add_argument("--backoff", type=float, default=5.0, metavar="SECONDS", help="pause before the first of them")
    p.add_argument("--min-nodes", type=int, default=1, metavar="N", help="on Slurm: go on with as few as this")
    p.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")

    p = verb("checkpoint", _checkpoint, "List the checkpoints of a run, or verify every byte of them.")
    p.add_argument("action", choices=["list", "verify"])
    p.add_argument("run", metavar="RUN_DIR")

    p = verb("assess", _assess, "Anneal from a checkpoint with and without candidate data, and compare.", recipe=True)
    p.add_argument(
        "recipe", help="model.pretrained is the checkpoint's export, the last stage's mixture the default mix"
    )
    p.add_argument(
        "--candidates", required=True, metavar="A,B", help="domains of [data] that are not in the default mix"
    )
    p.add_argument("--tokens", required=True, help="length of each annealing, for example 40B")
    p.add_argument("--directory", required=True, metavar="DIR", help="recipes and runs go there; a second call goes on")
    p.add_argument("--share", type=float, default=0.3, help="of the candidate (default: 0.3)")
    p.add_argument(
        "--launch", metavar="COMMAND", help='what starts megacpt, for example "torchrun --nproc-per-node 8 -m megacpt"'
    )

    p = verb(
        "doctor", _doctor, "Versions, devices, backends, NCCL, disk; under torchrun, the speed of every parallel axis."
    )
    for axis in ("tensor", "context", "pipeline", "data-replicate"):
        p.add_argument(f"--{axis}", type=int, default=1, metavar="N", help="degree of the layout whose axes are timed")
    p.add_argument(
        "--world-size", type=int, metavar="N", help="ranks of the run that is meant (default: those that are here)"
    )


def _model_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """What comes of a run."""
    p = verb("score", _score, "Mean loss of every document of a prepared set with a model.")
    p.add_argument("model", metavar="MODEL_DIR")
    p.add_argument("prefix", metavar="PREFIX")
    p.add_argument("--output", required=True, metavar="FILE.jsonl")
    p.add_argument("--seq-len", type=int, default=8192, help="window of long documents (default: 8192)")
    p.add_argument("--micro-batch-tokens", type=int, help="tokens at once (default: one window)")
    for axis in ("tensor", "context", "pipeline"):
        p.add_argument(f"--{axis}", type=int, default=1, metavar="N", help=f"{axis} parallelism, under torchrun")
    _dtype(p)

    p = verb(
        "evaluate", _evaluate, "Validation loss by domain, needle, multiple choice of a model or run.", recipe=True
    )
    p.add_argument("model", metavar="MODEL_DIR|RUN_DIR")
    p.add_argument("recipe")
    p.add_argument("--step", type=int, help="checkpoint of a run (default: the newest)")
    p.add_argument("--output", metavar="FILE.json")
    _dtype(p)

    p = verb("export", _export, "Write a checkpoint as a complete Hugging Face directory.")
    p.add_argument("run", metavar="RUN_DIR")
    p.add_argument("--output", required=True, metavar="DIR")
    p.add_argument("--step", type=int, help="default: the newest sound checkpoint")
    p.add_argument("--dtype", choices=["bfloat16", "float16", "float32", "float64"], help="default: what was imported")
    p.add_argument("--average", action="store_true", help="the average that a stage made, in place of a checkpoint")

    p = verb("average", _average, "Write the mean of some checkpoints as a Hugging Face directory.")
    p.add_argument("run", metavar="RUN_DIR")
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--steps", metavar="A,B,C", help="these checkpoints")
    which.add_argument("--last", type=int, metavar="K", help="the K newest")
    p.add_argument("--output", required=True, metavar="DIR")
    p.add_argument(
        "--decay",
        choices=["mean", "linear", "cosine", "1-sqrt"],
        default="mean",
        help="equal weights, or those that stand for a decay of the learning rate over the checkpoints (default: mean)",
    )
    p.add_argument("--dtype", choices=["bfloat16", "float16", "float32", "float64"], help="default: what was imported")


def _dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32", "float64"],
        help="type of the computation (default: bfloat16 on a GPU, float32 on a CPU)",
    )


def _load(options, with_dtype: bool = False):
    from megacpt.config.load import load_recipe

    flags = list(options.overrides)
    if with_dtype and options.dtype:
        flags.append(f"--precision.compute={options.dtype}")
    return load_recipe(options.recipe, flags)


def _checked(options, recipe, world_size: int) -> None:
    """Stops with all problems; prints warnings from rank 0."""
    from megacpt.log import warn
    from megacpt.plan.check import check

    report = check(recipe, world_size)
    if report.problems and int(os.environ.get("RANK", "0")):  # every rank finds the same; rank 0 says it
        time.sleep(10)  # torchrun ends all when the first leaves, and rank 0 may not have said it yet
        sys.exit(ConfigError.exit_code)
    if report.problems:
        raise ConfigError(report.problems, f"{options.recipe} (world size {world_size})")
    for warning in report.warnings:
        warn(warning)


def _prepare(options) -> None:
    from megacpt.data.join import adopt
    from megacpt.data.prepare import Options, prepare

    if options.verify:
        return _verify_data(options.inputs, bool(options.output or options.adopt))
    if not options.tokenizer:
        raise ConfigError(["--tokenizer: give a directory, tokenizer.json or sentencepiece .model."], "the arguments")
    if options.adopt:
        if options.inputs or options.output:
            raise ConfigError(["--adopt PREFIX: takes no INPUT and no --output."], "the arguments")
        manifest = adopt(options.adopt, options.tokenizer, options.eos_token)
        prefix = options.adopt
    else:
        problems = [] if options.inputs else ["INPUT: give files or folders."]
        problems += [] if options.output else ["--output: give the prefix of the output."]
        part, trouble = _part(options.part)
        if options.workers < 0:
            trouble.append(f"--workers {options.workers}: must not be negative.")
        if problems + trouble:
            raise ConfigError(problems + trouble, "the arguments")
        settings = Options(
            options.tokenizer,
            options.text_field,
            options.format,
            not options.no_bos,
            not options.no_eos,
            options.eos_token,
            options.engine,
            options.max_bad_lines,
            options.vocab_size,
            options.domain_field,
        )
        manifest = prepare(options.inputs, options.output, settings, options.workers, part, options.overwrite)
        prefix = options.output if part is None else f"{options.output}-{part[0]:05d}"
    print(
        f"{prefix}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens ({manifest['dtype']}), "
        f"{manifest['bin']['bytes']:,} bytes"
    )


def _verify_data(prefixes: list[str], more: bool) -> None:
    from megacpt.data.manifest import expand_paths, verify_data

    if more or not prefixes:
        raise ConfigError(
            ["--verify: takes prefixes of prepared data, and neither --output nor --adopt."], "the arguments"
        )
    for prefix in expand_paths(prefixes):
        manifest = verify_data(prefix)
        print(f"{prefix}: sound, {manifest['documents']:,} documents, {manifest['tokens']:,} tokens")


def _part(text: str | None) -> tuple[tuple[int, int] | None, list[str]]:
    if text is None:
        return None, []
    index, slash, count = text.partition("/")
    if slash and index.isdigit() and count.isdigit() and int(index) < int(count):
        return (int(index), int(count)), []
    return None, [f"--part {text}: write I/N with I from 0 to N - 1, for example 0/8."]


def _check(options) -> int:
    from megacpt.plan.check import check, schedule_svg

    recipe = _load(options)
    least = math.lcm(
        *(p.tensor * p.context * p.pipeline * p.data_replicate * (p.data_shard or 1) for p in recipe.layouts.values())
    )
    world_size = options.world_size or int(os.environ.get("WORLD_SIZE", least))
    report = check(recipe, world_size, not options.no_files, options.device_memory)
    if report.problems:
        raise ConfigError(report.problems, f"{options.recipe} (world size {world_size})")
    print("\n".join([*report.lines, *(f"warning: {warning}" for warning in report.warnings)]))
    if options.timeline:
        from megacpt.config.clock import Clock
        from megacpt.config.timeline import folded, timeline

        print("\n".join(folded(timeline(recipe, Clock(recipe)), recipe)))
    if options.schedule_picture:
        write_atomically(options.schedule_picture, schedule_svg(recipe, world_size, files=not options.no_files))
        print(f"written {options.schedule_picture}")
    return 0


def _index(options) -> None:
    from megacpt.data.loader import open_domains, selection_of
    from megacpt.data.packing import open_index

    recipe = _load(options)
    workers = options.workers or os.cpu_count() or 1
    domains = open_domains(recipe, list(recipe.data))
    validated = {name for validation in recipe.validation for name in validation.domains}
    for seq_len in sorted({stage.seq_len for stage in recipe.stages}):
        trained = {
            name for stage in recipe.stages if stage.seq_len == seq_len for name, w in stage.mixture.items() if w > 0
        }
        for name in recipe.data:
            for holdout in (False, True):
                if name in (validated if holdout else trained):
                    selection = selection_of(recipe, name, seq_len, holdout)
                    index = open_index(domains[name], selection, recipe.packing.directory, workers)
                    print(
                        f"{name} seq_len {seq_len}{' held out' if holdout else ''}: {index.num_rows:,} rows, "
                        f"{index.num_pieces:,} documents or parts of documents"
                    )


def _inspect(options) -> None:
    from megacpt.checkpoint.manifest import decisions_of_run
    from megacpt.config.clock import Clock
    from megacpt.config.decisions import extensions_of
    from megacpt.data.loader import StageData, mixtures, open_domains, pad_token
    from megacpt.model.config import config_of

    recipe = _load(options)
    _checked(options, recipe, 1)
    decisions = decisions_of_run(Path(recipe.directory))
    clock = Clock(recipe, extensions_of(decisions))
    if not 1 <= options.step <= clock.num_steps:
        raise ConfigError([f"--step {options.step}: the recipe has steps 1 to {clock.num_steps}."], "the arguments")
    step = clock.step(options.step)
    stage, model = recipe.stages[step.stage], recipe.model
    config = config_of(model)
    domains = open_domains(recipe, list(stage.mixture))
    pad = pad_token(domains, config.eos_token_id)
    data = StageData(recipe, stage, mixtures(recipe, clock, decisions)[step.stage], domains, pad, config.vocab_size)
    picks = data.picks(step.first_sequence, step.rows)
    batch = data.batch(picks)
    counts = {name: batch.domain.count(name) for name in stage.mixture}
    print(
        f"step {step.number}, stage {stage.name}: {step.rows} rows of {step.seq_len}, tokens {step.tokens_before:,} to "
        f"{step.tokens_after:,}, {len(batch.document_starts)} documents, {(batch.labels >= 0).sum():,} labels, rows by domain {counts}"
    )
    if options.decode:
        from megacpt.data.tokenizer import Tokenizer

        tokenizer = Tokenizer(model.tokenizer or model.pretrained)
        flat, edges = batch.tokens.reshape(-1), [*batch.document_starts.tolist(), batch.tokens.size]
        for row, pick in enumerate(picks):
            print(f"--- row {row}: domain {pick.domain}, epoch {pick.epoch}, packed row {pick.row}")
            for i in range(batch.row_offsets[row], batch.row_offsets[row + 1]):
                print(f"[{edges[i + 1] - edges[i]} tokens] {tokenizer.decode(flat[edges[i] : edges[i + 1]])!r}")
    if options.output:
        import numpy as np

        np.savez(
            options.output,
            tokens=batch.tokens,
            labels=batch.labels,
            positions=batch.positions,
            document_starts=batch.document_starts,
            row_offsets=batch.row_offsets,
            domain=np.array(batch.domain),
        )
        print(f"written {options.output}")


def _train(options) -> int:
    from megacpt.log import info
    from megacpt.survive.watchdog import tell_supervisor

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal is closed, and the run goes on
    recipe = _load(options, with_dtype=True)
    try:
        _checked(options, recipe, int(os.environ.get("WORLD_SIZE", "1")))
    except ConfigError as error:
        tell_supervisor(Path(recipe.directory), error)
        raise
    from megacpt.train.loop import train

    status = train(recipe)
    if status == "finished":
        info(
            f"finished: {recipe.directory}. Export: megacpt export {recipe.directory} --output {recipe.directory}/export"
        )
        return 0
    info(f"{status}: {recipe.directory} is saved and not finished. The same command goes on from there.")
    return UNFINISHED if options.require else 0


def _assess(options) -> None:
    from megacpt.config.quantity import parse_tokens
    from megacpt.plan.assess import assess, table

    recipe = _load(options)
    try:
        tokens = parse_tokens(options.tokens)
    except ValueError as error:
        raise ConfigError([f"--tokens {options.tokens}: {error}."], "the arguments") from None
    if not 0 < options.share < 1:
        raise ConfigError([f"--share {options.share}: between 0 and 1."], "the arguments")
    candidates = [name for name in options.candidates.split(",") if name]
    print("\n".join(table(assess(recipe, candidates, options.share, tokens, Path(options.directory), options.launch))))


def _score(options) -> None:
    from megacpt.config.sections.parallel import Parallel
    from megacpt.evaluate.score import score
    from megacpt.train.standalone import open_model

    if options.seq_len < 2:
        raise ConfigError([f"--seq-len {options.seq_len}: at least 2."], "the arguments")
    if not (Path(options.model) / "config.json").is_file():
        raise ConfigError(
            [
                f"{options.model}: no Hugging Face directory. A run is exported first: megacpt export RUN_DIR --output DIR."
            ],
            "the arguments",
        )
    parallel = Parallel(tensor=options.tensor, context=options.context, pipeline=options.pipeline)
    model = open_model(options.model, options.dtype, parallel)
    score(
        model,
        options.prefix,
        Path(options.output),
        options.seq_len,
        options.micro_batch_tokens or options.seq_len,
        options.model,
    )


def _evaluate(options) -> None:
    recipe = _load(options)
    if not recipe.validation and not recipe.gates:
        raise ConfigError([f"{options.recipe}: has no [[validation]] and no [gates]."], "the arguments")
    from megacpt.log import is_rank0
    from megacpt.survive.run_directory import plain_numbers
    from megacpt.train.standalone import evaluate

    results = evaluate(options.model, recipe, options.dtype, options.step)
    if is_rank0():
        for name, result in results.items():
            if name != "gates":
                print(f"{name}: loss {result['loss']:.4f}, perplexity {result['perplexity']:.2f}")
        for gate, numbers in results.get("gates", {}).items():
            print(f"gate {gate}: {json.dumps(numbers)}")
        if options.output:
            write_atomically(options.output, json.dumps(plain_numbers(results), indent=1) + "\n")


def _export(options) -> None:
    from megacpt.checkpoint.export import export

    step = export(Path(options.run), Path(options.output), options.step, options.dtype, options.average)
    print(f"{options.output}: the model of {options.run} at step {step}")


def _topics(options) -> None:
    from megacpt.data import topics

    output, fields = Path(options.output), (options.text_field, options.label_field)
    if options.action == "train":
        if options.features < 1024 or options.features & (options.features - 1):
            raise ConfigError([f"--features {options.features}: a power of two of at least 1024."], "the arguments")
        found = topics.train(options.inputs, output, *fields, options.features, options.seed, options.epochs)
        print(f"{output}: {found['examples']:,} examples, accuracy {found['accuracy']:.3f} on a tenth held out")
        for name, value in found["by_topic"].items():
            print(f"  {name}: {value:.3f}")
        return
    for name, count in sorted(topics.label(options.inputs, Path(options.model), output, *fields).items()):
        print(f"{name}: {count:,} documents")


def _vocab(options) -> None:
    from megacpt.data import vocabulary
    from megacpt.data.tokenizer import Tokenizer

    output = Path(options.output)
    if options.action == "train":
        if options.vocab_size < 300:
            raise ConfigError(
                [f"--vocab-size {options.vocab_size}: at least 300 (256 bytes and some)."], "the arguments"
            )
        size = vocabulary.train(
            options.inputs, output, options.type, options.vocab_size, options.eos_token, options.sample_bytes
        )
        print(f"{output}: {size:,} entries")
        return
    if options.action == "merge":
        before, after = vocabulary.merge(Path(options.base), Path(options.new), output, options.most)
        old = options.base
    else:
        from megacpt.model.vocab import expand

        before, after = expand(Path(options.model), Path(options.tokenizer), output, options.init)
        old = options.model
    print(f"{output}: {before:,} -> {after:,} entries")
    for sample in options.sample:
        texts = list(vocabulary.texts_of([sample], most_bytes=1 << 22))
        rates = [vocabulary.characters_per_token(Tokenizer(path), texts) for path in (old, output)]
        print(f"{sample}: {rates[0]:.3f} -> {rates[1]:.3f} characters a token ({rates[1] / rates[0] - 1:+.1%})")


def _average(options) -> None:
    from megacpt.checkpoint.export import export_average

    try:
        steps = [int(step) for step in options.steps.split(",")] if options.steps else None
    except ValueError:
        raise ConfigError(
            [f"--steps {options.steps}: write step numbers, for example 100,200,300."], "the arguments"
        ) from None
    arguments = (steps, options.last, options.decay, options.dtype)
    averaged = export_average(Path(options.run), Path(options.output), *arguments)
    print(f"{options.output}: the average ({options.decay}) of steps {', '.join(map(str, averaged))} of {options.run}")


def _checkpoint(options) -> int:
    from megacpt.checkpoint.manifest import directory_name, list_steps, verify
    from megacpt.errors import CheckpointError

    checkpoints, bad = Path(options.run) / "checkpoints", 0
    for step in list_steps(checkpoints):
        directory = checkpoints / directory_name(step)
        line = str(directory)
        if options.action == "verify":
            try:
                line += f": sound, {verify(directory).tokens:,} tokens"
            except CheckpointError as error:
                bad, line = bad + 1, f"{line}: DAMAGED: {error}"
        print(line)
    if not list_steps(checkpoints):
        raise ConfigError([f"{checkpoints}: no checkpoint there."], "the arguments")
    return 76 if bad else 0


def _supervise(options) -> int:
    from megacpt.survive.supervise import Options, supervise

    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if options.max_restarts < 0 or not 0 <= options.backoff <= 86400 or options.min_nodes < 1:
        raise ConfigError(
            ["--max-restarts: not negative; --backoff: from 0 to 86400 seconds; --min-nodes: at least 1."],
            "the arguments",
        )
    return supervise(command, Options(options.max_restarts, options.backoff, options.min_nodes))


def _doctor(options) -> None:
    from megacpt.doctor import axes, report

    size = int(os.environ.get("WORLD_SIZE", "1"))
    if int(os.environ.get("RANK", "0")) == 0:
        print("\n".join(report(options.world_size or size)))
    if size > 1:
        from megacpt.config.sections.parallel import Parallel

        degrees = {name: getattr(options, name) for name in ("tensor", "context", "pipeline", "data_replicate")}
        lines = axes(Parallel(**degrees))
        if int(os.environ["RANK"]) == 0:
            print("\n".join(lines))
