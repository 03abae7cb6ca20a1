"""Turns checkpoints of every known layout into a self-contained folder of this package's layout.

    python convert_checkpoint.py --source RELEASED_FOLDER --output FOLDER [--push-to-hub OWNER/NAME]

Sources: released PerceptionDLM and PerceptionDLM-Base; LLaDA (its own names or Llama's) with a
SigLIP-2 tower, for a fresh Base; LLaDA-V; this package's own layout, training checkpoints (FSDP's
sharded ones too) and PEFT adapters.
"""

import os
import signal
import sys

if not __package__:  # run as a script: the folder around it is the package
    from types import ModuleType

    __package__ = "perceptiondlm"
    sys.modules[__package__] = ModuleType(__package__)
    sys.modules[__package__].__path__ = [os.path.dirname(os.path.abspath(__file__))]

from .conversion.command import main
from .conversion.convert import convert

__all__ = ["convert", "main"]

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # to clean up
    sys.exit(main())
