"""How every test starts (one thread, fixed seeds, no network) and the account of skipped tests."""

from __future__ import annotations

import os
from collections.abc import Iterable

# Read when transformers and tokenizers are imported, which test modules do while being collected.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"

import numpy as np
import pytest
import torch
from hypothesis import settings

ALLOWED_SKIPS = ("no GPU", "no browser", "another version")

torch.set_num_threads(1)
# No deadline: a test never asserts time. Derandomized: a red run is red again.
settings.register_profile("pvcore", deadline=None, derandomize=True)
settings.load_profile("pvcore")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_grad_enabled(True)
    np.random.seed(0)  # noqa: NPY002 - libraries draw from the global generator


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The words given to `pytest.skip` or `skipif`."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


def unaccounted(reasons: Iterable[str]) -> list[str]:
    """The reasons that are none of the three a test may be skipped for."""
    return [reason for reason in reasons if not reason.startswith(ALLOWED_SKIPS)]


def _skip_reasons(config: pytest.Config) -> list[str]:
    reporter = config.pluginmanager.getplugin("terminalreporter")
    return [skip_reason(report) for report in reporter.stats.get("skipped", [])]


def pytest_sessionfinish(session: pytest.Session) -> None:
    on_xdist_worker = hasattr(session.config, "workerinput")
    if not on_xdist_worker and unaccounted(_skip_reasons(session.config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    reasons = _skip_reasons(config)
    for allowed in ALLOWED_SKIPS:
        if count := sum(reason.startswith(allowed) for reason in reasons):
            terminalreporter.write_line(f"skipped, {allowed}: {count}")
    for reason in unaccounted(reasons):
        terminalreporter.write_line(f"SKIPPED FOR NO ALLOWED REASON: {reason}", red=True)
