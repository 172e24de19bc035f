"""What commands share: errors that the user can mend end in one line, flags are not guessed at, two do not collide."""

import argparse
import contextlib
import os
import sys
from pathlib import Path

import filelock


class BadInput(Exception):
    """Something the user can mend. The message names the flag or file, its value and the mend."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that does not guess at shortened flags and reports an error in one line."""

    def __init__(self, description, **kwargs):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise BadInput(f"{message} (--help lists the flags)")


@contextlib.contextmanager
def only_one(path, taken):
    """Hold the lock file `path`, in a folder that is made if need be. Raises `taken` if another process holds it."""
    try:
        with filelock.FileLock(path, timeout=0) as lock:
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # Windows does so by itself, later
                    os.unlink(lock.lock_file)
    except filelock.Timeout:
        raise taken from None


def run_command(main, silent=lambda: False):
    """Run main(). What the user can mend, files that fail included, ends in one line on standard error (unless silent)
    and status 2, Ctrl-C in status 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for what it lacks
    try:
        main()
        print(end="", flush=True)  # else it is Python that finds nobody reading, when it ends, with status 120
    except BrokenPipeError:  # `python sample.py | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (BadInput, OSError) as error:
        message = " ".join(str(error).split())  # one line, whatever a library put into it
        if not silent():
            print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
