"""Tokenize jsonl, parquet or plain text into PREFIX.bin, PREFIX.idx and PREFIX.json."""

from argparse import ArgumentParser, Namespace
from typing import Any

from megacpt.errors import ConfigError


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="files or folders; .gz and .zst too")
    add("--tokenizer", help="Hugging Face directory, tokenizer.json or sentencepiece .model")
    add("--verify", action="store_true", help="compare prepared data (INPUT: its prefixes) with its checksums")
    add("--output", metavar="PREFIX", help="prefix of the output; parent folders are made")
    add("--adopt", metavar="PREFIX", help="write a manifest for a .bin/.idx that Megatron's tools made")
    add("--workers", type=int, default=0, help="processes (default: one a core)")
    add("--part", metavar="I/N", help="prepare part I of N (from 0) into PREFIX-0000I")
    add("--text-field", default="text", help="field or column with the text (default: text)")
    add("--domain-field", metavar="FIELD", help="keep this field (a topic, a source) as each document's label")
    add("--segments-field", metavar="FIELD", help='in place of the text: a list of {"text": ..., "weight": ...}')
    add("--prompt-field", metavar="FIELD", help="in place of the text: a prompt, whose tokens weigh 0 in the loss, and")
    add("--completion-field", metavar="FIELD", help="the completion behind the prompt, whose tokens weigh 1")
    add(
        "--item-field",
        metavar="FIELD",
        help="documents that follow one another with the same value here (a pair, a group) stay in one row",
    )
    add("--format", choices=["auto", "jsonl", "parquet", "text"], default="auto", help="default: by suffix")
    add("--no-bos", action="store_true", help="do not prepend BOS where the tokenizer itself would")
    add("--no-eos", action="store_true", help="do not append the end-of-text token to each document")
    add("--eos-token", help="the end-of-text token, where the tokenizer does not name it")
    add("--vocab-size", type=int, help="the model's vocabulary, if it is not the tokenizer's")
    add("--max-bad-lines", type=int, default=10, help="unreadable records that are skipped (default: 10)")
    add(
        "--engine",
        choices=["tokenizers", "gigatoken"],
        default="tokenizers",
        help="gigatoken is optional; its ids are checked on the first thousand documents of each worker",
    )
    add("--overwrite", action="store_true", help="replace an existing output")


def run(options: Namespace) -> None:
    if options.verify:
        _verify(options.inputs, bool(options.output or options.adopt))
        return
    if not options.tokenizer:
        raise ConfigError(["--tokenizer: give a directory, tokenizer.json or sentencepiece .model."], "the arguments")
    prefix, manifest = _adopt(options) if options.adopt else _prepare(options)
    print(
        f"{prefix}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens ({manifest['dtype']}), "
        f"{manifest['bin']['bytes']:,} bytes"
    )


def _adopt(options: Namespace) -> tuple[str, dict[str, Any]]:
    from megacpt.data.join import adopt

    if options.inputs or options.output:
        raise ConfigError(["--adopt PREFIX: takes no INPUT and no --output."], "the arguments")
    return options.adopt, adopt(options.adopt, options.tokenizer, options.eos_token)


def _prepare(options: Namespace) -> tuple[str, dict[str, Any]]:
    from megacpt.data.prepare import Options, prepare

    problems = [] if options.inputs else ["INPUT: give files or folders."]
    if not options.output:
        problems.append("--output: give the prefix of the output.")
    part = _part(options.part, problems)
    if options.workers < 0:
        problems.append(f"--workers {options.workers}: must not be negative.")
    if problems:
        raise ConfigError(problems, "the arguments")
    settings = Options(
        tokenizer=options.tokenizer,
        text_field=options.text_field,
        format=options.format,
        bos=not options.no_bos,
        eos=not options.no_eos,
        eos_token=options.eos_token,
        engine=options.engine,
        max_bad_lines=options.max_bad_lines,
        vocab_size=options.vocab_size,
        domain_field=options.domain_field,
        segments_field=options.segments_field,
        prompt_field=options.prompt_field,
        completion_field=options.completion_field,
        item_field=options.item_field,
    )
    manifest = prepare(options.inputs, options.output, settings, options.workers, part, options.overwrite)
    return options.output if part is None else f"{options.output}-{part[0]:05d}", manifest


def _part(text: str | None, problems: list[str]) -> tuple[int, int] | None:
    """(I, N) of I/N; what is not that is added to the problems."""
    if text is None:
        return None
    index, slash, count = text.partition("/")
    if slash and index.isdecimal() and count.isdecimal() and int(index) < int(count):
        return int(index), int(count)
    problems.append(f"--part {text}: write I/N with I from 0 to N - 1, for example 0/8.")
    return None


def _verify(prefixes: list[str], more: bool) -> None:
    from megacpt.data.manifest import expand_paths, verify_data

    if more or not prefixes:
        raise ConfigError(
            ["--verify: takes prefixes of prepared data, and neither --output nor --adopt."], "the arguments"
        )
    for prefix in expand_paths(prefixes):
        manifest = verify_data(prefix)
        print(f"{prefix}: sound, {manifest['documents']:,} documents, {manifest['tokens']:,} tokens")
