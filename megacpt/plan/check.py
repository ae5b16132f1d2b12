"""Everything that can be said of a recipe before a process starts: all problems at once, then the resolved run as text.
Imports no torch and no numpy; answers in a fraction of a second."""

from dataclasses import dataclass, field
from itertools import groupby

from megacpt.config.clock import Clock
from megacpt.config.layout import resolve_layout
from megacpt.config.merge import layout_keys, layouts_of, parallel_in, reduction_under, schedule_in
from megacpt.config.model import config_in_stage, frozen_names, load_model_config, shape_problems
from megacpt.config.quantity import show_tokens
from megacpt.config.recipe import Recipe
from megacpt.config.rules import problems_of, warnings_of
from megacpt.config.sections.model import Model
from megacpt.config.sections.parallel import Parallel
from megacpt.config.sections.stage import Stage
from megacpt.config.trainable import Trainable, trainable_in
from megacpt.data.curriculum import score_problems
from megacpt.data.manifest import expand_files, expand_paths, item_problems, make_room_for, read_manifest
from megacpt.data.questions import read_task
from megacpt.errors import ConfigError, DataError, MegacptError, Problem, nearest
from megacpt.family.base import ModelConfig
from megacpt.family.rope import least_theta, theta_by_rule
from megacpt.log import short_number
from megacpt.model.split import plan_pipeline, stage_weights
from megacpt.optim.schedule import rate_of_step
from megacpt.parallel.pipeline.simulate import simulate
from megacpt.plan.memory import RESERVE_GIB, Job, Peak, peak, rank_parameters, remedies
from megacpt.plan.picture import schedule_picture


@dataclass
class Report:
    """What `check` found."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def check(recipe: Recipe, world_size: int, files: bool = True, card_gib: float | None = None) -> Report:
    """Rules of the recipe, of the model's shape, of the data and of the card's memory together.

    Args:
        files: False leaves out what would be read from disk, and says so.
        card_gib: memory of one card, which every stage must fit; None asks for no limit.
    """
    report = Report(problems=problems_of(recipe, world_size))
    config = _model(recipe, report, files)
    tokens = _data(recipe, report, config) if files else {}
    if not files:
        report.warnings.append(Problem("", None, "--no-files: model files and data were not read."))
    elif not report.problems:
        report.problems += _tasks(recipe)
    report.warnings += warnings_of(recipe)
    if config:
        _model_rules(recipe, config, report)
    pipeline = _pipeline(recipe, world_size, config, report)
    memory = [] if report.problems else _memory(recipe, world_size, config, card_gib, report)
    if not report.problems:
        _resolved(recipe, world_size, config, tokens, report)
        report.lines[-1:-1] = pipeline + memory
    return report


def _tasks(recipe: Recipe) -> list[Problem]:
    """What is wrong with the question files of the gates."""
    problems = []
    for name, gate in recipe.gates.items():
        for task in getattr(gate, "tasks", []):
            try:
                read_task(task)
            except DataError as error:
                problems.append(Problem(f"gates.{name}.tasks", None, str(error)))
    return problems


def _model(recipe: Recipe, report: Report, files: bool) -> ModelConfig | None:
    try:
        return _known(recipe.model, files)
    except ConfigError as error:
        report.problems += [Problem("model", None, str(problem)) for problem in error.problems]
    return None


def _known(model: Model, files: bool) -> ModelConfig | None:
    """The model's shape, from disk only if `files`."""
    if model.architecture or (files and (model.pretrained or model.config)):
        return load_model_config(model)
    return load_model_config(Model(architecture=model.expect)) if model.expect else None


def _model_rules(recipe: Recipe, config: ModelConfig, report: Report) -> None:
    for key, parallel in layouts_of(recipe).items():
        found = shape_problems(config, parallel, recipe.model.vocab_multiple)
        report.problems += [Problem("", None, problem.replace("parallel", key, 1)) for problem in found]
    first = config
    for index, stage in enumerate(recipe.stages):
        try:
            config = config_in_stage(first, recipe.stages, index)
            frozen_names(stage.freeze, config)
        except ConfigError as error:
            report.problems += [
                p if p in report.problems else Problem("", None, f"stages.{stage.name}.{p}") for p in error.problems
            ]
            break
        longest = config.rope.longest
        if (
            longest and config.rope == first.rope and not recipe.model.rope
        ):  # what the checkpoint itself was trained for
            longest = max(longest, config.max_position_embeddings)
        if longest and stage.seq_len > longest:
            report.problems.append(
                Problem(
                    "",
                    None,
                    f"stages.{stage.name}.seq_len = {stage.seq_len}: the rotary embedding ({config.rope.type}, factor "
                    f"{config.rope.fields['factor']:g} x {config.rope.fields['original_max_position_embeddings']}) ends at {longest}. "
                    f"Nearest: {longest}; or set stages.{stage.name}.rope.",
                )
            )
        elif (
            not longest
            and stage.seq_len > config.max_position_embeddings
            and config.rope.theta < least_theta(stage.seq_len)
        ):
            ntk, twice = (theta_by_rule(rule, first, stage.seq_len) for rule in ("ntk", "ntk2"))
            report.warnings.append(
                Problem(
                    "",
                    None,
                    f"stages.{stage.name}: theta {config.rope.theta:g} is below {least_theta(stage.seq_len):.3g}, the bound for "
                    f"{stage.seq_len} tokens (the model was made for {config.max_position_embeddings}). By rule: {ntk:.3g} "
                    f'(rope.rule = "ntk") or {twice:.3g} ("ntk2").',
                )
            )


def micro_batch_counts(recipe: Recipe, parallel: Parallel, data_ranks: int) -> list[int]:
    """The different numbers of micro-batches that steps under a layout have."""
    counts = set()
    for stage in (stage for stage in recipe.stages if layout_keys(parallel_in(recipe, stage)) == parallel):
        micro = parallel_in(recipe, stage).micro_batch_tokens
        counts |= {max(1, -(-batch // (data_ranks * micro))) for _, batch in stage.batch_tokens}
    return sorted(counts)


def _pipeline(recipe: Recipe, world_size: int, config: ModelConfig | None, report: Report) -> list[str]:
    """Lines on stages, schedule and gradients; problems go to the report."""
    if config is None:
        if any(parallel.pipeline > 1 for parallel in layouts_of(recipe).values()):
            report.warnings.append(
                Problem(
                    "", None, "the model's number of layers is not known here: its split into stages was not checked."
                )
            )
        return []
    lines = []
    for key, parallel in layouts_of(recipe).items():
        found = _pipeline_of(recipe, key, parallel, world_size, config, report)
        lines += [f"{key}:", *(f"  {line}" for line in found)] if found and len(layouts_of(recipe)) > 1 else found
    return lines


def _pipeline_of(
    recipe: Recipe, key: str, parallel: Parallel, world_size: int, config: ModelConfig, report: Report
) -> list[str]:
    lines = []
    try:
        layout = resolve_layout(parallel, world_size)
    except ValueError:
        return []  # said already
    counts = micro_batch_counts(recipe, parallel, layout.data)
    try:
        plan = plan_pipeline(config.num_hidden_layers, parallel)
        schedules = {count: plan.schedule(count) for count in counts}
    except ValueError as error:
        report.problems.append(Problem(key, None, str(error)))
        return []
    if parallel.pipeline > 1:
        runs = [(count, len(list(same))) for count, same in groupby(map(len, plan.layers))]
        shown = ", ".join(
            f"{times} x {count}" if times > 2 else ", ".join([str(count)] * times) for count, times in runs
        )
        lines.append(f"pipeline {plan.name}, layers of the {len(plan.layers)} stages: {shown}")
        for count, schedule in schedules.items():
            found = simulate(schedule, stage_weights(plan, parallel))
            lines.append(
                f"  {count} micro-batches: bubble {found.bubble:.1%}, at most {max(found.peak)} stage activations on a rank"
            )
            if found.bubble > 0.5:
                report.warnings.append(
                    Problem(
                        "",
                        None,
                        f"with {count} micro-batches the pipeline's bubble is {found.bubble:.0%} of the busy time. More rows a step, "
                        "fewer pipeline ranks, or more virtual stages.",
                    )
                )
    sharers = layout.data * layout.context
    if sharers > 1:
        mine = [stage for stage in recipe.stages if layout_keys(parallel_in(recipe, stage)) == parallel]
        trained = frozenset().union(*(_trainable(recipe, stage, config).names for stage in mine))
        size = 4 * max(rank_parameters(config, plan, parallel, recipe.model.vocab_multiple, trained)) / 2**30
        most = max(counts)
        chosen = reduction_under(recipe, parallel)
        sent = size * (sharers - 1) / sharers
        lines.append(
            f'gradients, precision.reduce = "{chosen}": "step" keeps {size:.3g} GiB a rank and sends {sent:.3g} GiB a step, '
            f'"micro_batch" sends up to {most * sent:.3g} GiB a step'
        )
    return lines


def _memory(
    recipe: Recipe, world_size: int, config: ModelConfig | None, card_gib: float | None, report: Report
) -> list[str]:
    """A line for each stage that needs other memory than the one before it; stages that do not fit go to the problems."""
    if config is None:
        report.warnings.append("the model's shape is not known here: the memory of a step was not estimated.")
        return []
    lines: list[str] = []
    for stage in recipe.stages:
        job, need = fullest_step(recipe, stage, world_size, config)
        held = f" ({need})" if str(need) else ""
        line = f"at most {need.gib:.1f} GiB on pipeline rank {need.rank}{held}"
        if not lines or not lines[-1].endswith(line):
            lines.append(f"memory of a card from stage {stage.name} on: {line}")
        if card_gib is not None and need.gib + RESERVE_GIB > card_gib:
            report.problems.append(Problem("", None, over_memory(stage.name, job, need, card_gib)))
    return lines


def fullest_step(recipe: Recipe, stage: Stage, world_size: int, config: ModelConfig) -> tuple[Job, Peak]:
    """The step of a stage, over its batch ramp, that needs most memory, and its need."""
    parallel = parallel_in(recipe, stage)
    layout = resolve_layout(parallel, world_size)
    widths = {"float64": 8, "float32": 4, "bfloat16": 2, None: 2}  # auto: as on a GPU
    state = 2 if recipe.optimizer.state_dtype == "bfloat16" else 4
    counts = {max(1, -(-batch // (layout.data * parallel.micro_batch_tokens))) for _, batch in stage.batch_tokens}
    trainable = _trainable(recipe, stage, config)
    exact = bool(recipe.model.pretrained) and config.dtype in (recipe.precision.compute or "bfloat16", None)
    jobs = [
        Job(config, parallel, layout, stage.seq_len, count, reduction_under(recipe, parallel), recipe.model.vocab_multiple,
            widths[recipe.precision.compute], state, trainable, exact)
        for count in counts
    ]  # fmt: skip
    return max(((job, peak(job)) for job in jobs), key=lambda found: found[1].gib)


def _trainable(recipe: Recipe, stage: Stage, config: ModelConfig) -> Trainable:
    frozen = [frozen_names(each.freeze, config) for each in recipe.stages]
    return trainable_in(config, frozen, [each.name for each in recipe.stages].index(stage.name))


def over_memory(stage: str, job: Job, need: Peak, card_gib: float) -> str:
    """What to say of a stage that does not fit its cards."""
    fitting = remedies(job, card_gib)
    out = f"It fits with {'; or '.join(fitting)}." if fitting else "Share the model or the sequence over more ranks."
    return (
        f"stages.{stage}: pipeline rank {need.rank} needs {need.gib:.1f} GiB ({need}), and {RESERVE_GIB:g} GiB are left free for CUDA "
        f"and NCCL; a card has {card_gib:g} GiB (--device-memory). {out}"
    )


def schedule_svg(recipe: Recipe, world_size: int, files: bool = True) -> str:
    """The timeline of the step with the most micro-batches, under the layout with the most stages.

    Raises:
        ConfigError: if the model's layers are not known.
    """
    config = _known(recipe.model, files)
    if config is None:
        raise ConfigError(["--schedule-picture: the number of layers is not known without files. Set model.expect."])
    parallel = max(layouts_of(recipe).values(), key=lambda p: p.pipeline * p.virtual_stages)
    plan = plan_pipeline(config.num_hidden_layers, parallel)
    count = micro_batch_counts(recipe, parallel, resolve_layout(parallel, world_size).data)[-1]
    found = simulate(plan.schedule(count), stage_weights(plan, parallel))
    return schedule_picture(f"{plan.name}, {plan.ranks} ranks, {count} micro-batches", found, plan.placement)


def _data(recipe: Recipe, report: Report, config: ModelConfig | None) -> dict[str, int]:
    """Tokens of each domain, as the manifests have them."""
    tokens: dict[str, int] = {}
    prefixes: list[str] = []
    for name, domain in recipe.data.items():
        try:
            manifests = [read_manifest(prefix) for prefix in expand_paths(domain.paths)]
        except MegacptError as error:
            report.problems.append(Problem(f"data.{name}", None, str(error)))
            continue
        prefixes += expand_paths(domain.paths)
        for prefix, manifest in zip(expand_paths(domain.paths), manifests, strict=True):
            known = list(manifest.get("labels", {}).get("names", {}))
            unknown = [label for label in domain.labels if label not in known]
            if domain.labels and not known:
                report.problems.append(
                    Problem(
                        "",
                        None,
                        f"data.{name}.labels: {prefix} was prepared without labels. Prepare it with --domain-field.",
                    )
                )
            elif unknown and len(unknown) == len(domain.labels):
                report.problems.append(
                    Problem(
                        "", None, f"data.{name}.labels: {prefix} has no {unknown[0]!r}. {nearest(unknown[0], known)}"
                    )
                )
        whole = domain.max_tokens is None and not domain.labels and recipe.packing.long_items == "refuse"
        validated = any(name in validation.domains for validation in recipe.validation)
        rows = [stage.seq_len for stage in recipe.stages if whole and (validated or stage.mixture.get(name))]
        report.problems += [
            Problem(f"data.{name}", None, problem) for problem in item_problems(expand_paths(domain.paths), rows)
        ]
        if domain.order:
            try:
                found = score_problems(expand_files(domain.order.scores), expand_paths(domain.paths))
            except DataError as error:
                found = [str(error)]
            report.problems += [Problem(f"data.{name}.order.scores", None, problem) for problem in found]
        documents = sum(m["documents"] for m in manifests)
        tokens[name] = sum(m["tokens"] for m in manifests)
        if domain.labels:
            views = [m.get("labels", {}).get("names", {}).get(label) for m in manifests for label in domain.labels]
            documents, tokens[name] = (sum(view[key] for view in views if view) for key in ("documents", "tokens"))
        if domain.holdout_documents >= documents:
            report.problems.append(
                Problem(
                    "",
                    None,
                    f"data.{name}.holdout_documents = {domain.holdout_documents}: the domain has {documents} "
                    "documents; some must be left to train on.",
                )
            )
        if len({m["tokenizer"]["sha256"] for m in manifests}) > 1:
            report.problems.append(Problem(f"data.{name}", None, "its parts were prepared with different tokenizers."))
        largest = max(m["vocab_size"] for m in manifests)
        if config and largest > config.vocab_size:
            report.warnings.append(
                Problem(
                    "",
                    None,
                    f"data.{name}: prepared with a vocabulary of {largest}, the model has {config.vocab_size}; an "
                    "id beyond it stops the run.",
                )
            )
    report.problems += [Problem("", None, problem) for problem in make_room_for(prefixes)]
    return tokens


def _resolved(
    recipe: Recipe, world_size: int, config: ModelConfig | None, tokens: dict[str, int], report: Report
) -> None:
    clock, layout = Clock(recipe), resolve_layout(layout_keys(parallel_in(recipe, recipe.stages[0])), world_size)
    lines = report.lines
    lines.append(f"run {recipe.run.name} in {recipe.directory}, start {recipe.run.start}, seed {recipe.run.seed}")
    if config:
        lines.append(
            f"model {short_number(config.num_parameters())} parameters, {config.num_hidden_layers} layers, vocabulary "
            f"{config.vocab_size} (padded {config.padded_vocab(recipe.model.vocab_multiple)}), rope {config.rope.type} theta "
            f"{config.rope.theta:g}"
        )
    lines.append(f"layout {layout} on {layout.world_size} processes")
    need = dict.fromkeys(recipe.data, 0.0)
    for i, stage in enumerate(recipe.stages):
        parallel, steps = parallel_in(recipe, stage), clock.stage_steps(i)
        if i and layout_keys(parallel_in(recipe, stage)) != layout_keys(parallel_in(recipe, recipe.stages[i - 1])):
            layout = resolve_layout(parallel, world_size)
            lines.append(f"layout from stage {stage.name} on: {layout}")
        first = clock.step(1 + sum(clock.stage_steps(j) for j in range(i)))
        last = clock.step(first.number + steps - 1)
        sizes = " -> ".join(show_tokens(batch) for _, batch in stage.batch_tokens)
        per_round = layout.data * parallel.micro_batch_tokens // stage.seq_len
        rounds, rates = -(-last.rows // per_round), schedule_in(recipe, stage)
        lines.append(
            f"stage {stage.name}: {show_tokens(clock.stage_tokens(i))} tokens in {steps} steps of {sizes} tokens, rows of "
            f"{stage.seq_len}, {rounds} micro-batches of {show_tokens(parallel.micro_batch_tokens)} on {layout.data} data ranks, lr "
            f"{rate_of_step(rates, clock, first):.3g} .. {rate_of_step(rates, clock, last):.3g}"
        )
        waste = 1 - last.rows / (rounds * per_round)
        if waste > 0:
            text = f"stage {stage.name}: {waste:.0%} of the micro-batch rows are filling ({last.rows} rows over {rounds} x {per_round})"
            report.warnings.append(Problem("", None, text)) if waste > 0.1 else lines.append(text)
        total = sum(stage.mixture.values())
        for name, weight in stage.mixture.items():
            need[name] += clock.stage_tokens(i) * weight / total
    for name, order in ((name, domain.order) for name, domain in recipe.data.items() if domain.order):
        way = "rising" if order.ascending else "falling"
        lines.append(f"domain {name}: in the order of {way} {order.by}, {order.buckets} buckets")
    for stage in (stage for stage in recipe.stages if stage.gates):
        lines.append(
            f"stage {stage.name} ends with the gates {', '.join(stage.gates)}; not passed: {stage.on_fail.action}"
        )
    for name, taken in need.items():
        if name in tokens and taken:
            epochs = taken / max(1, tokens[name])
            lines.append(
                f"domain {name}: {show_tokens(tokens[name])} tokens, {short_number(taken)} taken = {epochs:.2f} epochs"
            )
            if epochs > 4:
                report.warnings.append(
                    Problem(
                        "",
                        None,
                        f"domain {name}: is repeated {epochs:.1f} times; beyond 4 the gain of repeated data "
                        "falls off (Muennighoff et al. 2023).",
                    )
                )
    lines.append(f"total {show_tokens(clock.num_tokens)} tokens, {clock.num_steps} steps")
