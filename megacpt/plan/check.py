"""Everything that can be said of a recipe before a process starts: all problems at once, and the facts of the resolved run. Imports no
torch and no numpy; answers in a fraction of a second."""

from collections.abc import Collection, Sequence

from megacpt.config.clock import Clock
from megacpt.config.layout import Layout, resolve_layout
from megacpt.config.merge import layout_keys, layouts_of, objective_in, parallel_in, reduction_under, schedule_in
from megacpt.config.model import frozen_names, load_base_config, shape_problems
from megacpt.config.plan_file import base_of
from megacpt.config.recipe import Recipe
from megacpt.config.resolve import resolve
from megacpt.config.rules import problems_of, warnings_of
from megacpt.config.run_layout import path_problems
from megacpt.config.sections.data import Curriculum, Domain
from megacpt.config.sections.model import Model
from megacpt.config.sections.objective import Objective
from megacpt.config.sections.parallel import Parallel
from megacpt.config.sections.stage import MOST_MICRO_BATCHES, Stage
from megacpt.config.trainable import Trainable, trainable_in
from megacpt.data.curriculum import score_problems
from megacpt.data.manifest import expand_files, expand_paths, item_problems, make_room_for, read_manifest
from megacpt.data.questions import read_task
from megacpt.errors import ConfigError, DataError, MegacptError, Problem, nearest
from megacpt.family.base import ModelConfig
from megacpt.family.rope import least_theta, theta_by_rule
from megacpt.model.split import PipelinePlan, plan_pipeline, stage_weights
from megacpt.optim.schedule import rate_of_step
from megacpt.parallel.pipeline.schedule import Schedule
from megacpt.parallel.pipeline.simulate import Simulation, simulate
from megacpt.plan.describe import filling
from megacpt.plan.facts import (
    CurriculumFacts,
    DomainFacts,
    Facts,
    LayoutFacts,
    ModelFacts,
    ReductionFacts,
    Report,
    ScheduleFacts,
    StageFacts,
)
from megacpt.plan.memory import GIB, RESERVE_GIB, Job, Peak, peak, rank_parameters, remedies
from megacpt.plan.picture import schedule_picture

MOST_BUBBLE, MOST_FILLING, MOST_EPOCHS = 0.5, 0.1, 4
"""Beyond these a run is warned of."""


def check(recipe: Recipe, world_size: int, files: bool = True, card_gib: float | None = None) -> Report:
    """Rules of the recipe, of the model's shape, of the data and of the card's memory together.

    Args:
        files: False leaves out what would be read from disk, and says so.
        card_gib: memory of one card, which every stage must fit; None asks for no limit.
    """
    report = Report(problems=problems_of(recipe, world_size))
    if files:
        report.problems += path_problems(recipe.directory)
        report.problems += path_problems(recipe.packing.directory, "packing.directory")
    config = _check_model(recipe, report, files)
    tokens = _check_data(recipe, report, config) if files else {}
    if not files:
        report.warnings.append(Problem("", None, "--no-files: model files and data were not read."))
    elif not report.problems:
        _check_tasks(recipe, report)
    report.warnings += warnings_of(recipe)
    if config:
        config = _check_shape(recipe, world_size, config, report)
    layouts = _check_layouts(recipe, world_size, config, report)
    needs = [] if report.problems else _check_memory(recipe, world_size, config, card_gib, report)
    if not report.problems:
        report.facts = _facts_of(recipe, world_size, config, tokens, layouts, needs)
        report.warnings += _fact_warnings(report.facts)
    return report


def _check_tasks(recipe: Recipe, report: Report) -> None:
    """The question files of the gates."""
    for name, gate in recipe.gates.items():
        for task in getattr(gate, "tasks", []):
            try:
                read_task(task)
            except DataError as error:
                report.problems.append(Problem(f"gates.{name}.tasks", None, str(error)))


def _check_model(recipe: Recipe, report: Report, files: bool) -> ModelConfig | None:
    try:
        return known_model(recipe, files)
    except ConfigError as error:
        report.problems += [problem.inside("model") for problem in error.problems]
    return None


def known_model(recipe: Recipe, files: bool) -> ModelConfig | None:
    """The base model's shape, from disk only if `files`.

    Raises:
        ConfigError: if it cannot be read, or is not trained here.
    """
    model = recipe.model
    if model.architecture or (files and (model.pretrained or model.config)):
        return base_of(recipe)
    return load_base_config(Model(architecture=model.expect)) if model.expect else None


def _check_shape(recipe: Recipe, world_size: int, config: ModelConfig, report: Report) -> ModelConfig:
    """What layouts and stages ask of the model; with the run's own change of its rotary embedding."""
    for key, parallel in layouts_of(recipe).items():
        report.problems += shape_problems(config, parallel, recipe.model.vocab_multiple, key)
    try:
        plan = resolve(recipe, config, world_size)
    except ConfigError as error:
        report.problems += error.problems
        return config
    for stage in plan.stages:
        _check_length(recipe, stage.recipe, plan.model, stage.model, report)
    return plan.model


def _check_length(recipe: Recipe, stage: Stage, first: ModelConfig, now: ModelConfig, report: Report) -> None:
    """Whether the rotary embedding of a stage reaches the end of its rows."""
    where, seq_len, rope, made_for = f"stages.{stage.name}", stage.seq_len, now.rope, now.max_position_embeddings
    longest = rope.longest
    if longest and rope == first.rope and not recipe.model.rope:  # what the checkpoint itself was trained for
        longest = max(longest, made_for)
    if longest and seq_len > longest:
        text = (
            f"the rotary embedding ({rope.type}, factor {rope.fields['factor']:g} x "
            f"{rope.fields['original_max_position_embeddings']}) ends at {longest}."
        )
        report.problems.append(Problem(f"{where}.seq_len", seq_len, text, f"Nearest: {longest}; or set {where}.rope."))
    elif not longest and seq_len > made_for and rope.theta < least_theta(seq_len):
        ntk, twice = (theta_by_rule(rule, first, seq_len) for rule in ("ntk", "ntk2"))
        text = (
            f"theta {rope.theta:g} is below {least_theta(seq_len):.3g}, the bound for {seq_len} tokens (the model was made for "
            f"{made_for})."
        )
        remedy = f'By rule: {ntk:.3g} (rope.rule = "ntk") or {twice:.3g} ("ntk2").'
        report.warnings.append(Problem(where, None, text, remedy))


def _check_layouts(
    recipe: Recipe, world_size: int, config: ModelConfig | None, report: Report
) -> tuple[LayoutFacts, ...]:
    """Pipelines and reductions of the layouts that fit the world size; the others are among the problems already."""
    if config is None and any(parallel.pipeline > 1 for parallel in layouts_of(recipe).values()):
        text = "the model's number of layers is not known here, so its split into pipeline stages was not checked."
        report.warnings.append(Problem("", None, text, "Set model.expect."))
    found = []
    for key, parallel in layouts_of(recipe).items():
        try:
            layout = resolve_layout(parallel, world_size)
        except ValueError:
            continue
        try:
            found.append(_layout_facts(recipe, key, parallel, layout, config))
        except ValueError as error:
            report.problems.append(Problem(key, None, str(error)))
    return tuple(found)


def _layout_facts(
    recipe: Recipe, key: str, parallel: Parallel, layout: Layout, config: ModelConfig | None
) -> LayoutFacts:
    """Raises ValueError if the layers or micro-batches of a step do not fit the pipeline."""
    counts = micro_batch_counts(recipe, parallel, layout.data)
    too_many = max(counts) * parallel.pipeline * parallel.virtual_stages > MOST_MICRO_BATCHES  # a problem already
    if config is None or too_many:
        return LayoutFacts(key, layout)
    plan = plan_pipeline(config.num_hidden_layers, parallel)
    schedules = {count: plan.schedule(count) for count in counts}
    reduction = _reduction_facts(recipe, parallel, layout, config, plan, max(counts))
    if parallel.pipeline == 1:
        return LayoutFacts(key, layout, plan.name, reduction=reduction)
    played = {count: _simulated(schedule, plan, parallel) for count, schedule in schedules.items()}
    facts = tuple(ScheduleFacts(count, found.bubble, max(found.peak)) for count, found in played.items())
    return LayoutFacts(key, layout, plan.name, tuple(map(len, plan.layers)), facts, reduction)


def _simulated(schedule: Schedule, plan: PipelinePlan, parallel: Parallel) -> Simulation:
    found = simulate(schedule, stage_weights(plan, parallel))
    assert found is not None, f"{plan.name} deadlocks"
    return found


def _reduction_facts(
    recipe: Recipe, parallel: Parallel, layout: Layout, config: ModelConfig, plan: PipelinePlan, micro_batches: int
) -> ReductionFacts | None:
    sharers = layout.data * layout.context
    if sharers == 1:
        return None
    mine = [stage for stage in recipe.stages if layout_keys(parallel_in(recipe, stage)) == parallel]
    trained = frozenset().union(*(_trainable(recipe, stage, config).names for stage in mine))
    kept = 4 * max(rank_parameters(config, plan, parallel, recipe.model.vocab_multiple, trained)) / GIB
    sent = kept * (sharers - 1) / sharers
    return ReductionFacts(reduction_under(recipe, parallel), kept, sent, micro_batches * sent)


def micro_batch_counts(recipe: Recipe, parallel: Parallel, data_ranks: int) -> list[int]:
    """The different numbers of micro-batches that steps under a layout have."""
    counts = set()
    for stage in (stage for stage in recipe.stages if layout_keys(parallel_in(recipe, stage)) == parallel):
        micro = parallel_in(recipe, stage).tokens_at_once
        counts |= {max(1, -(-batch // (data_ranks * micro))) for _, batch in stage.batch_tokens}
    return sorted(counts)


def _check_memory(
    recipe: Recipe, world_size: int, config: ModelConfig | None, card_gib: float | None, report: Report
) -> list[Peak | None]:
    """What each stage needs of a card; stages that do not fit are problems."""
    if config is None:
        text = "the model's shape is not known here, so the memory of a step was not estimated."
        report.warnings.append(Problem("", None, text, "Set model.expect."))
        return [None] * len(recipe.stages)
    needs: list[Peak | None] = []
    for stage in recipe.stages:
        job, need = fullest_step(recipe, stage, world_size, config)
        needs.append(need)
        if card_gib is not None and need.gib + RESERVE_GIB > card_gib:
            report.problems.append(over_memory(stage.name, job, need, card_gib))
    return needs


def fullest_step(recipe: Recipe, stage: Stage, world_size: int, config: ModelConfig) -> tuple[Job, Peak]:
    """The step of a stage, over its batch ramp, that needs most memory, and its need."""
    parallel = parallel_in(recipe, stage)
    layout = resolve_layout(parallel, world_size)
    widths = {"float64": 8, "float32": 4, "bfloat16": 2, None: 2}  # auto: as on a GPU
    state = 2 if recipe.optimizer.state_dtype == "bfloat16" else 4
    exact = bool(recipe.model.pretrained) and config.dtype in (recipe.precision.compute or "bfloat16", None)
    counts = {max(1, -(-batch // (layout.data * parallel.tokens_at_once))) for _, batch in stage.batch_tokens}
    jobs = [
        Job(config, parallel, layout, stage.seq_len, count, reduction_under(recipe, parallel), recipe.model.vocab_multiple,
            widths[recipe.precision.compute], state, _trainable(recipe, stage, config), exact)
        for count in counts
    ]  # fmt: skip
    return max(((job, peak(job)) for job in jobs), key=lambda found: found[1].gib)


def _trainable(recipe: Recipe, stage: Stage, config: ModelConfig) -> Trainable:
    frozen = [frozen_names(each.freeze, config) for each in recipe.stages]
    return trainable_in(config, frozen, [each.name for each in recipe.stages].index(stage.name))


def _trained_parameters(recipe: Recipe, stage: Stage, config: ModelConfig) -> tuple[int, int]:
    trainable = _trainable(recipe, stage, config)

    def count(names: Collection[str]) -> int:
        return sum(p.size for p in config.parameters if p.name in names)

    return count(trainable.names), count(trainable.held)


def over_memory(stage: str, job: Job, need: Peak, card_gib: float) -> Problem:
    """What to say of a stage that does not fit its cards."""
    fitting = remedies(job, card_gib)
    remedy = f"It fits with {'; or '.join(fitting)}." if fitting else "Share the model or the sequence over more ranks."
    text = (
        f"pipeline rank {need.rank} needs {need.gib:.1f} GiB ({need}), and {RESERVE_GIB:g} GiB are left free for CUDA and NCCL; a card "
        f"has {card_gib:g} GiB (--device-memory)."
    )
    return Problem(f"stages.{stage}", None, text, remedy)


def schedule_svg(recipe: Recipe, world_size: int, files: bool = True) -> str:
    """The timeline of the step with the most micro-batches, under the layout with the most pipeline stages.

    Raises:
        ConfigError: if the model's layers are not known.
    """
    config = known_model(recipe, files)
    if config is None:
        text = "the number of layers is not known without files."
        raise ConfigError([Problem("--schedule-picture", None, text, "Set model.expect.")])
    parallel = max(layouts_of(recipe).values(), key=lambda p: p.pipeline * p.virtual_stages)
    plan = plan_pipeline(config.num_hidden_layers, parallel)
    count = micro_batch_counts(recipe, parallel, resolve_layout(parallel, world_size).data)[-1]
    found = _simulated(plan.schedule(count), plan, parallel)
    return schedule_picture(f"{plan.name}, {plan.ranks} ranks, {count} micro-batches", found, plan.placement)


def _check_data(recipe: Recipe, report: Report, config: ModelConfig | None) -> dict[str, int]:
    """Tokens of each domain, as the manifests have them."""
    tokens: dict[str, int] = {}
    all_prefixes: list[str] = []
    for name, domain in recipe.data.items():
        try:
            prefixes = expand_paths(domain.paths)
            manifests = [read_manifest(prefix) for prefix in prefixes]
        except MegacptError as error:
            report.problems.append(Problem(f"data.{name}", None, str(error)))
            continue
        all_prefixes += prefixes
        for prefix, manifest in zip(prefixes, manifests, strict=True):
            _check_labels(name, domain, prefix, manifest, report)
        _check_items(recipe, name, domain, prefixes, report)
        if domain.order:
            _check_scores(name, domain.order, prefixes, report)
        documents, tokens[name] = _selected(manifests, domain)
        if domain.holdout_documents >= documents:
            text = f"the domain has {documents} documents; some must be left to train on."
            report.problems.append(Problem(f"data.{name}.holdout_documents", domain.holdout_documents, text))
        if len({manifest["tokenizer"]["sha256"] for manifest in manifests}) > 1:
            text = "its parts were prepared with different tokenizers."
            report.problems.append(Problem(f"data.{name}", None, text, "Prepare them all with one."))
        largest = max(manifest["vocab_size"] for manifest in manifests)
        if config and largest > config.vocab_size:
            text = f"prepared with a vocabulary of {largest}, the model has {config.vocab_size}; an id beyond it stops the run."
            report.warnings.append(Problem(f"data.{name}", None, text))
    report.problems += [Problem("", None, problem) for problem in make_room_for(all_prefixes)]
    return tokens


def _check_labels(name: str, domain: Domain, prefix: str, manifest: dict, report: Report) -> None:
    known = list(manifest.get("labels", {}).get("names", {}))
    unknown = [label for label in domain.labels if label not in known]
    where = f"data.{name}.labels"
    if domain.labels and not known:
        remedy = "Prepare it with --domain-field."
        report.problems.append(Problem(where, None, f"{prefix} was prepared without labels.", remedy))
    elif unknown and len(unknown) == len(domain.labels):
        text = f"{prefix} has no {unknown[0]!r}."
        report.problems.append(Problem(where, None, text, nearest(unknown[0], known)))


def _check_items(recipe: Recipe, name: str, domain: Domain, prefixes: Sequence[str], report: Report) -> None:
    """Whether all sets have items or none, and whether each item fits the rows that read the domain, where no view leaves some out."""
    whole = domain.max_tokens is None and not domain.labels and recipe.packing.long_items == "refuse"
    validated = any(name in validation.domains for validation in recipe.validation)
    rows = [stage.seq_len for stage in recipe.stages if whole and (validated or stage.mixture.get(name))]
    report.problems += [Problem(f"data.{name}", None, problem) for problem in item_problems(prefixes, rows)]


def _check_scores(name: str, order: Curriculum, prefixes: Sequence[str], report: Report) -> None:
    try:
        found = score_problems(expand_files(order.scores), prefixes)
    except DataError as error:
        found = [str(error)]
    report.problems += [Problem(f"data.{name}.order.scores", None, problem) for problem in found]


def _selected(manifests: Sequence[dict], domain: Domain) -> tuple[int, int]:
    """(documents, tokens) of the domain, by its labels; bounds of length are not counted."""
    views = manifests
    if domain.labels:
        found = [m.get("labels", {}).get("names", {}).get(label) for m in manifests for label in domain.labels]
        views = [view for view in found if view]
    return sum(view["documents"] for view in views), sum(view["tokens"] for view in views)


def _facts_of(
    recipe: Recipe, world_size: int, config: ModelConfig | None, tokens: dict[str, int],
    layouts: tuple[LayoutFacts, ...], needs: list[Peak | None],
) -> Facts:  # fmt: skip
    """Of a recipe without problems."""
    clock, run, multiple = Clock(recipe), recipe.run, recipe.model.vocab_multiple
    model = config and ModelFacts(
        config.num_parameters(), config.num_hidden_layers, config.vocab_size, config.padded_vocab(multiple),
        config.rope.type, config.rope.theta,
    )  # fmt: skip
    return Facts(
        run.name,
        recipe.directory,
        run.start,
        run.seed,
        world_size,
        model,
        layouts,
        tuple(_stage_facts(recipe, clock, index, world_size, config, need) for index, need in enumerate(needs)),
        tuple(_domain_facts(recipe, clock, name, tokens.get(name)) for name in recipe.data),
        clock.num_tokens,
        clock.num_steps,
    )


def _stage_facts(
    recipe: Recipe, clock: Clock, index: int, world_size: int, config: ModelConfig | None, need: Peak | None
) -> StageFacts:
    stage, numbers = recipe.stages[index], clock.stage_numbers(index)
    parallel = parallel_in(recipe, stage)
    layout = resolve_layout(parallel, world_size)
    first, last, objective = clock.step(numbers[0]), clock.step(numbers[-1]), objective_in(recipe, stage)
    rows, rates = layout.data * parallel.tokens_at_once // stage.seq_len, schedule_in(recipe, stage)
    return StageFacts(
        name=stage.name,
        tokens=clock.stage_tokens(index),
        steps=len(numbers),
        batch_tokens=tuple(batch for _, batch in stage.batch_tokens),
        seq_len=stage.seq_len,
        layout=layout,
        micro_batch_tokens=parallel.tokens_at_once,
        micro_batches=-(-last.rows // rows),
        micro_batch_rows=rows,
        rows=last.rows,
        first_rate=rate_of_step(rates, clock, first),
        last_rate=rate_of_step(rates, clock, last),
        objective=None if objective == Objective() else f"{objective.kind}, normalized by {objective.normalize}",
        gates=tuple(stage.gates),
        on_fail=stage.on_fail.action,
        trained=_trained_parameters(recipe, stage, config) if config and stage.freeze else None,
        memory=need,
    )


def _domain_facts(recipe: Recipe, clock: Clock, name: str, tokens: int | None) -> DomainFacts:
    order = recipe.data[name].order
    taken = sum(
        clock.stage_tokens(i) * stage.mixture.get(name, 0) / sum(stage.mixture.values())
        for i, stage in enumerate(recipe.stages)
    )
    curriculum = order and CurriculumFacts(order.by, order.buckets, order.ascending)
    return DomainFacts(name, tokens, taken, curriculum)


def _fact_warnings(facts: Facts) -> list[Problem]:
    """What the numbers of a legal run give to think about."""
    found = []
    for schedule in (schedule for layout in facts.layouts for schedule in layout.schedules):
        if schedule.bubble > MOST_BUBBLE:
            text = f"with {schedule.micro_batches} micro-batches the pipeline's bubble is {schedule.bubble:.0%} of the busy time."
            remedy = "Take more rows a step, fewer pipeline ranks, or more virtual stages."
            found.append(Problem("", None, text, remedy))
    for stage in facts.stages:
        if stage.filling > MOST_FILLING:
            remedy = "Take a batch that the data ranks and micro-batches divide."
            found.append(Problem(f"stages.{stage.name}", None, f"{filling(stage)}.", remedy))
    for domain in facts.domains:
        if domain.epochs and domain.epochs > MOST_EPOCHS:
            text = f"is repeated {domain.epochs:.1f} times; beyond 4 the gain of repeated data falls off (Muennighoff et al. 2023)."
            found.append(Problem(f"data.{domain.name}", None, text))
    return found
