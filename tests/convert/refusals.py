"""The one line that bad input gets."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from harness.config import HarnessError


def refusal(call: Callable[[], object]) -> str:
    """What a call says as it refuses; one line."""
    with pytest.raises(HarnessError) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said
    return said
