"""Algebra and calculus problems whose answers sympy computes: derivatives, integrals, factorisations, matrices."""

from __future__ import annotations

import random

import sympy
from sympy import Poly, cos, exp, log, sin
from sympy.abc import x


def _polynomial(r: random.Random, degree: int, size: int = 9) -> Poly:
    leading = r.choice([k for k in range(-size, size + 1) if k])
    return Poly([leading, *(r.randint(-size, size) for _ in range(degree))], x)


def _show(expression: object) -> str:
    return str(expression).replace("**", "^")


def _derivative_of_polynomial(r: random.Random) -> str:
    p = _polynomial(r, r.randint(2, 5))
    lines = [f"Differentiate f(x) = {_show(p.as_expr())}.", "Term by term:"]
    for (power,), factor in p.terms():
        lines.append(f"  d/dx {_show(factor * x**power)} = {_show(factor * power * x ** max(power - 1, 0))}")
    slope, at = p.diff(x), r.randint(-4, 4)
    return "\n".join([*lines, f"f'(x) = {_show(slope.as_expr())}", f"At x = {at}: f'({at}) = {slope.eval(at)}."])


def _integral_of_polynomial(r: random.Random) -> str:
    p, low = _polynomial(r, r.randint(1, 4), 12), r.randint(-3, 2)
    high, whole = low + r.randint(1, 4), p.integrate(x)
    top, bottom = whole.eval(high), whole.eval(low)
    return (
        f"Integrate f(x) = {_show(p.as_expr())} from {low} to {high}.\nAn antiderivative is F(x) = "
        f"{_show(whole.as_expr())}.\n"
        f"F({high}) = {top} and F({low}) = {bottom}.\nThe integral is F({high}) - F({low}) = {top - bottom}."
    )


def _product_rule(r: random.Random) -> str:
    u = _polynomial(r, r.randint(1, 2), 6).as_expr()
    k = r.choice((1, 2, 3, 4, 5, -1, -2))
    v = r.choice((sin(k * x), cos(k * x), exp(k * x), log(abs(k) * x)))
    du, dv = sympy.diff(u, x), sympy.diff(v, x)
    return (
        f"Differentiate f(x) = ({_show(u)})*{_show(v)}.\nProduct rule with u = {_show(u)} and v = {_show(v)}.\n"
        f"u' = {_show(du)}\nv' = {_show(dv)}\nf' = u'*v + u*v' = {_show(du * v + u * dv)}"
    )


def _chain_rule(r: random.Random) -> str:
    inner = _polynomial(r, r.randint(1, 3), 7).as_expr()
    outer = r.choice((sin, cos, exp))
    name, slope = outer.__name__, sympy.diff(inner, x)
    return (
        f"Differentiate f(x) = {name}({_show(inner)}).\nChain rule: the inside is g(x) = {_show(inner)} with g'(x) = "
        f"{_show(slope)}.\nf'(x) = {_show(sympy.diff(outer(inner), x))}"
    )


def _factorisation(r: random.Random) -> str:
    roots = sorted(r.randint(-9, 9) for _ in range(r.choice((2, 3))))
    lead = r.choice((1, 1, 2, 3))
    p = Poly(lead, x)
    for root in roots:
        p *= Poly([1, -root], x)
    factored = sympy.factor(p.as_expr())
    zeros = ", ".join(f"x = {root}" for root in dict.fromkeys(roots))
    return f"Factor {_show(p.as_expr())}.\nIt vanishes at {zeros}.\n{_show(p.as_expr())} = {_show(factored)}"


def _expansion(r: random.Random) -> str:
    a, b = _polynomial(r, 1, 9), _polynomial(r, r.choice((1, 2)), 9)
    lines = [f"Expand ({_show(a.as_expr())})*({_show(b.as_expr())})."]
    for (power,), factor in a.terms():
        piece = Poly({(power,): factor}, x)
        lines.append(f"  {_show(piece.as_expr())} * ({_show(b.as_expr())}) = {_show((piece * b).as_expr())}")
    return "\n".join([*lines, f"Together: {_show((a * b).as_expr())}"])


def _polynomial_division(r: random.Random) -> str:
    a, root = _polynomial(r, 3, 8), r.choice([k for k in range(-5, 6) if k])
    quotient, rest = a.div(Poly([1, -root], x))
    return (
        f"Divide {_show(a.as_expr())} by {_show(x - root)}.\nThe quotient is {_show(quotient.as_expr())} and the "
        "remainder is "
        f"{rest.as_expr()}.\nCheck by the remainder theorem: the value at x = {root} is {a.eval(root)}."
    )


def _determinant(r: random.Random) -> str:
    a, b, c, d = (r.randint(-9, 9) for _ in range(4))
    determinant = sympy.Integer(a * d - b * c)
    lines = [
        f"Find the determinant and the inverse of [[{a}, {b}], [{c}, {d}]].",
        f"({a})*({d}) - ({b})*({c}) = {determinant}",
    ]
    if determinant == 0:
        return "\n".join([*lines, "The determinant is 0, so there is no inverse."])
    inverse = [[str(value / determinant) for value in row] for row in ((d, -b), (-c, a))]
    return "\n".join([*lines, f"Inverse: [[{', '.join(inverse[0])}], [{', '.join(inverse[1])}]]"])


def _extremum(r: random.Random) -> str:
    a, h, k = r.choice((-3, -2, -1, 1, 2, 3)), r.randint(-8, 8), r.randint(-20, 20)
    p = Poly(a, x) * Poly([1, -h], x) ** 2 + Poly(k, x)
    kind = "minimum" if a > 0 else "maximum"
    return (
        f"Where does f(x) = {_show(p.as_expr())} have its {kind}?\nf'(x) = {_show(p.diff(x).as_expr())} is zero at "
        f"x = {h}.\n"
        f"f''(x) = {2 * a}, so this is a {kind}.\nThe value there is f({h}) = {p.eval(h)}."
    )


_MAKERS = (
    _derivative_of_polynomial, _integral_of_polynomial, _product_rule, _chain_rule, _factorisation, _expansion,
    _polynomial_division, _determinant, _extremum,
)  # fmt: skip


def problem(r: random.Random) -> str:
    """One problem with its solution; which one, and its numbers, come from ``r``."""
    return r.choice(_MAKERS)(r)
