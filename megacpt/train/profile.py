"""[profile]: a Kineto trace, and on a GPU a memory snapshot, over a window of steps on chosen ranks."""

import errno
import os
from pathlib import Path

import torch

from megacpt.compat import dump_memory, record_memory
from megacpt.config.sections.profile import Profile
from megacpt.files import describe_os_error
from megacpt.log import info, warn


class Profiler:
    """Call `before(step)` and `after(step)` around every step."""

    def __init__(self, profile: Profile, directory: Path, rank: int):
        self.window = profile.steps if rank in profile.ranks else None
        self.memory = profile.memory and torch.cuda.is_available()
        self.directory, self.rank = directory, rank
        self.running: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        if self.window and step == self.window[0]:
            if self.memory:
                record_memory(True)
            activities = [torch.profiler.ProfilerActivity.CPU]
            activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.running = torch.profiler.profile(activities=activities, profile_memory=self.memory)
            self.running.__enter__()

    def after(self, step: int) -> None:
        if self.running and self.window and step == self.window[1]:
            self.close()

    def close(self) -> None:
        """Writes what was recorded, also when the run ends inside the window."""
        if self.running is None or self.window is None:
            return
        self.running.__exit__(None, None, None)
        file = self.directory / f"rank{self.rank}-steps{self.window[0]}-{self.window[1]}.json"
        running, self.running = self.running, None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            _export(running, file)
            if self.memory:
                dump_memory(str(file.with_name(f"{file.stem}-memory.pickle")))
        except (OSError, RuntimeError) as error:  # a profile is not worth a run
            warn(
                describe_os_error(error, file)
                if isinstance(error, OSError)
                else f"{file}: the profile was not written: {error}"
            )
        else:
            info(f"profile written to {file} (open in ui.perfetto.dev)")
        finally:
            if self.memory:
                record_memory(False)


def _export(profile: torch.profiler.profile, file: Path) -> None:
    """The trace in whole; torch's own writer says nothing of a disk that takes only its beginning."""
    profile.export_chrome_trace(str(file))
    with open(file, "rb") as written:
        written.seek(-min(64, file.stat().st_size), os.SEEK_END)
        whole = written.read().rstrip().endswith(b"}")
    if not whole:
        file.unlink()
        raise OSError(errno.ENOSPC, "only a part of the trace could be written")
