"""Worked mathematics, generated: problems with their solutions step by step, the same for the same seed.

Plain integer arithmetic does most of it; sympy does the algebra whose answer is best not trusted to us.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from fractions import Fraction

NAMES = (
    "Ada", "Amir", "Bea", "Carl", "Chen", "Dana", "Eli", "Emma", "Finn", "Gita", "Hugo", "Ines", "Ivan", "Jun", "Kai",
    "Lena", "Liam", "Mara", "Noor", "Omar", "Pia", "Ravi", "Sara", "Tom", "Uma", "Vera", "Yuki", "Zoe",
)  # fmt: skip
THINGS = (
    "apples", "books", "cards", "coins", "cups", "eggs", "flowers", "keys", "letters", "marbles", "pencils", "shells",
    "stamps", "stones", "tickets",
)  # fmt: skip
PLACES = ("bakery", "farm", "garden", "kitchen", "library", "market", "museum", "school", "station", "workshop")


def _sum_chain(r: random.Random) -> str:
    numbers = [r.randint(2, r.choice((20, 100, 1000))) for _ in range(r.randint(3, 6))]
    lines, total = ["Add " + ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}."], numbers[0]
    for number in numbers[1:]:
        lines.append(f"{total} + {number} = {total + number}")
        total += number
    return "\n".join([*lines, f"The sum is {total}."])


def _column_addition(r: random.Random) -> str:
    a, b = r.randint(100, 99999), r.randint(100, 99999)
    lines, carry = [f"Compute {a} + {b} digit by digit, from the right."], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        s = x + y + carry
        lines.append(f"{x} + {y}" + (f" + {carry}" if carry else "") + f" = {s}: write {s % 10}, carry {s // 10}.")
        carry = s // 10
    return "\n".join([*lines, f"So {a} + {b} = {a + b}."])


def _simple_sums(r: random.Random) -> str:
    lines = []
    for _ in range(r.randint(4, 9)):
        a, b, sign = r.randint(0, 50), r.randint(0, 50), r.choice("+-*")
        a, b = (max(a, b), min(a, b)) if sign == "-" else (a % 13, b % 13) if sign == "*" else (a, b)
        lines.append(f"{a} {sign} {b} = {a + b if sign == '+' else a - b if sign == '-' else a * b}")
    return "\n".join(lines)


def _product(r: random.Random) -> str:
    a, b = r.randint(12, 999), r.randint(12, 99)
    tens, ones = b // 10 * 10, b % 10
    return (
        f"Multiply {a} by {b}.\nSplit {b} into {tens} + {ones}.\n{a} * {tens} = {a * tens}\n{a} * {ones} = "
        f"{a * ones}\n"
        f"{a * tens} + {a * ones} = {a * b}\nTherefore {a} * {b} = {a * b}."
    )


def _long_division(r: random.Random) -> str:
    divisor, number = r.randint(3, 29), r.randint(200, 9999)
    lines, rest = [f"Divide {number} by {divisor}."], 0
    for digit in str(number):
        value = rest * 10 + int(digit)
        lines.append(f"Bring down {digit}: {value} = {divisor} * {value // divisor} + {value % divisor}.")
        rest = value % divisor
    return "\n".join([*lines, f"{number} = {divisor} * {number // divisor} + {rest}, so the remainder is {rest}."])


def _gcd(r: random.Random) -> str:
    k = r.randint(1, 24)
    a, b = k * r.randint(5, 90), k * r.randint(5, 90)
    lines, x, y = [f"Find the greatest common divisor of {a} and {b} by Euclid's algorithm."], max(a, b), min(a, b)
    while y:
        lines.append(f"{x} = {x // y} * {y} + {x % y}")
        x, y = y, x % y
    return "\n".join([*lines, f"The last remainder that is not zero is {x}, hence gcd({a}, {b}) = {x}."])


def _prime_factors(r: random.Random) -> str:
    n = r.randint(60, 5000)
    lines, rest, factors, p = [f"Write {n} as a product of primes."], n, [], 2
    while p * p <= rest:
        while rest % p == 0:
            lines.append(f"{rest} / {p} = {rest // p}")
            factors.append(p)
            rest //= p
        p += 1
    factors += [rest] if rest > 1 else []
    if len(factors) == 1:
        return f"{lines[0]}\nNo prime up to {math.isqrt(n)} divides {n}, so {n} is prime."
    return "\n".join([*lines, f"{n} = " + " * ".join(map(str, factors))])


def _fractions(r: random.Random) -> str:
    a, b = Fraction(r.randint(1, 15), r.randint(2, 16)), Fraction(r.randint(1, 15), r.randint(2, 16))
    m = math.lcm(a.denominator, b.denominator)
    x, y, sign = a * m, b * m, r.choice("+-")
    value = x + y if sign == "+" else x - y
    return (
        f"Compute {a} {sign} {b}.\nThe common denominator is {m}.\n{a} = {x}/{m} and {b} = {y}/{m}.\n"
        f"{x}/{m} {sign} {y}/{m} = {value}/{m}\nIn lowest terms: {Fraction(int(value), m)}."
    )


def _linear_equation(r: random.Random) -> str:
    x, a, v = r.randint(-20, 20), r.choice([2, 3, 4, 5, 6, 7, 8, 9, 11, 12]), r.choice("xyzntk")
    b = r.randint(1, 60)
    c = a * x + b
    return (
        f"Solve {a}*{v} + {b} = {c} for {v}.\nSubtract {b} on both sides: {a}*{v} = {c - b}.\n"
        f"Divide by {a}: {v} = {c - b}/{a} = {x}.\nCheck: {a}*({x}) + {b} = {a * x} + {b} = {c}."
    )


def _two_sided_equation(r: random.Random) -> str:
    x, a, c = r.randint(-12, 12), r.randint(5, 14), r.randint(1, 4)
    b = r.randint(1, 40)
    d = a * x + b - c * x
    return (
        f"Solve {a}x + {b} = {c}x + {d}.\nSubtract {c}x: {a - c}x + {b} = {d}.\nSubtract {b}: {a - c}x = {d - b}.\n"
        f"Divide by {a - c}: x = {x}."
    )


def _system(r: random.Random) -> str:
    x, y = r.randint(-9, 9), r.randint(-9, 9)
    a, b = r.randint(1, 6), r.randint(1, 6)
    return (
        f"Solve the system\n  {a}x + y = {a * x + y}\n  {b}x - y = {b * x - y}\nAdd the two equations: "
        f"{a + b}x = {(a + b) * x}, so x = {x}.\nPut it into the first: y = {a * x + y} - {a}*({x}) = {y}.\n"
        f"The solution is (x, y) = ({x}, {y})."
    )


def _quadratic(r: random.Random) -> str:
    p, q = r.randint(-12, 12), r.randint(-12, 12)
    b, c = -(p + q), p * q
    disc = b * b - 4 * c
    low, high = sorted((p, q))
    roots = f"x = {low}, a double root" if p == q else f"x = {low} or x = {high}"
    return (
        f"Solve x^2 + ({b})x + ({c}) = 0.\nDiscriminant: ({b})^2 - 4*({c}) = {disc}, and sqrt({disc}) = "
        f"{abs(p - q)}.\n"
        f"x = ({-b} - {abs(p - q)})/2 = {low} or x = ({-b} + {abs(p - q)})/2 = {high}.\nAnswer: {roots}."
    )


def _percent(r: random.Random) -> str:
    price, rate = r.randint(2, 90) * 20, r.choice((5, 10, 15, 20, 25, 30, 40, 50))
    up = r.random() < 0.4
    change = price * rate // 100
    word, sign, end = ("rises", "+", price + change) if up else ("falls", "-", price - change)
    return (
        f"A price of {price} {word} by {rate} percent. What is it now?\n{rate} percent of {price} is "
        f"{price} * {rate} / 100 = {change}.\n{price} {sign} {change} = {end}\nThe new price is {end}."
    )


def _shopping(r: random.Random) -> str:
    name, (a, b) = r.choice(NAMES), r.sample(THINGS, 2)
    n, m, p, q = r.randint(2, 12), r.randint(2, 12), r.randint(2, 15), r.randint(2, 15)
    cost = n * p + m * q
    paid = cost + r.randint(1, 30)
    return (
        f"{name} buys {n} {a} for {p} dollars each and {m} {b} for {q} dollars each at the {r.choice(PLACES)}, and "
        "pays "
        f"with {paid} dollars. How much comes back?\nThe {a} cost {n} * {p} = {n * p} dollars.\nThe {b} cost {m} * "
        f"{q} = "
        f"{m * q} dollars.\nTogether that is {n * p} + {m * q} = {cost} dollars.\n{paid} - {cost} = {paid - cost}\n"
        f"Answer: {paid - cost} dollars."
    )


def _sharing(r: random.Random) -> str:
    (a, b, c), thing = r.sample(NAMES, 3), r.choice(THINGS)
    each, times, more = r.randint(3, 30), r.randint(2, 5), r.randint(1, 20)
    total = each + times * each + each + more
    return (
        f"{a} has {each} {thing}. {b} has {times} times as many as {a}, and {c} has {more} more than {a}. How many "
        f"{thing} "
        f"do they have together?\n{b} has {times} * {each} = {times * each}.\n{c} has {each} + {more} = "
        f"{each + more}.\n"
        f"{each} + {times * each} + {each + more} = {total}\nAnswer: {total} {thing}."
    )


def _journey(r: random.Random) -> str:
    v, t, w, s = r.randint(3, 12) * 10, r.randint(1, 6), r.randint(3, 12) * 10, r.randint(1, 6)
    far = v * t + w * s
    return (
        f"A {r.choice(('train', 'bus', 'truck', 'car'))} drives {t} hours at {v} km per hour, then {s} hours at {w} "
        "km per "
        f"hour. How far does it go, and what is its mean speed?\nFirst part: {v} * {t} = {v * t} km.\nSecond part: "
        f"{w} * {s} "
        f"= {w * s} km.\nTotal: {v * t} + {w * s} = {far} km in {t + s} hours.\nMean speed: {far} / {t + s} = "
        f"{Fraction(far, t + s)} km per hour."
    )


def _ages(r: random.Random) -> str:
    (a, b), x, d, y = r.sample(NAMES, 2), r.randint(4, 40), r.randint(2, 25), r.randint(1, 15)
    return (
        f"{a} is {d} years older than {b}. In {y} years their ages add up to {2 * x + d + 2 * y}. How old is "
        f"{b}?\nLet x be "
        f"{b}'s age now. Then {a} is x + {d}.\nIn {y} years: (x + {y}) + (x + {d} + {y}) = {2 * x + d + 2 * y}.\n"
        f"2x + {d + 2 * y} = {2 * x + d + 2 * y}, so 2x = {2 * x} and x = {x}.\nAnswer: {b} is {x} years old."
    )


def _sequence(r: random.Random) -> str:
    a, d, n = r.randint(-20, 40), r.choice([-7, -5, -4, -3, -2, 2, 3, 4, 5, 6, 7, 8, 9, 11]), r.randint(8, 40)
    last = a + (n - 1) * d
    shown = ", ".join(str(a + i * d) for i in range(4))
    return (
        f"The sequence {shown}, ... is arithmetic. Find term {n} and the sum of the first {n} terms.\nThe "
        f"difference is {d}."
        f"\nTerm {n}: {a} + ({n} - 1)*({d}) = {last}.\nSum: {n} * ({a} + {last}) / 2 = {n * (a + last) // 2}."
    )


def _geometry(r: random.Random) -> str:
    (u, v), k = r.choice([(2, 1), (3, 2), (4, 1), (4, 3), (5, 2), (5, 4), (6, 1)]), r.randint(1, 9)
    a, b, c = k * (u * u - v * v), k * 2 * u * v, k * (u * u + v * v)
    return (
        f"A right triangle has legs {a} and {b}. Find its hypotenuse, perimeter and area.\n{a}^2 + {b}^2 = {a * a} "
        f"+ {b * b} "
        f"= {c * c}, so the hypotenuse is sqrt({c * c}) = {c}.\nPerimeter: {a} + {b} + {c} = {a + b + c}.\nArea: "
        f"{a} * {b} / 2 "
        f"= {a * b // 2}."
    )


def _statistics(r: random.Random) -> str:
    data = [r.randint(1, 40) for _ in range(r.choice((5, 7, 9)))]
    ordered = sorted(data)
    mean = Fraction(sum(data), len(data))
    return (
        f"Find mean and median of {', '.join(map(str, data))}.\nSum: {' + '.join(map(str, data))} = "
        f"{sum(data)}.\nMean: "
        f"{sum(data)} / {len(data)} = {mean}.\nSorted: {', '.join(map(str, ordered))}.\nThe middle value is the "
        "median: "
        f"{ordered[len(data) // 2]}."
    )


def _probability(r: random.Random) -> str:
    red, blue = r.randint(2, 12), r.randint(2, 12)
    n = red + blue
    p = Fraction(red * (red - 1), n * (n - 1))
    return (
        f"A bag holds {red} red and {blue} blue {r.choice(THINGS)}. Two are drawn without putting back. What is the "
        "chance "
        f"that both are red?\nFirst: {red}/{n}. Second: {red - 1}/{n - 1}.\n{red}/{n} * {red - 1}/{n - 1} = "
        f"{red * (red - 1)}/{n * (n - 1)} = {p}"
    )


def _base_conversion(r: random.Random) -> str:
    n, base = r.randint(20, 2000), r.choice((2, 3, 5, 8))
    lines, rest, digits = [f"Write {n} in base {base}."], n, ""
    while rest:
        lines.append(f"{rest} = {base} * {rest // base} + {rest % base}")
        digits, rest = str(rest % base) + digits, rest // base
    return "\n".join([*lines, f"Read the remainders upwards: {digits} in base {base}."])


def _choice(r: random.Random) -> str:
    a, b = r.randint(2, 60), r.randint(2, 60)
    sign, right = r.choice((("+", a + b), ("*", a * b)))
    options = [right, *r.sample([right + k for k in (-10, -2, -1, 1, 2, 10, 11)], 3)]
    r.shuffle(options)
    shown = "\n".join(f"{letter}. {value}" for letter, value in zip("ABCD", options, strict=True))
    return f"What is {a} {sign} {b}?\n{shown}\nAnswer: {'ABCD'[options.index(right)]}"


PLAIN: list[tuple[Callable[[random.Random], str], int]] = [
    (_sum_chain, 5), (_column_addition, 4), (_simple_sums, 5), (_product, 5), (_long_division, 4), (_gcd, 4),
    (_prime_factors, 3), (_fractions, 4), (_linear_equation, 5), (_two_sided_equation, 4), (_system, 4),
    (_quadratic, 4),
    (_percent, 3), (_shopping, 5), (_sharing, 5), (_journey, 4), (_ages, 4), (_sequence, 4), (_geometry, 1),
    (_statistics, 3), (_probability, 1), (_base_conversion, 3), (_choice, 3),
]  # fmt: skip


def documents(seed: int, size: int, *, symbolic: int) -> Iterator[str]:
    """Distinct documents until about ``size`` bytes are reached, the symbolic ones spread evenly among the others.

    Args:
        seed: of the numbers.
        size: bytes of UTF-8.
        symbolic: how many documents sympy makes (each takes it about 5 ms).
    """
    r = random.Random(seed)
    makers, weights = zip(*PLAIN, strict=True)
    seen: set[str] = set()
    made = algebra = 0
    while made < size:
        due = algebra * size < made * symbolic
        if due:
            algebra += 1
            from lightning_opt.data import algebra_problems

            text = algebra_problems.problem(r)
        else:
            text = r.choices(makers, weights)[0](r)
        if text not in seen:
            seen.add(text)
            made += len(text.encode())
            yield text
