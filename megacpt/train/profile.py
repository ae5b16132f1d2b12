"""[profile]: a Kineto trace, and on a GPU a memory snapshot, over a window of steps on chosen ranks."""

from pathlib import Path

import torch

from megacpt.config.recipe import Profile
from megacpt.log import info


class Profiler:
    """Call `before(step)` and `after(step)` around every step."""

    def __init__(self, profile: Profile, directory: Path, rank: int):
        self.window = profile.steps if rank in profile.ranks else None
        self.memory = profile.memory and torch.cuda.is_available()
        self.directory, self.rank, self.running = directory, rank, None

    def before(self, step: int) -> None:
        if self.window and step == self.window[0]:
            self.directory.mkdir(parents=True, exist_ok=True)
            if self.memory:
                torch.cuda.memory._record_memory_history(max_entries=1_000_000)
            activities = [torch.profiler.ProfilerActivity.CPU]
            activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.running = torch.profiler.profile(activities=activities, profile_memory=self.memory)
            self.running.__enter__()

    def after(self, step: int) -> None:
        if self.running and step == self.window[1]:
            self.close()

    def close(self) -> None:
        """Writes what was recorded, also when the run ends inside the window."""
        if self.running is None:
            return
        self.running.__exit__(None, None, None)
        name = f"rank{self.rank}-steps{self.window[0]}-{self.window[1]}"
        self.running.export_chrome_trace(str(self.directory / f"{name}.json"))
        if self.memory:
            torch.cuda.memory._dump_snapshot(str(self.directory / f"{name}-memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self.running = None
        info(f"profile written to {self.directory}/{name}.json (open in ui.perfetto.dev)")
