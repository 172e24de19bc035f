"""What every command shares: errors that the user can mend end in one line, and flags are not guessed at."""

import argparse
import os
import sys
from pathlib import Path


class BadInput(Exception):
    """Something the user can mend. The message names the flag or file, its value and the mend."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that does not guess at shortened flags and reports an error in one line."""

    def __init__(self, description, **kwargs):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise BadInput(f"{message} (--help lists the flags)")


def run_command(main, silent=lambda: False):
    """Run main(). What the user can mend, files that fail included, ends in one line on standard error (unless silent)
    and status 2, Ctrl-C in status 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for what it lacks
    try:
        main()
    except BrokenPipeError:  # `python sample.py | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (BadInput, OSError) as error:
        message = " ".join(str(error).split())  # one line, whatever a library put into it
        if not silent():
            print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
