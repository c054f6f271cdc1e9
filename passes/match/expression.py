"""Sums of products of values, and when two of them are one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import fx

_MOST_TERMS = 64
_MOST_POWER = 8


class Unknown(Exception):
    """The program does something that has no normal form."""


@dataclass(frozen=True, slots=True)
class Atom:
    """A value that is not a sum or a product: a piece of the hidden value, or a function of sums.

    Arguments of a function that are no tensors (a slope, a threshold) are in `options`, all of
    them, defaults too.
    """

    name: str
    of: tuple[Sum, ...] = ()
    options: tuple[object, ...] = ()


Powers: TypeAlias = tuple[tuple[Atom, int], ...]


@dataclass(frozen=True, slots=True)
class Sum:
    """A sum of products: a factor for each product of powers."""

    terms: tuple[tuple[Powers, float], ...]

    @staticmethod
    def of(terms: Mapping[Powers, float]) -> Sum:
        """Make a sum in its one order, without zeros."""
        if len(terms) > _MOST_TERMS:
            raise Unknown("too many terms")
        kept = [(powers, factor) for powers, factor in terms.items() if factor != 0]
        return Sum(tuple(sorted(kept, key=repr)))

    @staticmethod
    def number(value: float) -> Sum:
        """Return a constant."""
        return Sum.of({(): float(value)})

    @staticmethod
    def atom(atom: Atom) -> Sum:
        """Return a single value."""
        return Sum((((((atom, 1),)), 1.0),))

    @property
    def constant(self) -> float | None:
        """The number that this is, or None."""
        if not self.terms:
            return 0.0
        (powers, factor), *rest = self.terms
        return None if rest or powers else factor

    def plus(self, other: Sum, factor: float = 1.0) -> Sum:
        """Return `self + factor * other`."""
        terms = dict(self.terms)
        for powers, value in other.terms:
            terms[powers] = terms.get(powers, 0.0) + factor * value
        return Sum.of(terms)

    def times(self, other: Sum) -> Sum:
        """Return the product."""
        terms: dict[Powers, float] = {}
        for mine, a in self.terms:
            for theirs, b in other.terms:
                powers = _product(mine, theirs)
                terms[powers] = terms.get(powers, 0.0) + a * b
        return Sum.of(terms)

    def inverse(self) -> Sum:
        """Return `1 / self`."""
        if len(self.terms) != 1:
            if not self.terms:
                raise Unknown("a division by zero")
            return Sum.atom(Atom("reciprocal", (self,)))
        powers, factor = self.terms[0]
        return Sum.of({tuple((atom, -power) for atom, power in powers): 1 / factor})

    def power(self, exponent: float) -> Sum:
        """Return `self ** exponent`."""
        if exponent != int(exponent) or abs(exponent) > _MOST_POWER:
            raise Unknown(f"a power of {exponent}")
        base = self if exponent >= 0 else self.inverse()
        result = Sum.number(1.0)
        for _ in range(abs(int(exponent))):
            result = result.times(base)
        return result


def _product(a: Powers, b: Powers) -> Powers:
    exponents = dict(a)
    for atom, power in b:
        exponents[atom] = exponents.get(atom, 0) + power
    return tuple(sorted(((k, n) for k, n in exponents.items() if n), key=repr))


def same(a: Sum, b: Sum, tolerance: float) -> bool:
    """Tell whether two sums are one, with constants that differ by no more than `tolerance`."""
    if len(a.terms) != len(b.terms):
        return False
    left = list(b.terms)
    for powers, factor in a.terms:
        for candidate in left:
            close = math.isclose(factor, candidate[1], rel_tol=tolerance)
            if close and _same_powers(powers, candidate[0], tolerance):
                left.remove(candidate)
                break
        else:
            return False
    return True


def _same_powers(a: Powers, b: Powers, tolerance: float) -> bool:
    if len(a) != len(b):
        return False
    left = list(b)
    for atom, power in a:
        for candidate in left:
            if power == candidate[1] and _same_atom(atom, candidate[0], tolerance):
                left.remove(candidate)
                break
        else:
            return False
    return True


def _same_atom(a: Atom, b: Atom, tolerance: float) -> bool:
    if (a.name, a.options, len(a.of)) != (b.name, b.options, len(b.of)):
        return False
    return all(same(x, y, tolerance) for x, y in zip(a.of, b.of, strict=True))


def piece(start: int, stop: int) -> Sum:
    """Return the columns `start` to `stop` of the hidden value."""
    return Sum.atom(Atom("hidden", options=(start, stop)))


def graph_of(function: Callable[..., Any], count: int = 1) -> fx.Graph:
    """Trace a function of `count` tensors, without what a `Tracer` patches in all threads."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    inputs = [fx.Proxy(graph.placeholder(f"input_{i}"), tracer) for i in range(count)]
    graph.output(function(*inputs).node)
    return graph
