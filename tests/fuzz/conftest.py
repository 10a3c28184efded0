"""`--fuzz=N`: so many mutations for each reader in place of the few of every test run."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture
def fuzz(request) -> Callable[[st.SearchStrategy, Callable[[Any], None]], None]:
    """Calls a function with as many drawn values as `--fuzz` says; the same ones each time."""

    def run(strategy: st.SearchStrategy, function: Callable[[Any], None]) -> None:
        @settings(
            max_examples=request.config.getoption("--fuzz"),
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def example(value):
            function(value)

        example()

    return run
