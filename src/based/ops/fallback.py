"""How an operator says that no kernel takes a call."""

import warnings

_SAID: set[str] = set()


def warn_once(message: str) -> None:
    """Warns of `message` the first time, under `torch.compile` too."""
    if message not in _SAID:
        _SAID.add(message)
        warnings.warn(message, stacklevel=4)


# Tracing runs it instead of reading it. `torch.compiler.assume_constant_result` sets the
# same, but imports two seconds of torch._dynamo first.
warn_once._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
