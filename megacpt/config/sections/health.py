"""[health]: timeouts, spikes, comparisons between ranks."""

from pydantic import Field

from megacpt.config.base import NotNegativeInt, Positive, PositiveInt, Seconds, Section


class Health(Section, heading="[health]", resume="free"):
    """What counts as a hang, as a spike and as a difference between ranks, and what follows."""

    start_timeout_seconds: Seconds = 1800
    """Seconds that a rank may be silent, and a collective wait, up to the end of the first step, which includes loading and compilation."""
    step_timeout_seconds: Seconds = 300
    """Seconds that a rank may be silent, and a collective wait, within a training step after the first."""
    save_timeout_seconds: Seconds = 1800
    """Seconds that a rank may be silent, and a collective wait, while a checkpoint is written."""
    evaluate_timeout_seconds: Seconds = 1800
    """Seconds that a rank may be silent, and a collective wait, between two micro-batches of a validation or a gate."""
    watchdog: bool = True
    """Run a process beside each node's ranks that ends a hung run and leaves the stacks of all ranks in `incidents/`."""
    spike_mads: Positive | None = None
    """Skip an update whose loss or gradient norm lies this many median absolute deviations, times 1.4826 (the sigma of a normal
    distribution), above the median of the steps accepted last. By default only updates with numbers that are not finite are skipped."""
    spike_window: int = Field(default=128, ge=8, le=1_000_000)
    """Number of accepted steps of the stage from which the spike rule takes its median. It acts once a quarter of them are there."""
    rollback_after: PositiveInt = 8
    """Number of skipped updates in a row after which the run goes back to the checkpoint before them and leaves out the data in between."""
    max_rollbacks: NotNegativeInt = 4
    """Number of rollbacks after which the next one ends the run with an error instead."""
    checksum_every_steps: PositiveInt = 100
    """Number of steps between two exact comparisons of the ranks that hold the same weights. There is one before each save too."""
    straggler_every_steps: PositiveInt = 100
    """Number of steps between two gatherings of every rank's times, from which metrics.jsonl names the slowest ranks."""
