"""The facts of a run as the lines that `check` prints."""

from collections.abc import Iterator
from itertools import groupby

from megacpt.config.quantity import show_tokens
from megacpt.log import short_number
from megacpt.plan.facts import DomainFacts, Facts, LayoutFacts, ReductionFacts, StageFacts


def describe(facts: Facts) -> list[str]:
    """A line for each fact, in the order in which a run meets them."""
    return [
        f"run {facts.name} in {facts.directory}, start {facts.start}, seed {facts.seed}",
        *_model(facts),
        *_stages(facts),
        *_domains(facts.domains, facts.stages),
        *_layouts(facts.layouts),
        *_memory(facts.stages),
        f"total {show_tokens(facts.tokens)} tokens, {facts.steps} steps",
    ]


def _model(facts: Facts) -> Iterator[str]:
    if model := facts.model:
        yield (
            f"model {short_number(model.parameters)} parameters, {model.layers} layers, vocabulary {model.vocabulary} (padded "
            f"{model.padded_vocabulary}), rope {model.rope_type} theta {model.rope_theta:g}"
        )


def _stages(facts: Facts) -> Iterator[str]:
    before = facts.stages[0].layout
    yield f"layout {before} on {facts.world_size} processes"
    for stage in facts.stages:
        if stage.layout != before:
            yield f"layout from stage {stage.name} on: {stage.layout}"
            before = stage.layout
        sizes = " -> ".join(map(show_tokens, stage.batch_tokens))
        yield (
            f"stage {stage.name}: {show_tokens(stage.tokens)} tokens in {stage.steps} steps of {sizes} tokens, rows of {stage.seq_len}, "
            f"{stage.micro_batches} micro-batches of {show_tokens(stage.micro_batch_tokens)} on {stage.layout.data} data ranks, lr "
            f"{stage.first_rate:.3g} .. {stage.last_rate:.3g}"
        )
        if stage.trained:
            trained, held = map(short_number, stage.trained)
            yield f"stage {stage.name}: trains {trained} parameters; {held} have masters and moments"
        if stage.filling > 0:
            yield f"stage {stage.name}: {filling(stage)}"


def filling(stage: StageFacts) -> str:
    return (
        f"{stage.filling:.0%} of the micro-batch rows are filling ({stage.rows} rows over {stage.micro_batches} x "
        f"{stage.micro_batch_rows})"
    )


def _domains(domains: tuple[DomainFacts, ...], stages: tuple[StageFacts, ...]) -> Iterator[str]:
    for domain in domains:
        if order := domain.curriculum:
            way = "rising" if order.ascending else "falling"
            yield f"domain {domain.name}: in the order of {way} {order.by}, {order.buckets} buckets"
    for stage in stages:
        if stage.objective:
            yield f"stage {stage.name}: objective {stage.objective}"
        if stage.gates:
            yield f"stage {stage.name} ends with the gates {', '.join(stage.gates)}; not passed: {stage.on_fail}"
    for domain in domains:
        if domain.tokens is not None and domain.taken:
            taken = f"{short_number(domain.taken)} taken = {domain.epochs:.2f} epochs"
            yield f"domain {domain.name}: {show_tokens(domain.tokens)} tokens, {taken}"


def _layouts(layouts: tuple[LayoutFacts, ...]) -> Iterator[str]:
    for facts in layouts:
        lines = [*_pipeline(facts), *_reduction(facts.reduction)]
        if len(layouts) == 1:
            yield from lines
        elif lines:
            yield f"{facts.key}:"
            yield from (f"  {line}" for line in lines)


def _pipeline(facts: LayoutFacts) -> Iterator[str]:
    if not facts.pp_layers:
        return
    runs = [(count, len(list(same))) for count, same in groupby(facts.pp_layers)]
    shown = ", ".join(f"{times} x {count}" if times > 2 else ", ".join([str(count)] * times) for count, times in runs)
    yield f"pipeline {facts.schedule}, layers of the {len(facts.pp_layers)} stages: {shown}"
    for found in facts.schedules:
        yield (
            f"  {found.micro_batches} micro-batches: bubble {found.bubble:.1%}, at most {found.peak_activations} stage activations on a "
            "rank"
        )


def _reduction(facts: ReductionFacts | None) -> Iterator[str]:
    if facts:
        yield (
            f'gradients, precision.reduce = "{facts.chosen}": "step" keeps {facts.kept_gib:.3g} GiB a rank and sends '
            f'{facts.step_gib:.3g} GiB a step, "micro_batch" sends up to {facts.micro_batch_gib:.3g} GiB a step'
        )


def _memory(stages: tuple[StageFacts, ...]) -> Iterator[str]:
    """A line where the need differs from that of the stage before."""
    before = ""
    for stage in stages:
        if need := stage.memory:
            held = f" ({need})" if str(need) else ""
            now = f"at most {need.gib:.1f} GiB on pipeline rank {need.rank}{held}"
            if now != before:
                yield f"memory of a card from stage {stage.name} on: {now}"
            before = now
