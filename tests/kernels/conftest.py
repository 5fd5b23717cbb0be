"""Triton picks interpreter or compiler as it decorates a kernel: a process of tests for each."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]
