"""Rows shared out among threads: Ctrl-C."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest
import torch

from k2quant.kernels.devices import threads


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(threads._openmp() is None, reason="torch has another OpenMP here")  # noqa: SLF001
def test_ctrl_c_is_not_lost_while_rows_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes where Python has just entered a callback of C, and stops the caller."""
    job_class = threads._Job  # noqa: SLF001  its `run` is what C calls
    run, sent = job_class.run, list[int]()

    def interrupted(job: Any, _unused: object = None) -> None:
        if threading.current_thread() is threading.main_thread() and not sent:
            sent.append(1)
            signal.raise_signal(signal.SIGINT)
        run(job)

    monkeypatch.setattr(job_class, "run", interrupted)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            threads.over_rows(8, 1, lambda _first, _last: None)
    finally:
        torch.set_num_threads(before)
    assert sent == [1]
