"""The one exception users meet: what is wrong, where, and what to do; everything wrong at once."""

from __future__ import annotations

from dataclasses import dataclass

SHOWN = 5  # places named for one problem before the rest is only counted


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        what: the fact, with the numbers in it: `"linear_qkv has 96 rows, the args say 128"`.
        where: file, key or rank it was seen at; problems that differ only here are said once, together.
        remedy: what the user can do about it.
    """

    what: str
    where: str = ""
    remedy: str = ""


class Refused(Exception):
    """A checkpoint, an argument or a target is refused; carries every reason found."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__(say(problems))


def refuse(what: str, where: object = "", remedy: str = "") -> Refused:
    """One problem as an exception: `raise refuse("what", where, "remedy")`."""
    return Refused(Problem(what, str(where), remedy))


class Problems(list[Problem]):
    """A list to collect problems in, so that forty unknown weights are said once and not one at a time."""

    def add(self, what: str, where: object = "", remedy: str = "") -> None:
        self.append(Problem(what, str(where), remedy))

    def raise_if_any(self) -> None:
        if self:
            raise Refused(*self)


def say(problems: tuple[Problem, ...]) -> str:
    """Problems as text, a line each; those that differ only in where share a line."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        grouped.setdefault((problem.what, problem.remedy), []).append(problem.where)
    return "\n".join(line(what, places, remedy) for (what, remedy), places in grouped.items())


def line(what: str, places: list[str], remedy: str) -> str:
    places = [place for place in dict.fromkeys(places) if place]
    shown, rest = places[:SHOWN], len(places) - SHOWN
    where = f" ({', '.join(shown)}{f' and {rest} more' if rest > 0 else ''})" if shown else ""
    return f"{what}{where}{f'; {remedy}' if remedy else ''}"
