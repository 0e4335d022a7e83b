"""Families of problems, made from parameters, with answers computed exactly and written in LaTeX."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

Value = int | Fraction | str
"""An exact answer: a number, or LaTeX for what is not rational."""


@dataclass(frozen=True)
class Family:
    """Problems of one kind."""

    parameters: Mapping[str, Sequence[int]]
    """What each parameter may be."""
    texts: tuple[str, ...]
    """The problem in other words each time, with the parameters in braces."""
    answer: Callable[..., Value]
    """The answer from the parameters."""
    hint: str
    """The method in general words; feedback on a wrong answer ends with it."""
    valid: Callable[..., bool] = lambda **_: True
    """Which parameters make a problem that has one answer and is not trivial."""

    def draw(self, rng: random.Random) -> tuple[str, str]:
        """One problem and its answer in LaTeX."""
        while True:
            chosen = {name: rng.choice(values) for name, values in self.parameters.items()}
            if self.valid(**chosen):
                return self.pose(**chosen)

    def pose(self, **chosen: int) -> tuple[str, str]:
        """The problem with these parameters, always in the same words, and its answer in LaTeX."""
        text = self.texts[sum(chosen.values()) % len(self.texts)]
        return text.format(**chosen), latex(self.answer(**chosen))


def latex(value: Value) -> str:
    r"""A value in LaTeX: `7`, `-\frac{5}{6}`; text is LaTeX already."""
    if isinstance(value, str):
        return value
    number = Fraction(value)
    if number.denominator == 1:
        return str(number.numerator)
    sign = "-" if number < 0 else ""
    return rf"{sign}\frac{{{abs(number.numerator)}}}{{{number.denominator}}}"


def root(square: int, factor: int = 1) -> str:
    r"""`factor` times the root of `square`, simplified: `root(12)` is `2\sqrt{3}`, `root(9)` is `3`."""
    outside = next(k for k in range(math.isqrt(square), 0, -1) if square % (k * k) == 0)
    inside, outside = square // (outside * outside), outside * factor
    if inside == 1:
        return str(outside)
    return rf"{'' if outside == 1 else outside}\sqrt{{{inside}}}"


def times_pi(factor: Fraction) -> str:
    r"""A multiple of pi: `\frac{5\pi}{3}`, `4\pi`, `\pi`."""
    top = rf"{'' if factor.numerator == 1 else factor.numerator}\pi"
    return top if factor.denominator == 1 else rf"\frac{{{top}}}{{{factor.denominator}}}"


def solve_pair(a: int, b: int, c: int, d: int, e: int, f: int) -> tuple[Fraction, Fraction]:
    """The solution of ax + by = c and dx + ey = f, by Cramer's rule."""
    determinant = a * e - b * d
    return Fraction(c * e - b * f, determinant), Fraction(a * f - c * d, determinant)


def pair(a: int, b: int, c: int, d: int, e: int, f: int) -> str:
    """The same, as an ordered pair."""
    x, y = solve_pair(a, b, c, d, e, f)
    return f"({latex(x)}, {latex(y)})"


def larger_root(p: int, q: int) -> str:
    """The larger root of x^2 - 2px + q."""
    rest = root(p * p - q)
    return str(p + int(rest)) if rest.isdigit() else f"{p} + {rest}"


def same_colour(a: int, b: int, c: int) -> Fraction:
    """The chance that two of a + b + c things, drawn without putting back, are of the same of three kinds."""
    return Fraction(sum(math.comb(n, 2) for n in (a, b, c)), math.comb(a + b + c, 2))


def arrangements(a: int, b: int, c: int) -> int:
    """Rows of a + b + c things of three kinds."""
    return math.factorial(a + b + c) // (math.factorial(a) * math.factorial(b) * math.factorial(c))


def trailing_zeros(n: int) -> int:
    """Of n factorial."""
    return n // 5 + n // 25 + n // 125 + n // 625


def term(first: int, factor: int, plus: int, n: int) -> int:
    """The n-th term of a sequence in which each is `factor` times the one before, plus `plus`."""
    for _ in range(n - 1):
        first = factor * first + plus
    return first


def exactly_one(n: int, a: int, b: int) -> int:
    """How many of 1 to n are divisible by a or b, but not both."""
    return n // a + n // b - 2 * (n // math.lcm(a, b))


def triangle_area(a: int, b: int, c: int, d: int, e: int, f: int) -> Fraction:
    """Of the triangle (a, b), (c, d), (e, f)."""
    return Fraction(abs((c - a) * (f - b) - (e - a) * (d - b)), 2)


def clock_angle(hour: int, minute: int) -> Fraction:
    """The smaller angle between a clock's hands, in degrees."""
    turned = abs(Fraction(60 * hour - 11 * minute, 2)) % 360
    return min(turned, 360 - turned)


def paths(width: int, height: int, x: int, y: int) -> int:
    """Shortest ways over a grid from (0, 0) to (width, height) that do not pass (x, y)."""
    through = math.comb(x + y, x) * math.comb(width - x + height - y, width - x)
    return math.comb(width + height, width) - through


FAMILIES: dict[str, Family] = {
    "discount": Family(
        {"price": range(40, 400, 4), "off": range(5, 60, 5), "tax": range(2, 25)},
        (
            "A coat costs {price} coins. Its price is lowered by {off} percent, and a tax of {tax} percent is added "
            "to the lowered price. How many coins does a buyer pay? Give an exact value.",
            "A tax of {tax} percent is charged on what is left of a price of {price} coins after a discount of {off} "
            "percent. What is the total in coins? Give an exact value.",
        ),
        lambda price, off, tax: Fraction(price * (100 - off) * (100 + tax), 10_000),
        "Each percentage applies to the amount left by the one before, so multiply the factors instead of adding them.",
    ),
    "growth": Family(
        {"start": range(200, 5000, 100), "percent": range(5, 55, 5), "years": (2, 3)},
        (
            "A deposit of {start} coins grows by {percent} percent each year. By how many coins has it grown after "
            "{years} years? Give the exact value, even if it is not whole.",
        ),
        lambda start, percent, years: start * (Fraction(100 + percent, 100) ** years - 1),
        "Compound growth multiplies by the same factor each time; subtract the start to get the increase.",
    ),
    "mixture": Family(
        {"volume": range(2, 30), "weak": range(5, 40, 5), "strong": range(50, 100, 5), "target": range(15, 80)},
        (
            "How many litres of brine with {strong} percent of salt must be added to {volume} litres with "
            "{weak} percent of salt, so that the mixture has {target} percent of salt?",
        ),
        lambda volume, weak, strong, target: Fraction(volume * (target - weak), strong - target),
        "The amount of salt is kept: set the salt in both parts equal to the salt in the mixture.",
        lambda volume, weak, strong, target: weak < target < strong,
    ),
    "shared_work": Family(
        {"a": range(2, 25), "b": range(2, 25), "c": range(2, 25)},
        (
            "Three pumps fill a tank alone in {a}, {b} and {c} hours. How many hours do they need together?",
            "One printer finishes a job in {a} hours, a second in {b} hours and a third in {c} hours. How many hours "
            "does the job take when all three work at once?",
        ),
        lambda a, b, c: 1 / (Fraction(1, a) + Fraction(1, b) + Fraction(1, c)),
        "Rates add up, times do not: add the shares of the job done in one hour and invert the sum.",
        lambda a, b, c: a < b < c,
    ),
    "mean_speed": Family(
        {"there": range(6, 60), "back": range(6, 60), "distance": range(10, 200, 10)},
        (
            "A cyclist rides {distance} kilometres at {there} km/h and comes back the same way at {back} km/h. What is "
            "the mean speed of the whole ride in km/h?",
        ),
        lambda there, back, distance: Fraction(2 * there * back, there + back),
        "Mean speed is the whole distance over the whole time, not the mean of the speeds.",
        lambda there, back, distance: there != back,
    ),
    "two_equations": Family(
        {name: [n for n in range(-9, 10) if n] for name in "abcdef"},
        (
            "Solve the system ${a}x + ({b})y = {c}$ and ${d}x + ({e})y = {f}$. Give the ordered pair $(x, y)$.",
            "Which ordered pair $(x, y)$ satisfies both ${a}x + ({b})y = {c}$ and ${d}x + ({e})y = {f}$?",
        ),
        pair,
        "Eliminate one unknown by multiples of the equations, and check the pair in both of them.",
        # (2, 3) is also an interval: ordered pairs that could be one are left out
        lambda a, b, c, d, e, f: a * e != b * d and solve_pair(a, b, c, d, e, f)[0] > solve_pair(a, b, c, d, e, f)[1],
    ),
    "quadratic": Family(
        {"double": range(2, 32, 2), "q": range(-60, 80)},
        ("What is the larger solution of $x^2 - {double}x + ({q}) = 0$? Give an exact value.",),
        lambda double, q: larger_root(double // 2, q),
        "Complete the square or use the quadratic formula, and simplify the root.",
        lambda double, q: (double // 2) ** 2 - q > 0,
    ),
    "root_squares": Family(
        {"b": range(2, 40), "c": range(-30, 30)},
        (
            "Let $r$ and $s$ be the roots of $x^2 - {b}x + ({c}) = 0$. What is $r^2 + s^2$?",
            "The equation $x^2 - {b}x + ({c}) = 0$ has the roots $r$ and $s$. Find $r^2 + s^2$.",
        ),
        lambda b, c: b * b - 2 * c,
        "Sum and product of the roots are read off the coefficients; no root needs to be computed.",
        lambda b, c: c != 0 and b * b > 4 * c,
    ),
    "root_inverses": Family(
        {"a": range(2, 10), "b": range(3, 30), "c": range(2, 20)},
        ("Let $r$ and $s$ be the roots of ${a}x^2 - {b}x + {c} = 0$. What is $\\frac{{1}}{{r}} + \\frac{{1}}{{s}}$?",),
        lambda a, b, c: Fraction(b, c),
        "Sum and product of the roots are read off the coefficients; no root needs to be computed.",
        lambda a, b, c: b * b > 4 * a * c,
    ),
    "surds": Family(
        {"a": (2, 3, 5, 6, 7), "k": range(2, 9), "m": range(2, 9), "n": range(2, 9)},
        (
            "Write $\\sqrt{{{a} \\cdot {k}^2}} + \\sqrt{{{a} \\cdot {m}^2}} - \\sqrt{{{a} \\cdot {n}^2}}$ as "
            "a single term.",
        ),
        lambda a, k, m, n: root(a, k + m - n),
        "Take square factors out of every root first; then like roots add up.",
        lambda a, k, m, n: k + m > n,
    ),
    "diagonal": Family(
        {"a": range(2, 24), "b": range(2, 24), "c": range(2, 24)},
        (
            "A box has edges of {a}, {b} and {c} centimetres. How long is its space diagonal in centimetres? "
            "Give an exact value.",
        ),
        lambda a, b, c: root(a * a + b * b + c * c),
        "The square of a space diagonal is the sum of the squares of the three edges; simplify the root.",
        lambda a, b, c: a <= b <= c,
    ),
    "sector": Family(
        {"radius": range(2, 40), "angle": range(10, 350, 5)},
        (
            "What is the area of a sector of a circle of radius {radius} with a central angle of {angle} "
            "degrees? Give it as a multiple of $\\pi$.",
        ),
        lambda radius, angle: times_pi(Fraction(radius * radius * angle, 360)),
        "A sector has the same share of the disc as its angle has of the full turn.",
    ),
    "cone": Family(
        {"radius": range(2, 20), "height": range(2, 30), "cut": (2, 3, 4)},
        (
            "A cone has a base of radius {radius} and a height of {height}. A plane parallel to the base cuts "
            "off its tip, a smaller cone with $\\frac{{1}}{{{cut}}}$ of the height. What volume is left? Give "
            "it as a multiple of $\\pi$.",
        ),
        lambda radius, height, cut: times_pi(Fraction(radius * radius * height, 3) * (1 - Fraction(1, cut**3))),
        "The part cut off is similar to the whole: its volume shrinks with the cube of its height.",
    ),
    "triangle": Family(
        {name: range(-8, 9) for name in "abcdef"},
        ("What is the area of the triangle with the corners $({a}, {b})$, $({c}, {d})$ and $({e}, {f})$?",),
        triangle_area,
        "Half the absolute value of the cross product of two sides is the area of a triangle.",
        lambda a, b, c, d, e, f: triangle_area(a, b, c, d, e, f) > 0,
    ),
    "clock": Family(
        {"hour": range(1, 12), "minute": range(2, 60)},
        ("What is the smaller angle, in degrees, between the hands of a clock {minute} minutes after {hour} o'clock?",),
        clock_angle,
        "The hour hand moves on during the hour as well, by half a degree each minute.",
    ),
    "series": Family(
        {"first": range(-20, 30), "step": [n for n in range(-7, 12) if n], "n": range(12, 60)},
        (
            "The first term of an arithmetic sequence is {first} and each later term is the one before plus "
            "({step}). What is the sum of its first {n} terms?",
        ),
        lambda first, step, n: n * (2 * first + (n - 1) * step) // 2,
        "The sum of an arithmetic sequence is the number of terms times the mean of the first and the last.",
    ),
    "infinite_series": Family(
        {"first": range(1, 50), "p": range(1, 12), "q": range(2, 13)},
        (
            "What is the sum of the infinite geometric series with the first term {first} and the ratio "
            "$-\\frac{{{p}}}{{{q}}}$?",
        ),
        lambda first, p, q: first / (1 + Fraction(p, q)),
        "An infinite geometric series sums to its first term over one minus the ratio; mind the sign of the ratio.",
        lambda first, p, q: p < q and math.gcd(p, q) == 1,
    ),
    "recurrence": Family(
        {"first": range(1, 9), "factor": (2, 3, -2), "plus": [n for n in range(-6, 9) if n], "n": range(5, 9)},
        (
            "A sequence starts with $a_1 = {first}$, and $a_{{k+1}} = {factor} a_k + ({plus})$ for all $k$. "
            "What is $a_{{{n}}}$?",
        ),
        term,
        "Count the steps of a sequence from its first term, and write every term down.",
    ),
    "committee": Family(
        {"a": range(4, 20), "b": range(4, 20), "size": range(3, 7)},
        (
            "A club has {a} painters and {b} potters. In how many ways can it choose a committee of {size} that has at "
            "least one painter and at least one potter?",
        ),
        lambda a, b, size: math.comb(a + b, size) - math.comb(a, size) - math.comb(b, size),
        "Count the complement: take away the choices that leave one kind out.",
    ),
    "flags": Family(
        {"a": range(2, 10), "b": range(2, 10), "c": range(2, 10)},
        (
            "In how many different orders can {a} red, {b} blue and {c} green flags hang in a row, if flags "
            "of one colour look the same?",
        ),
        arrangements,
        "Divide the orders of all things by the orders of those that look the same.",
    ),
    "urn": Family(
        {"a": range(2, 14), "b": range(2, 14), "c": range(2, 14)},
        (
            "An urn holds {a} red, {b} blue and {c} green balls. Two are drawn at once. What is the "
            "probability that they have the same colour?",
        ),
        same_colour,
        "Add the chances of each colour, and mind that the second ball is drawn from fewer.",
    ),
    "grid": Family(
        {"width": range(5, 12), "height": range(5, 12), "x": range(1, 5), "y": range(1, 5)},
        (
            "On a grid, each step goes one unit right or one unit up. How many ways lead from $(0, 0)$ to "
            "$({width}, {height})$ without passing through $({x}, {y})$?",
        ),
        paths,
        "Take the ways through the forbidden point from all ways; those are a product of two counts.",
    ),
    "divisible": Family(
        {"n": range(100, 1000, 7), "a": range(4, 16), "b": range(4, 16)},
        ("How many of the whole numbers from 1 to {n} are divisible by {a} or by {b}, but not by both?",),
        exactly_one,
        "Numbers that both divide are multiples of the least common multiple, and they are in both counts.",
        lambda n, a, b: a < b and b % a != 0,
    ),
    "power_remainder": Family(
        {"base": range(2, 20), "exponent": range(30, 400), "modulus": (7, 9, 11, 13, 17, 19)},
        ("What is the remainder when ${base}^{{{exponent}}}$ is divided by {modulus}?",),
        lambda base, exponent, modulus: pow(base, exponent, modulus),
        "Powers repeat modulo a number: find the length of the cycle and reduce the exponent by it.",
        lambda base, exponent, modulus: math.gcd(base, modulus) == 1 and base % modulus != 1,
    ),
    "zeros": Family(
        {"n": range(60, 1200), "m": range(20, 50)},
        ("How many zeros are at the end of the decimal form of $\\frac{{{n}!}}{{{m}!}}$?",),
        lambda n, m: trailing_zeros(n) - trailing_zeros(m),
        "Count the factors five of a factorial, the second one of each multiple of twenty-five too.",
    ),
    "exponents": Family(
        {"a": range(1, 6), "b": range(1, 6), "c": range(1, 9), "d": range(1, 9)},
        ("For which $x$ is $4^{{{a}x + {c}}} = 8^{{{b}x - {d}}}$?",),
        lambda a, b, c, d: Fraction(-3 * d - 2 * c, 2 * a - 3 * b),
        "Write both sides as powers of the same base and compare the exponents.",
        lambda a, b, c, d: 2 * a != 3 * b,
    ),
}
"""By name; a variant of the task may be one of them."""
