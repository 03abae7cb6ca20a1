"""Says which extra installs a package that only parts of this one need."""

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtra(ImportError):
    """An optional package cannot be imported; the message names the extra that brings it."""

    def __init__(self, cause: ImportError, name: str):
        super().__init__(f'{cause}: pip install "perceptiondlm[{name}]"', name=cause.name)


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Names the extra to install where an import in its block fails.

    Not for modules that travel with checkpoints: transformers demands of whoever loads one all
    that they import outside of `try:` blocks.
    """
    try:
        yield
    except MissingExtra:  # of a module that the block imports
        raise
    except ImportError as error:
        raise MissingExtra(error, name) from error
