"""Rules across fields: what a recipe alone can tell, without files. Each problem names its key, the numbers, the way
out. Rules that need the model's shape or the data stand in plan/check.py."""

from megacpt.config.layout import resolve_layout, token_unit
from megacpt.config.recipe import Recipe
from megacpt.config.stage import Gate, LearningRate, NeedleGate, OnFail, Stage
from megacpt.errors import nearest


def problems_of(recipe: Recipe, world_size: int) -> list[str]:
    """All problems of the recipe for this many processes."""
    return [
        *_start(recipe),
        *_layout(recipe, world_size),
        *_learning_rates(recipe),
        *(p for stage in recipe.stages for p in _stage(recipe, stage)),
        *_validation(recipe),
        *_domains(recipe),
        *_mixture(recipe),
        *(p for name, gate in recipe.gates.items() for p in _gate(recipe, name, gate)),
        *(p for stage in recipe.stages for p in _ending(recipe, stage)),
    ]


def warnings_of(recipe: Recipe) -> list[str]:
    """What is legal and hardly meant."""
    warnings = []
    used = {name for stage in recipe.stages for name in stage.gates}
    warnings += [f"gates.{name}: no stage asks it." for name in recipe.gates if name not in used]
    for stage in recipe.stages:
        if stage.average and stage.average.last * stage.average.every_tokens > stage.tokens:
            warnings.append(
                f"stages.{stage.name}.average: {stage.average.last} snapshots every {stage.average.every_tokens} tokens do not fit in "
                f"{stage.tokens}; fewer are averaged."
            )
    ordered = [name for name, domain in recipe.data.items() if domain.order]
    for stage in recipe.stages:
        rate = stage.lr or recipe.optimizer.lr
        decay = recipe.optimizer.weight_decay if stage.weight_decay is None else stage.weight_decay
        if rate and rate.peak * decay >= 1:
            warnings.append(
                f"stages.{stage.name}: lr.peak {rate.peak:g} x weight_decay {decay:g} = {rate.peak * decay:g}: from 1 on, a single update "
                "turns the sign of every weight."
            )
        used = [name for name in ordered if stage.mixture.get(name, 0) > 0]
        if used and rate and rate.shape != "constant":
            warnings.append(
                f"stages.{stage.name}: {', '.join(used)} is a curriculum under a decaying learning rate ({rate.shape}), which is known to "
                'undo its gain (arXiv 2511.18903). Use shape = "constant" and average the last weights (average).'
            )
    online = recipe.mixture.online
    if online:
        for group, names in recipe.mixture.groups.items():
            blind = [name for name in names if name in recipe.data and not recipe.data[name].holdout_documents]
            if blind and len(names) > 1:
                warnings.append(
                    f"mixture.groups.{group}: {', '.join(blind)} hold out no documents, so nothing is measured of them: they move only "
                    "with the others."
                )
    return warnings


def _start(recipe: Recipe) -> list[str]:
    model, problems = recipe.model, []
    given = [key for key in ("pretrained", "config", "architecture") if getattr(model, key)]
    if len(given) != 1:
        problems.append(
            f"model: {' and '.join(given) if given else 'no model'} given. Give one of pretrained (a Hugging Face "
            "directory), config (a config.json, from scratch) or architecture (a name, from scratch)."
        )
    if model.pretrained is None and not model.tokenizer:
        problems.append(
            "model.tokenizer: a model from scratch needs a tokenizer directory, so that the export is whole."
        )
    if recipe.run.start == "pretrained" and not model.pretrained:
        problems.append('run.start = "pretrained": needs model.pretrained.')
    if recipe.run.start == "scratch" and model.pretrained:
        problems.append(f'run.start = "scratch": model.pretrained = "{model.pretrained}" would be ignored. Remove one.')
    if model.rope and model.rope.rule:
        problems.append(
            f'model.rope.rule = "{model.rope.rule}": a rule is for the length of a stage. Write it as stages.NAME.rope.'
        )
    if recipe.profile.steps and recipe.profile.steps[0] > recipe.profile.steps[1]:
        problems.append(f"profile.steps = {list(recipe.profile.steps)}: the first is after the last.")
    return problems


def _layout(recipe: Recipe, world_size: int) -> list[str]:
    problems = []
    for key, parallel in recipe.layouts.items():
        try:
            resolve_layout(parallel, world_size)
        except ValueError as error:
            problems.append(f"{key}: {error}")
        name, contiguous = parallel.schedule_name, parallel.contiguous_micro_batches
        if contiguous and name != "interleaved":
            problems.append(
                f'{key}.contiguous_micro_batches = {contiguous}: belongs to schedule = "interleaved"; schedule is "{name}".'
            )
        elif contiguous and contiguous < parallel.pipeline:
            problems.append(
                f"{key}.contiguous_micro_batches = {contiguous}: at least parallel.pipeline = {parallel.pipeline}, or ranks wait "
                "for each other."
            )
    return problems


def _learning_rates(recipe: Recipe) -> list[str]:
    problems = []
    staged = [stage.name for stage in recipe.stages if stage.lr]
    if recipe.optimizer.lr and staged:
        problems.append(
            f"optimizer.lr and stages.{staged[0]}.lr: give one for the run or one in every stage, not both."
        )
    if not recipe.optimizer.lr:
        problems += [
            f"stages.{s.name}.lr: is missing, and there is no optimizer.lr." for s in recipe.stages if not s.lr
        ]
    whole = sum(stage.tokens for stage in recipe.stages)
    if recipe.optimizer.lr:
        problems += _learning_rate("optimizer.lr", recipe.optimizer.lr, whole)
    for stage in recipe.stages:
        if stage.lr:
            problems += _learning_rate(f"stages.{stage.name}.lr", stage.lr, stage.tokens)
    return problems


def _learning_rate(name: str, lr: LearningRate, tokens: int) -> list[str]:
    problems = []
    if lr.min > lr.peak:
        problems.append(f"{name}.min = {lr.min}: is above peak = {lr.peak}.")
    if (lr.shape == "wsd" and lr.decay_tokens is None) or (
        lr.decay_tokens is not None and lr.shape not in ("wsd", "infinite")
    ):
        problems.append(
            f'{name}.decay_tokens: belongs to shape = "wsd" (required there) and "infinite"; shape is "{lr.shape}".'
        )
    if (lr.shape == "infinite") != (lr.constant is not None and lr.cooldown_tokens is not None):
        problems.append(
            f'{name}: constant and cooldown_tokens belong to shape = "infinite", both; shape is "{lr.shape}".'
        )
    elif lr.constant is not None and not lr.min <= lr.constant <= lr.peak:
        problems.append(f"{name}.constant = {lr.constant}: must lie between min = {lr.min} and peak = {lr.peak}.")
    if lr.tail == "exponential" and lr.min <= 0:
        problems.append(f'{name}.tail = "exponential": never reaches 0. Give min, for example {lr.peak / 100:g}.')
    if lr.start and not lr.warmup_tokens:
        problems.append(f"{name}.start = {lr.start}: the warm-up begins there, and there is no warmup_tokens.")
    needed = lr.warmup_tokens + (lr.cooldown_tokens or 0) + (lr.decay_tokens or 0)
    if needed > tokens:
        problems.append(
            f"{name}: warmup_tokens {lr.warmup_tokens} + cooldown_tokens {lr.cooldown_tokens or 0} + decay_tokens "
            f"{lr.decay_tokens or 0} = {needed} exceed the {tokens} tokens they must fit in."
        )
    return problems


def multiples(name: str, value: int, of: str, unit: int) -> list[str]:
    """A problem, with the nearest two valid values, unless `value` is a positive multiple of `unit`."""
    if value > 0 and value % unit == 0:
        return []
    below = value // unit * unit
    choices = ", ".join(str(v) for v in (below, below + unit) if v > 0)
    return [f"{name} = {value}: must be a multiple of {of} = {unit}. Nearest: {choices}."]


def _stage(recipe: Recipe, stage: Stage) -> list[str]:
    name, problems = f"stages.{stage.name}", []
    if (
        sum(other.name == stage.name for other in recipe.stages) > 1
        and next(s for s in recipe.stages if s.name == stage.name) is stage
    ):
        problems.append(f"{name}: two stages have this name.")
    if stage.tokens == 0:
        problems.append(f"{name}.tokens = 0: a stage has at least one step.")
    for _, batch in stage.batch_tokens:
        problems += multiples(f"{name}.batch_tokens", batch, "seq_len", stage.seq_len)
    micro = recipe.parallel_of(stage).micro_batch_tokens
    problems += multiples("parallel.micro_batch_tokens", micro, f"{name}.seq_len", stage.seq_len)
    context, tensor = recipe.parallel_of(stage).context, recipe.parallel_of(stage).tensor
    unit = token_unit(tensor, context)
    text = "2 chunks a context rank, each rank's tokens over tensor" if context > 1 else "parallel.tensor"
    problems += multiples(f"{name}: parallel.micro_batch_tokens", micro, text, unit)
    if stage.seq_len < 2:
        problems.append(f"{name}.seq_len = {stage.seq_len}: a row of one token has no label. At least 2.")
    for domain in stage.mixture:
        if domain not in recipe.data:
            problems.append(f"{name}.mixture.{domain}: no such domain in [data]. {nearest(domain, list(recipe.data))}")
    total = sum(stage.mixture.values())
    if not 0 < total < float("inf"):
        problems.append(f"{name}.mixture: the weights sum to {total}. At least one is positive, and the sum is finite.")
    return problems


def _validation(recipe: Recipe) -> list[str]:
    problems = []
    for i, validation in enumerate(recipe.validation):
        for domain in validation.domains:
            if domain not in recipe.data:
                problems.append(f"validation.{i}.domains: no domain {domain!r}. {nearest(domain, list(recipe.data))}")
            elif recipe.data[domain].holdout_documents == 0:
                problems.append(
                    f"validation.{i}.domains: {domain} holds out no documents. Set data.{domain}.holdout_documents."
                )
    return problems


def _mixture(recipe: Recipe) -> list[str]:
    problems, seen = [], {}
    for group, names in recipe.mixture.groups.items():
        for name in names:
            if name not in recipe.data:
                problems.append(f"mixture.groups.{group}: no domain {name!r}. {nearest(name, list(recipe.data))}")
            elif name in seen:
                problems.append(
                    f"mixture.groups.{group}: {name} is in group {seen[name]} too. A domain is in one group."
                )
            seen.setdefault(name, group)
    online = recipe.mixture.online
    if online:
        held = lambda names: [n for n in names if n in recipe.data and recipe.data[n].holdout_documents]
        if not any(len(names) > 1 and held(names) for names in recipe.mixture.groups.values()):
            problems.append(
                "mixture.online: no group has two domains, one of them with holdout_documents. Nothing would be measured or moved."
            )
        if online.every_tokens == 0:
            problems.append("mixture.online.every_tokens = 0: at least 1.")
        for name in online.topic_weights:
            if name not in recipe.data:
                problems.append(f"mixture.online.topic_weights: no domain {name!r}. {nearest(name, list(recipe.data))}")
    return problems


def _gate(recipe: Recipe, name: str, gate: Gate) -> list[str]:
    problems, where = [], f"gates.{name}"
    domains = [gate.haystack] if isinstance(gate, NeedleGate) else gate.domains
    for domain in domains:
        if domain not in recipe.data:
            problems.append(f"{where}: no domain {domain!r}. {nearest(domain, list(recipe.data))}")
        elif not isinstance(gate, NeedleGate) and not recipe.data[domain].holdout_documents:
            problems.append(f"{where}: {domain} holds out no documents. Set data.{domain}.holdout_documents.")
    if isinstance(gate, NeedleGate):
        if not gate.asked <= gate.inserted <= 10:
            problems.append(f"{where}: asked {gate.asked} of inserted {gate.inserted}: asked <= inserted <= 10.")
        users = [stage for stage in recipe.stages if name in stage.gates]
        for stage in users:
            if gate.lengths and min(gate.lengths) > stage.seq_len:
                problems.append(
                    f"{where}.lengths: all are above stages.{stage.name}.seq_len = {stage.seq_len}, so nothing would be asked there."
                )
    elif not gate.domains and not gate.tasks:
        problems.append(f"{where}: neither domains nor tasks are given, so it asks nothing.")
    return problems


def _ending(recipe: Recipe, stage: Stage) -> list[str]:
    """Gates of a stage and what follows from them."""
    name, rule, problems = f"stages.{stage.name}", stage.on_fail, []
    for gate in stage.gates:
        if gate not in recipe.gates:
            problems.append(f"{name}.gates: no gate {gate!r} in [gates]. {nearest(gate, list(recipe.gates))}")
    if rule.action == "extend" and not (rule.tokens and rule.limit and rule.tokens <= rule.limit):
        problems.append(
            f"{name}.on_fail: action extend needs tokens and a limit of at least as many; they are {rule.tokens} and {rule.limit}."
        )
    if rule.action != "extend" and (rule.tokens or rule.limit):
        problems.append(f'{name}.on_fail: tokens and limit belong to action = "extend"; it is "{rule.action}".')
    if rule != OnFail() and not stage.gates:
        problems.append(f"{name}.on_fail: the stage has no gates.")
    if stage.average and stage.average.every_tokens == 0:
        problems.append(f"{name}.average.every_tokens = 0: at least 1.")
    return problems


def _domains(recipe: Recipe) -> list[str]:
    return [
        f"data.{name}: min_tokens {domain.min_tokens} is above max_tokens {domain.max_tokens}."
        for name, domain in recipe.data.items()
        if domain.min_tokens and domain.max_tokens and domain.min_tokens > domain.max_tokens
    ]
