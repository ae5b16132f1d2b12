"""A pytest plugin: where the time went, by folder and by test, in wall and in CPU seconds.

CPU seconds are those of the process that ran the test and of every child it waited for (forked ranks, torchrun, command lines).
A shared machine stretches wall seconds and leaves CPU seconds nearly as they are, so they are what tests are compared by.
"""

import json
import os
from collections import defaultdict

import pytest

_SHOWN = 15
BUDGET = {"train": 4000, "faults": 450, "model": 200, "kernels": 150, "test_quickstart.py": 300, "parallel": 100}
"""CPU seconds that a folder may take with --full, where train holds the table of all layouts."""
BUDGET_OF_OTHERS = 80


def pytest_addoption(parser):
    parser.addoption("--costs", metavar="FILE", help="write the seconds of every test to FILE (JSON), dearest first")


def pytest_configure(config):
    config.pluginmanager.register(Costs(config.getoption("--costs")), "costs-of-tests")


class Costs:
    """Adds `cpu_seconds` to each report where the test runs, and sums them where the session reports (two processes under xdist)."""

    def __init__(self, file: str | None):
        self.file = file
        self.tests: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # wall, CPU
        self._spent = 0.0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        self._spent = _cpu_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        spent = _cpu_seconds()
        report.cpu_seconds, self._spent = spent - self._spent, spent
        return report

    def pytest_runtest_logreport(self, report):
        test = self.tests[report.nodeid]
        test[0] += report.duration
        test[1] += report.cpu_seconds

    def by_folder(self) -> dict[str, list[float]]:
        """[wall, CPU] seconds, the dearest first."""
        folders: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for name, seconds in self.tests.items():
            for i in range(2):
                folders[folder_of(name)][i] += seconds[i]
        return dict(sorted(folders.items(), key=lambda found: -found[1][1]))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        over = [name for name, (_, cpu) in self.by_folder().items() if cpu > budget_of(name)]
        if _FULL and over and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        folders = self.by_folder()
        line = terminalreporter.write_line
        line(f"seconds (wall, CPU{', budget of CPU' if _FULL else ''}) by folder, setup and teardown included:")
        for folder, (wall, cpu) in folders.items():
            over = "  OVER ITS BUDGET" if _FULL and cpu > budget_of(folder) else ""
            line(f"  {folder:24} {wall:7.1f} {cpu:7.1f}" + (f" {budget_of(folder):7}{over}" if _FULL else ""))
        wall, cpu = (sum(seconds[i] for seconds in folders.values()) for i in range(2))
        line(f"  {'all':24} {wall:7.1f} {cpu:7.1f}" + (f" {sum(map(budget_of, folders)):7}" if _FULL else ""))
        dearest = sorted(self.tests.items(), key=lambda found: -found[1][1])
        line(f"the {_SHOWN} dearest tests by CPU seconds (wall, CPU):")
        for name, (wall, cpu) in dearest[:_SHOWN]:
            line(f"  {wall:7.1f} {cpu:7.1f} {name}")
        if self.file:
            with open(self.file, "w") as file:
                json.dump({name: {"wall": wall, "cpu": cpu} for name, (wall, cpu) in dearest}, file, indent=0)


_FULL = bool(os.environ.get("MEGACPT_TEST_FULL"))


def budget_of(folder: str) -> int:
    return BUDGET.get(folder, BUDGET_OF_OTHERS)


def folder_of(test: str) -> str:
    """tests/kernels/test_ops.py::test_x -> kernels; a file of tests/ itself is its own."""
    return test.split("::")[0].removeprefix("tests/").split("/")[0]


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
