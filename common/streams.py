"""Prepares the standard output and error of a command for whatever they are connected to."""

import contextlib
import io
import os
import sys


def escape_what_streams_lack():
    """Lets messages hold any text, file names that are not UTF-8 too, in any locale."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def silence_stdout():
    """Sends what Python still holds for a closed stdout nowhere, or it complains at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
