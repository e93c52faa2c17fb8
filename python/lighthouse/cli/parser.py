"""argparse's parsers, whose errors are one line, with the nearest name for one that does not exist."""

from __future__ import annotations

import argparse
import difflib
import re
import sys


class OneLine(argparse.ArgumentParser):
    """An error is one line, without the usage, which is a page long where a run has a hundred options."""

    def error(self, message: str):
        choice = re.fullmatch(r"(argument .*: )?invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL)
        if choice:
            which, given, known = choice[1] or "", choice[2], choice[3].replace("'", "")
            message = f"{which}there is no {given!r}{nearest(given, known.split(', '))}; one of {known} is needed"
        message = re.sub(r"invalid int value: (.*)", r"\1 is not a whole number", message)
        message = re.sub(r"invalid float value: (.*)", r"\1 is not a number", message)
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]  # declared for any namespace
        """Ends the command at an option that does not exist, before it misses others that do."""
        options = [name for action in self._actions for name in action.option_strings]
        several = {
            name: action for action in self._actions if action.nargs in ("+", "*") for name in action.option_strings
        }
        given = set()
        for word in sys.argv[1:] if args is None else args:
            name = word.partition("=")[0]
            if name in several:
                if several[name].dest in given:
                    print(f"{self.prog}: {name} is given twice, and the last counts", file=sys.stderr)
                given.add(several[name].dest)
            if word.startswith("--") and name != "--" and name not in options:
                self.error(f"there is no option {name}{nearest(name, options)}")
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"{rest[0]!r} stands after no option that takes it")
        return found, rest


class Parser(OneLine):
    """The same, for a command with options of its own alone."""

    def __init__(self, **kinds):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kinds)


def nearest(name: str, names: list[str]) -> str:
    """The end of a sentence about a name that does not exist."""
    alike = {known.replace("-", "_"): known for known in reversed(names)}
    name = name.replace("-", "_")
    near = [known for known in alike if known.startswith(name)] or difflib.get_close_matches(name, alike, n=1)
    return f"; nearest: {alike[near[0]]}" if near else ""
