"""The command line of the modules here that write files anew from the runs: one folder, one clear line if it fails."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from simmoe.errors import SimmoeError


def write_from_folder(module: str, description: str, write: Callable[[Path], None]) -> None:
    """Parse the folder that ``python -m module`` was given and write from it."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("folder", type=Path, help="runs laid out as in validate/vllm_showdown")
    folder = parser.parse_args().folder
    try:
        write(folder)
    except SimmoeError as error:
        sys.exit(f"error: {error}")
