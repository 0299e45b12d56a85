"""The command line of every script: a dataclass as options, one-line user errors (exit code 2)."""

import argparse
import dataclasses
import logging
import os
import sys
import types
import typing
from collections.abc import Callable

import torch

# Where the home folder cannot be written, matplotlib says so at length as it is imported, and does
# without. (So the functions that draw import it, after this line.)
logging.getLogger("matplotlib").setLevel(logging.ERROR)


class UserError(Exception):
    """Something the user can mend. The message says what is wrong and what to do, in one line."""


# --------------------------------------------------------------------------------------------------
# Command line


def option(default, help: str, choices: tuple | None = None):
    """A dataclass field that is a command-line option with a help line."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the command line in one line, as for every other mistake."""

    def error(self, message: str) -> typing.NoReturn:
        """Exit with code 2."""
        self.exit(2, f"error: {message}; --help lists the options\n")


def run_script(main: Callable, config_class: type, doc: str) -> None:
    """Parse the command line into config_class, call main(config), turn UserError into exit code 2.

    Every field of the dataclass is an option: `lambda_reg: float = option(1.0, "...")` is
    `--lambda-reg X`; a bool has `--no-...` too; a tuple takes several values.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        shown = "" if field.default in (None, ()) else f" (default: {field.default})"
        arguments = {"default": field.default, "help": field.metadata["help"] + shown}
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # float | None
            kind = typing.get_args(kind)[0]
        if kind is bool:
            arguments |= {"action": argparse.BooleanOptionalAction}
            arguments["help"] = field.metadata["help"]
        elif typing.get_origin(kind) is tuple:
            arguments |= {"type": typing.get_args(kind)[0], "nargs": "+"}
        else:
            arguments |= {"type": kind, "choices": field.metadata["choices"]}
        parser.add_argument("--" + field.name.replace("_", "-"), **arguments)
    config = config_class(**vars(parser.parse_args()))
    try:
        main(config)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except UserError as error:
        rank = os.environ.get("RANK", "0")  # of several processes, see devices.py
        print(f"error: {error}" + ("" if rank == "0" else f" (rank {rank})"), file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        print(
            f"error: the GPU's memory is full ({reason}); lower --batch-size (train.py: raise "
            "--accumulate, which keeps the batch)",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
