"""Every error that Tern raises on purpose, in one tree.

```
TernError
├── InvalidRequestError        a value the caller gave is wrong            HTTP 400
│   ├── ContextLengthError     prompt (+ max_tokens) exceeds the model     HTTP 400
│   └── UnsupportedFeatureError  known, but not supported yet              HTTP 400
├── UnknownModelError          no model of that name is served             HTTP 404
├── QueueFullError             try again later                             HTTP 429
├── EngineUnavailableError     loading, draining or dead                   HTTP 503
├── EngineFailedError          the engine of a server died, and the server with it
├── CheckpointError            the files of a model are wrong or missing
│   ├── UnsupportedConfigError   config.json asks for what Tern lacks
│   └── HubError               a download could not be done
├── RemoteServerError          a server that is measured cannot be used
└── OptionError                an option of a command or constructor is wrong
```

A message is one sentence that names the value, the limit and the way out.
"""

from __future__ import annotations

from collections.abc import Sequence


class TernError(Exception):
    """Base of every error raised on purpose; its text is meant for the user."""


class InvalidRequestError(TernError):
    """A request carries a value that cannot be served.

    `param` is the name of the offending field, as the caller wrote it, or None if no single field is at fault.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(InvalidRequestError):
    """The prompt, or the prompt and the tokens asked for, do not fit the model's length."""

    def __init__(self, message: str, *, param: str | None = "messages") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class UnsupportedFeatureError(InvalidRequestError):
    """A field or value that the API knows but this version does not serve yet."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="not_supported")


class UnknownModelError(TernError):
    """The request names a model that this server does not serve."""


class QueueFullError(TernError):
    """The waiting queue is full; `retry_after` is a hint in seconds."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineUnavailableError(TernError):
    """The engine is loading, draining or has failed."""


class EngineFailedError(TernError):
    """The engine of a server has failed for good; whoever watches the process must start another."""


class CheckpointError(TernError):
    """The files of a checkpoint are missing, damaged or do not fit the network; `problems` lists each finding."""

    def __init__(self, message: str, *, problems: Sequence[str] = ()) -> None:
        super().__init__("\n  - ".join([message, *problems]))
        self.problems = tuple(problems)


class UnsupportedConfigError(CheckpointError):
    """config.json describes a network that Tern does not run."""


class HubError(CheckpointError):
    """A checkpoint could not be downloaded."""


class RemoteServerError(TernError):
    """A server that `tern bench` is to load cannot be reached, or answers what no such server should."""


class OptionError(TernError):
    """An option given to a command or a constructor is wrong or unknown."""
