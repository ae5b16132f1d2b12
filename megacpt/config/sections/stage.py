"""[[stages]]: a part of the run with its own length, rows, batch, mixture, rate, layout and gates."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from megacpt.config.base import Betas, ClipNorm, Name, NotNegative, OnResume, PositiveInt, Section, Tokens
from megacpt.config.layout import token_unit
from megacpt.config.merge import parallel_in
from megacpt.config.quantity import parse_tokens
from megacpt.config.sections.model import RopeChoice
from megacpt.config.sections.objective import Objective
from megacpt.config.sections.optimizer import LearningRate
from megacpt.config.sections.parallel import StageParallel
from megacpt.errors import Problem, nearest

if TYPE_CHECKING:
    from megacpt.config.recipe import Recipe


class OnFail(Section, heading="on_fail (in a stage)"):
    """What a stage does when one of its gates is not passed."""

    action: Literal["extend", "stop", "warn"] = "stop"
    """What follows a gate that is not passed: `extend` trains on and asks the gates again, `stop` saves and ends the run with an error,
    `warn` goes on."""
    tokens: Tokens | None = None
    """Only with `extend`, which requires it: number of tokens of one extension."""
    limit: Tokens | None = None
    """Only with `extend`, which requires it: number of tokens of all extensions together, after which the run stops."""


class Average(Section, heading="average (in a stage)"):
    """Weights averaged over the end of a stage (Polyak mean; Llama 3, section 3.4.3)."""

    last: int = Field(default=5, ge=2, le=10_000)
    """Number of snapshots, the last ones of the stage, that are averaged."""
    every_tokens: Tokens
    """Number of tokens between two snapshots."""
    decay: Literal["mean", "linear", "cosine", "1-sqrt"] = "mean"
    """Weights of the snapshots in the average: equal with `mean`, else those that emulate a decay of the learning rate over them (WSM,
    arXiv 2507.17634)."""


MOST_LEVELS = 1000
"""Of a batch ramp: `check` looks at the step of each."""
MOST_MICRO_BATCHES = 1 << 20
"""Of a step, times pipeline stages: its schedule is a list of actions in memory."""


def _ramp(value: Any) -> Any:
    """8192 or "4Mi" -> ((0, tokens),); [["0", "2Mi"], ["2B", "4Mi"]] -> pairs of (position, tokens); {start, increment, over, final}
    -> the pairs of a linear ramp (Megatron's start, increment, length): level k from k / levels of `over` on."""
    if isinstance(value, dict):
        return _linear_ramp(value)
    if not isinstance(value, list | tuple):
        return ((0, parse_tokens(value)),)
    if not value or any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in value):
        raise ValueError(
            'write a token quantity, or pairs [position, tokens], for example [["0", "2Mi"], ["2B", "4Mi"]]'
        )
    if len(value) > MOST_LEVELS:
        raise ValueError(f"{len(value)} pairs are more than {MOST_LEVELS}; take larger steps")
    pairs = tuple((parse_tokens(at), parse_tokens(tokens)) for at, tokens in value)
    positions = [at for at, _ in pairs]
    if positions[0] != 0 or positions != sorted(set(positions)):
        raise ValueError(f"positions must begin at 0 and grow; they are {positions}")
    return pairs


def _linear_ramp(value: dict) -> tuple[tuple[int, int], ...]:
    keys = ("start", "increment", "over", "final")
    if set(value) != set(keys):
        raise ValueError(f"a linear ramp has the keys {', '.join(keys)}; they are {', '.join(map(str, value))}")
    start, increment, over, final = (parse_tokens(value[key]) for key in keys)
    if increment < 1 or final <= start or (final - start) % increment:
        raise ValueError(f"final {final} must lie a whole number of increments {increment} above start {start}")
    levels = (final - start) // increment
    if levels > MOST_LEVELS:
        raise ValueError(f"{levels} increments are more than {MOST_LEVELS}; take a larger increment")
    if over < levels:
        raise ValueError(f"over = {over} tokens is too short for {levels} increments")
    return tuple((over * k // levels, start + k * increment) for k in range(levels + 1))


_TOKENS_SCHEMA = {"type": ["integer", "string"]}
BatchTokens = Annotated[
    tuple[tuple[int, int], ...],
    BeforeValidator(_ramp),
    WithJsonSchema(
        {
            "anyOf": [
                _TOKENS_SCHEMA,
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {"type": "array", "items": _TOKENS_SCHEMA, "minItems": 2, "maxItems": 2},
                },
                {
                    "type": "object",
                    "properties": dict.fromkeys(("start", "increment", "over", "final"), _TOKENS_SCHEMA),
                    "required": ["start", "increment", "over", "final"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]


class Stage(Section, heading="[[stages]]", resume="later stages"):
    """A part of the run. Stages follow one another in the recipe's order."""

    name: Name
    """Name of the stage in metrics, events and flags (`--stages.NAME.key=value`)."""
    tokens: Annotated[Tokens, OnResume("unfinished stages")]
    """Length of the stage in tokens, rounded up to whole steps."""
    seq_len: PositiveInt
    """Length of a row in tokens, the context length of the stage."""
    batch_tokens: BatchTokens
    """Number of tokens in a step: one number; or a ramp of pairs [tokens since the stage's start, tokens of a step]; or a linear ramp
    {start, increment, over, final}."""
    mixture: dict[str, NotNegative]
    """Share of the stage's tokens that each domain gives. The shares are normalised to a sum of 1."""
    lr: Annotated[LearningRate | None, OnResume("unfinished stages")] = None
    """Learning rate of this stage. Give either this in every stage or `optimizer.lr`."""
    rope: RopeChoice = None
    """Change of the rotary position embedding from this stage's start on. `keep` leaves it as it is."""
    parallel: Annotated[StageParallel, OnResume("free")] = StageParallel()
    """Layout of this stage, key by key in place of `[parallel]`. Long-context stages usually need more `context`."""
    betas: Annotated[Betas | None, OnResume("unfinished stages")] = None
    """AdamW's decay rates of the moments in this stage. By default those of `[optimizer]` hold."""
    weight_decay: Annotated[NotNegative | None, OnResume("unfinished stages")] = None
    """Decoupled weight decay in this stage. By default that of `[optimizer]` holds."""
    clip_norm: Annotated[ClipNorm | None, OnResume("unfinished stages")] = None
    """Upper bound of the global gradient norm in this stage. By default that of `[optimizer]` holds."""
    objective: Objective | None = None
    """What this stage minimises, in place of `[objective]`."""
    freeze: list[str] = []
    """Parameters that this stage does not train: names, or patterns such as "model.layers.*"."""
    gates: Annotated[list[str], OnResume("unfinished stages")] = []
    """Names of the gates, defined in `[gates]`, that are asked at the stage's end."""
    on_fail: Annotated[OnFail, OnResume("unfinished stages")] = OnFail()
    """What happens when one of the stage's gates is not passed. By default the run saves and stops."""
    average: Annotated[Average | None, OnResume("unfinished stages")] = None
    """Average the weights of snapshots taken during the stage. Average and last weights are both validated and kept, the better one is
    marked, and training goes on from the last weights."""


def problems(recipe: "Recipe", world_size: int) -> list[Problem]:
    names = [stage.name for stage in recipe.stages]
    found = [
        Problem(f"stages.{name}", None, f"{names.count(name)} stages have this name.", "Give each its own.")
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    for stage in recipe.stages:
        found += [
            *_size_problems(recipe, stage, world_size),
            *_mixture_problems(recipe, stage),
            *_end_problems(recipe, stage),
        ]
    return found


def _size_problems(recipe: "Recipe", stage: Stage, world_size: int) -> list[Problem]:
    where, found, parallel = f"stages.{stage.name}", [], parallel_in(recipe, stage)
    if stage.tokens == 0:
        found.append(Problem(f"{where}.tokens", 0, "a stage has at least one step.", "Write at least 1, or remove it."))
    for _, batch in stage.batch_tokens:
        found += multiple_problems(f"{where}.batch_tokens", batch, "seq_len", stage.seq_len)
    micro, unit = parallel.tokens_at_once, token_unit(parallel.tensor, parallel.context)
    found += multiple_problems("parallel.micro_batch_tokens", micro, f"{where}.seq_len", stage.seq_len)
    split = "2 chunks a context rank, each rank's tokens over tensor" if parallel.context > 1 else "parallel.tensor"
    found += multiple_problems(f"{where}: parallel.micro_batch_tokens", micro, split, unit)
    data_ranks = max(1, world_size // (parallel.tensor * parallel.context * parallel.pipeline))
    most = max((batch for _, batch in stage.batch_tokens), default=0)
    actions = most // (data_ranks * micro) * parallel.pipeline * parallel.virtual_stages
    if actions > MOST_MICRO_BATCHES:
        text = (
            f"a step of {most} tokens has {actions} micro-batches, counted on each pipeline stage; at most {MOST_MICRO_BATCHES} can be "
            "scheduled."
        )
        found.append(Problem(f"{where}.batch_tokens", None, text, "Raise micro_batch_tokens, or lower batch_tokens."))
    if stage.seq_len < 2:
        found.append(
            Problem(f"{where}.seq_len", stage.seq_len, "a row of one token has no label.", "Write at least 2.")
        )
    return found


def multiple_problems(where: str, value: int, of: str, unit: int) -> list[Problem]:
    """A problem, with the nearest two valid values, unless `value` is a positive multiple of `unit`."""
    if value > 0 and value % unit == 0:
        return []
    below = value // unit * unit
    choices = ", ".join(str(choice) for choice in (below, below + unit) if choice > 0)
    return [Problem(where, value, f"must be a multiple of {of} = {unit}.", f"Nearest: {choices}.")]


def _mixture_problems(recipe: "Recipe", stage: Stage) -> list[Problem]:
    where, domains = f"stages.{stage.name}.mixture", list(recipe.data)
    found = [
        Problem(f"{where}.{domain}", None, "no such domain in [data].", nearest(domain, domains))
        for domain in stage.mixture
        if domain not in recipe.data
    ]
    total = sum(stage.mixture.values())
    if total == 0:
        found.append(Problem(where, None, f"the weights sum to {total}.", "At least one must be positive."))
    return found


def _end_problems(recipe: "Recipe", stage: Stage) -> list[Problem]:
    """Of the gates of a stage, what follows from them, and its average."""
    where, rule, found = f"stages.{stage.name}", stage.on_fail, []
    for gate in stage.gates:
        if gate not in recipe.gates:
            text = f"no gate {gate!r} in [gates]."
            found.append(Problem(f"{where}.gates", None, text, nearest(gate, list(recipe.gates))))
    if rule.action == "extend" and not (rule.tokens and rule.limit and rule.tokens <= rule.limit):
        text = f"action extend needs tokens and a limit of at least as many; they are {rule.tokens} and {rule.limit}."
        found.append(Problem(f"{where}.on_fail", None, text))
    if rule.action != "extend" and (rule.tokens or rule.limit):
        text = f'tokens and limit belong to action = "extend"; it is "{rule.action}".'
        found.append(Problem(f"{where}.on_fail", None, text))
    if rule != OnFail() and not stage.gates:
        found.append(Problem(f"{where}.on_fail", None, "the stage has no gates.", "Name them, or remove on_fail."))
    if stage.average and stage.average.every_tokens == 0:
        found.append(Problem(f"{where}.average.every_tokens", 0, "the interval is empty.", "Write at least 1."))
    return found


def warnings(recipe: "Recipe") -> list[Problem]:
    ordered = [name for name, domain in recipe.data.items() if domain.order]
    return [problem for stage in recipe.stages for problem in _stage_warnings(recipe, stage, ordered)]


def _stage_warnings(recipe: "Recipe", stage: Stage, ordered: list[str]) -> list[Problem]:
    where, found, average = f"stages.{stage.name}", [], stage.average
    if average and average.last * average.every_tokens > stage.tokens:
        text = f"{average.last} snapshots every {average.every_tokens} tokens do not fit in {stage.tokens}; fewer are averaged."
        found.append(Problem(f"{where}.average", None, text))
    rate = stage.lr or recipe.optimizer.lr
    decay = recipe.optimizer.weight_decay if stage.weight_decay is None else stage.weight_decay
    if rate and rate.peak * decay >= 1:
        text = (
            f"lr.peak {rate.peak:g} x weight_decay {decay:g} = {rate.peak * decay:g}: from 1 on, a single update turns the sign of every "
            "weight."
        )
        found.append(Problem(where, None, text))
    used = [name for name in ordered if stage.mixture.get(name, 0) > 0]
    if used and rate and rate.shape != "constant":
        text = (
            f"{', '.join(used)} is a curriculum under a decaying learning rate ({rate.shape}), which is known to undo its gain (arXiv "
            "2511.18903)."
        )
        found.append(Problem(where, None, text, 'Use shape = "constant" and average the last weights (average).'))
    return found
