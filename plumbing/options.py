"""The command line of every script: options from a dataclass, and errors of one line."""

import argparse
import dataclasses
import functools
import inspect
import logging
import operator
import os
import re
import sys
import types
import typing
from collections.abc import Callable

import torch

# Matplotlib, imported later, warns at length if it cannot write to the home folder.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

BOUNDS = {
    "least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


class UserError(Exception):
    """A mistake the user can correct. Its one-line message says what is wrong, then what to do."""


def one_line(text: object, limit: int = 500) -> str:
    """Text of unknown origin as one printable line of at most about `limit` characters."""
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= limit else line[:limit] + " ..."


def option(
    default, help: str | None, choices: tuple = (), *, flag: str = "", free: bool = False, **bounds
):
    """A dataclass field that is an option of the command line.

    Args:
        help: its line in --help; None if the field is not an option.
        choices: the allowed values; () allows all.
        flag: its name on the command line; by default the field's name.
        free: the value does not change the result, so a run may be resumed with another one.
        **bounds: limits of a number: least, above, most, below (the keys of BOUNDS).
    """
    metadata = {"help": help, "choices": choices, "flag": flag, "free": free, "bounds": bounds}
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(field: dataclasses.Field) -> str:
    """The field lambda_reg -> --lambda-reg, unless the option has another flag."""
    return "--" + (field.metadata["flag"] or field.name).replace("_", "-")


class Options:
    """Base class for dataclasses of options. Values that are not allowed raise UserError."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, about = getattr(self, field.name), field.metadata
            if value is None or not about.get("help"):
                continue
            for each in value if isinstance(value, tuple | list) else [value]:
                if about["choices"] and each not in about["choices"]:
                    known = ", ".join(map(str, about["choices"]))
                    raise UserError(f"{flag_of(field)} must be one of {known}, not {each!r}")
            for name, bound in about["bounds"].items():
                holds, words = BOUNDS[name]
                if not holds(value, bound):  # NaN fails, too
                    raise UserError(f"{flag_of(field)} must be {words} {bound}, not {value}")

    def settings(self) -> dict:
        """The values that decide the result: those of all fields not marked free."""
        fields = [field for field in dataclasses.fields(self) if not field.metadata.get("free")]
        return {field.name: getattr(self, field.name) for field in fields}


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, like every other mistake."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; --help lists the options")


def parse(make: Callable, doc: str, flags: str | None = None):
    """The command line -> make(**the given options), a dataclass derived from Options.

    `lambda_reg: float = option(...)` becomes `--lambda-reg X`. A bool also has `--no-...`, and a
    tuple takes several values. --help shows the defaults of the given --dataset.

    Args:
        make: the dataclass, or a function of the same keywords that fills in the rest.
        flags: the fields that this script offers, or flag=field for another name; None: all.
    """
    first = Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    if "dataset" in inspect.signature(make).parameters:
        first.add_argument("--dataset")
    shown = make(**vars(first.parse_known_args()[0]))
    hints = typing.get_type_hints(type(shown))
    fields = {field.name: field for field in dataclasses.fields(shown)}
    words = flags.split() if flags else [name for name in fields if fields[name].metadata]
    parser = Parser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    for word in words:
        flag, _, name = word.rpartition("=")
        value, about, kind = getattr(shown, name), fields[name].metadata, hints[name]
        default = "" if value in (None, "", ()) or kind is bool else f" (default: {value})"
        how = {"dest": name, "help": (about["help"] + default).replace("%", "%%")}
        if isinstance(kind, types.UnionType):  # float | None
            kind = typing.get_args(kind)[0]
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        else:
            how["metavar"] = "{" + ",".join(about["choices"]) + "}" if about["choices"] else None
            if typing.get_origin(kind) is tuple:
                kind, how["nargs"] = typing.get_args(kind)[0], "+"
            how["type"] = kind
        parser.add_argument(f"--{flag}" if flag else flag_of(fields[name]), **how)
    return make(**vars(parser.parse_args()))


def parse_numbers(text: str, name: str) -> list[int]:
    """ "0-3,7" -> [0, 1, 2, 3, 7]."""
    parts = [re.fullmatch(r" *([0-9]+)(?:-([0-9]+))? *", part) for part in text.split(",")]
    spans = [range(int(part[1]), int(part[2] or part[1]) + 1) for part in parts if part]
    if not all(parts) or not all(spans) or max(span[-1] for span in spans) >= 2**64:
        raise UserError(f"--{name} must be like 0-9 or 3,5,8, not {text!r}")
    return [n for span in spans for n in span]


def never_raise(stream: typing.TextIO) -> None:
    """Printing never ends the work: odd characters are escaped, and what no one reads is lost."""

    def attempt(call, *arguments):
        try:
            return call(*arguments)
        except OSError as error:  # nor shall the end of the process, which writes what is buffered
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if not isinstance(error, BrokenPipeError):
                print(f"cannot print: {error}", file=sys.stderr)

    stream.reconfigure(errors="backslashreplace")
    for name in ("write", "flush"):
        setattr(stream, name, functools.partial(attempt, getattr(stream, name)))


def run_script(main: Callable, make: Callable, doc: str, flags: str | None = None):
    """Call main with what `parse` returns. A UserError becomes one line and exit code 2."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it is closed
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", errors="replace"))
        elif hasattr(stream := getattr(sys, f"__{name}__"), "reconfigure"):
            never_raise(stream)  # not a notebook's own
    os.environ.pop("MPLBACKEND", None)  # a notebook's may not exist here, and none is needed
    try:
        main(parse(make, doc, flags))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except (UserError, PermissionError, MemoryError, torch.OutOfMemoryError) as error:
        said = one_line(str(error) or repr(error), 2000)  # it may quote a file
        if isinstance(error, torch.OutOfMemoryError):
            said = f"the GPU's memory is full ({str(error).splitlines()[0]}); lower --batch-size"
            said += " (train.py: raise --accumulate, which keeps the batch)"
        rank = os.environ.get("RANK", "0")  # torchrun sets it, see devices.py
        print(f"error: {said}" + ("" if rank == "0" else f" (rank {rank})"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
