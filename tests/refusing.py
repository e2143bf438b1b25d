"""The one line with which the library refuses bad input."""

import warnings

import pytest

from snn_lib.errors import InputError


def refusal(call, *arguments, **options):
    """The line with which a call refuses its input; nothing else is said, not even a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError) as refused:
            call(*arguments, **options)
    message = str(refused.value)
    assert "\n" not in message
    return message
