"""A refusal in one line, as the tests of data/ look at it."""

import pytest

from aesl_trl.errors import InputError


def refused(parts, call, *args, **kwargs) -> str:
    """Check that the call is refused in one line that holds all `parts`; return the line."""
    with pytest.raises(InputError) as error:
        call(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message
