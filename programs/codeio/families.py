"""Families of small Python functions. Each draws its constants and writes one function's source.

A function takes one value of its source type and returns one of its target type: `ints` (a list), `number`, `text`,
`words` (a list), `table` (string keys, whole numbers) or `real` (a decimal). It is total: it raises for no value of its
source type, the empty ones included, so that any two with fitting types can be chained.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

Write = Callable[[Random, str, str], str]
"""(source of random constants, the function's name, its parameter's name) -> source, without a final newline."""

COLOURS = ("red", "blue", "green", "gold", "grey", "pink", "teal")


@dataclass(frozen=True)
class Family:
    """One kind of function."""

    name: str
    source: str
    """The type that it takes."""
    target: str
    """The type that it returns."""
    write: Write


FAMILIES: dict[str, Family] = {}


def _family(source: str, target: str) -> Callable[[Write], Write]:
    def add(write: Write) -> Write:
        name = write.__name__
        FAMILIES[name] = Family(name, source, target, write)
        return write

    return add


def _is(rng: Random, x: str) -> str:
    """A condition on a whole number."""
    m = rng.randint(2, 4)
    return rng.choice((f"{x} % {m} == {rng.randrange(m)}", f"{x} > {rng.randint(2, 12)}", f"{x} % {m} != 0"))


def _change(rng: Random, x: str) -> str:
    """A new whole number from one."""
    a, b = rng.randint(2, 4), rng.randint(1, 9)
    return rng.choice(
        (f"{x} * {a} + {b}", f"{x} + {b}", f"{x} - {b}", f"{b} - {x}", f"{x} // {a}", f"abs({x}) % {b + 2}")
    )


# --- From lists of whole numbers -------------------------------------------------------------------------------------


@_family("ints", "ints")
def keep_or_change(rng: Random, name: str, xs: str) -> str:
    """A loop that changes some elements and changes otherwise, or leaves out, the rest."""
    other = f"out.append({_change(rng, 'x')})" if rng.random() < 0.6 else "continue"
    return f"""def {name}({xs}):
    out = []
    for x in {xs}:
        if {_is(rng, "x")}:
            out.append({_change(rng, "x")})
        else:
            {other}
    return out"""


@_family("ints", "ints")
def running(rng: Random, name: str, xs: str) -> str:
    """A running state, and each of its values."""
    m = rng.randint(11, 29)
    return f"""def {name}({xs}):
    state = {rng.randint(0, 5)}
    out = []
    for x in {xs}:
        state = (state * {rng.randint(1, 3)} + x) % {m}
        out.append(state)
    return out"""


@_family("ints", "ints")
def neighbours(rng: Random, name: str, xs: str) -> str:
    """A value from each element and the next one."""
    values = (
        "{a} - {b} + {c}",
        "{a} + {c} * {b}",
        "max({a}, {b} + {c})",
        "min({a}, {b}) * {c}",
        "abs({a} - {c} * {b})",
    )
    value = rng.choice(values).format(a=f"{xs}[i]", b=f"{xs}[i + 1]", c=rng.randint(2, 4))
    return f"""def {name}({xs}):
    out = []
    for i in range(len({xs}) - 1):
        out.append({value})
    return out"""


@_family("ints", "ints")
def rearrange(rng: Random, name: str, xs: str) -> str:
    """Sorted by a key, then rotated or sliced."""
    m, cut = rng.randint(2, 6), rng.randint(1, 3)
    key = rng.choice((f"(x % {m}, x)", f"(x % {m}, -x)", f"(abs(x - {m * 2}), x)"))
    last = rng.choice((f"ys[{cut}:] + ys[:{cut}]", "ys[::-1]", "ys[::2] + ys[1::2]", f"ys[:{cut}] + ys[-{cut}:]"))
    return f"""def {name}({xs}):
    ys = sorted({xs}, key=lambda x: {key})
    return {last}"""


@_family("ints", "ints")
def two_ends(rng: Random, name: str, xs: str) -> str:
    """Two places that move towards each other."""
    return f"""def {name}({xs}):
    out = []
    i, j = 0, len({xs}) - 1
    while i < j:
        if {xs}[i] + {xs}[j] > {rng.randint(5, 20)}:
            out.append({xs}[i])
            j -= 1
        else:
            out.append({xs}[j] {rng.choice("+-")} {rng.randint(1, 5)})
            i += 1
    return out"""


@_family("ints", "ints")
def columns(rng: Random, name: str, xs: str) -> str:
    """Rows of a grid, folded into one number a column."""
    value = rng.choice(("x * (r + {k})", "x + r * {k}", "x - c * {k}")).format(k=rng.randint(1, 3))
    return f"""def {name}({xs}):
    width = {rng.randint(2, 3)}
    rows = [{xs}[i:i + width] for i in range(0, len({xs}), width)]
    sums = [0] * width
    for r, row in enumerate(rows):
        for c, x in enumerate(row):
            sums[c] += {value}
    return sums"""


@_family("ints", "number")
def fold(rng: Random, name: str, xs: str) -> str:
    """One number from all elements, with a branch in the loop."""
    return f"""def {name}({xs}):
    total = {rng.randint(0, 9)}
    for x in {xs}:
        if {_is(rng, "x")}:
            total += {rng.choice(("x", "x * 2", "x - 1", "x + 3"))}
        elif {_is(rng, "total")}:
            total -= {rng.choice(("x", "2", "5"))}
        else:
            total = {rng.choice(("total * 2", "total + 7", "total // 2"))}
    return total"""


@_family("ints", "number")
def recursive_fold(rng: Random, name: str, xs: str) -> str:
    """Recursion over a list, from its end."""
    step = rng.choice(("{x} - {rest}", "{x} + 2 * {rest}", "max({x}, {rest} - 1)", "{rest} - {x} // 2"))
    rest = rng.choice((f"{name}({xs}[1:])", f"{name}({xs}[2:])"))
    return f"""def {name}({xs}):
    if not {xs}:
        return {rng.randint(1, 9)}
    return {step.format(x=f"{xs}[0]", rest=rest)}"""


@_family("ints", "number")
def streak(rng: Random, name: str, xs: str) -> str:
    """The largest sum of neighbours that fulfil a condition."""
    return f"""def {name}({xs}):
    best, now = 0, 0
    for x in {xs}:
        if {_is(rng, "x")}:
            now += {rng.choice(("abs(x)", "x", "x + 2"))}
        else:
            now = {rng.choice(("0", "now // 2"))}
        if now > best:
            best = now
    return best"""


@_family("ints", "words")
def classify(rng: Random, name: str, xs: str) -> str:
    """A word for each element, by nested conditions."""
    one, two, three, four = rng.sample(COLOURS, 4)
    return f"""def {name}({xs}):
    out = []
    for i, x in enumerate({xs}):
        if {_is(rng, "x")}:
            if {rng.choice(("i % 2 == 0", "i > 1", "x < 8"))}:
                out.append("{one}")
            else:
                out.append("{two}")
        elif {_is(rng, "(x + i)")}:
            out.append("{three}")
        else:
            out.append("{four}" + str(i))
    return out"""


@_family("ints", "table")
def tally(rng: Random, name: str, xs: str) -> str:
    """Sums by remainder."""
    m = rng.randint(2, 4)
    key = rng.choice((f'"r" + str(x % {m})', f'"k" + str(abs(x) // {m + 2})'))
    return f"""def {name}({xs}):
    found = {{}}
    for x in {xs}:
        key = {key}
        found[key] = found.get(key, {rng.randint(0, 3)}) + {rng.choice(("1", "x", "x % 5"))}
    return found"""


@_family("ints", "text")
def spell(rng: Random, name: str, xs: str) -> str:
    """Letters picked by the elements, from a place that moves on."""
    letters = "".join(rng.sample("abcdefgh", rng.randint(4, 6)))
    return f"""def {name}({xs}):
    letters = "{letters}"
    at, out = {rng.randint(0, 3)}, ""
    for x in {xs}:
        at = (at + x) % len(letters)
        out += letters[at]
    return out"""


@_family("ints", "real")
def average(rng: Random, name: str, xs: str) -> str:
    """A mean, to one place; the whole ones are decimals too."""
    weight = rng.choice(("x", "x * 2", "x - 1", "abs(x)"))
    return f"""def {name}({xs}):
    kept = [{weight} for x in {xs} if {_is(rng, "x")}]
    if not kept:
        return {rng.choice(("0.5", "1.0", "2.5"))}
    return round(sum(kept) / len(kept), 1)"""


# --- From numbers ----------------------------------------------------------------------------------------------------


@_family("number", "ints")
def digits(rng: Random, name: str, n: str) -> str:
    """Digits in some base, lowest first."""
    base = rng.choice((2, 3, 4, 5, 7))
    return f"""def {name}({n}):
    rest, out = abs({n}) + {rng.randint(5, 30)}, []
    while rest > 0:
        out.append(rest % {base} {rng.choice(("+ 1", "* 2", "+ len(out)"))})
        rest //= {base}
    return out"""


@_family("number", "ints")
def countdown(rng: Random, name: str, n: str) -> str:
    """A number that shrinks by steps that change."""
    return f"""def {name}({n}):
    left, step, out = abs({n}) % 60 + {rng.randint(5, 15)}, {rng.randint(3, 8)}, []
    while left > 0:
        left -= step
        if {_is(rng, "left")}:
            step += {rng.randint(1, 3)}
        out.append(left)
    return out"""


@_family("number", "number")
def bounce(rng: Random, name: str, n: str) -> str:
    """A number that goes up or down by its remainder, a few times."""
    m = rng.randint(2, 3)
    return f"""def {name}({n}):
    for i in range({rng.randint(3, 5)}):
        if {n} % {m} == 0:
            {n} = {n} // {m} + i
        else:
            {n} = {n} * {rng.randint(2, 3)} - {rng.randint(1, 7)}
    return {n}"""


@_family("number", "number")
def recursive_halving(rng: Random, name: str, n: str) -> str:
    """Recursion on a number, by halves."""
    return f"""def {name}({n}):
    if {n} < {rng.randint(2, 4)}:
        return {n} + {rng.randint(1, 9)}
    if {_is(rng, n)}:
        return {name}({n} // 2) {rng.choice(("+", "-"))} {rng.randint(1, 9)}
    return {name}({n} // 3) * 2 + {n} % {rng.randint(2, 5)}"""


# --- From text -------------------------------------------------------------------------------------------------------


@_family("text", "text")
def shift(rng: Random, name: str, s: str) -> str:
    """Letters moved along the alphabet, by place or by what they are."""
    by = rng.randint(1, 6)
    when = rng.choice(('c in "aeiou"', "i % 2 == 0", "i % 3 == 1", f'c > "{rng.choice("cde")}"'))
    moved = f"chr((ord(c) - 97 + {rng.choice((str(by), 'i'))}) % 26 + 97)"
    return f"""def {name}({s}):
    out = ""
    for i, c in enumerate({s}):
        if c.isalpha() and {when}:
            out += {moved}
        else:
            out {rng.choice(("+= c", "= c + out"))}
    return out"""


@_family("text", "text")
def run_lengths(rng: Random, name: str, s: str) -> str:
    """Each run of one letter, with its length."""
    piece = rng.choice(("c + str(n)", "str(n) + c", "c * (n - 1) + str(n)", "c if n == 1 else c + str(n)"))
    last = rng.choice(("out", "out[::-1]", "out + str(len(out))"))
    return f"""def {name}({s}):
    out, i = "", 0
    while i < len({s}):
        c, n = {s}[i], 1
        while i + n < len({s}) and {s}[i + n] == c:
            n += 1
        out += {piece}
        i += n
    return {last}"""


@_family("text", "text")
def cancel(rng: Random, name: str, s: str) -> str:
    """A stack of letters on which equal neighbours do away with each other."""
    added = rng.choice(("", f"\n            if len(kept) % {rng.randint(3, 4)} == 0:\n                kept += c"))
    return f"""def {name}({s}):
    kept = ""
    for c in {s}:
        if kept and kept[-1] == c:
            kept = kept[:-1]
        else:
            kept += c{added}
    return {rng.choice(("kept", "kept[::-1]"))} + str(len(kept))"""


@_family("text", "words")
def chunks(rng: Random, name: str, s: str) -> str:
    """Pieces of one length, some of them reversed."""
    k = rng.randint(2, 4)
    when = rng.choice((f"i % {2 * k} == 0", "part[0] < part[-1]", f"len(part) == {k}"))
    return f"""def {name}({s}):
    parts = []
    for i in range(0, len({s}), {k}):
        part = {s}[i:i + {k}]
        if {when}:
            part = part[::-1]
        parts.append(part)
    return parts"""


@_family("text", "table")
def letter_places(rng: Random, name: str, s: str) -> str:
    """A number for each letter, from its places."""
    value = rng.choice(("i", "seen[c] + i", "seen[c] * 2 + 1"))
    return f"""def {name}({s}):
    seen = {{}}
    for i, c in enumerate({s}):
        if c in seen:
            seen[c] = {value}
        else:
            seen[c] = {rng.choice(("1", "i + 1", "len(seen)"))}
    return seen"""


@_family("text", "ints")
def walk(rng: Random, name: str, s: str) -> str:
    """A walker that turns or steps at each letter."""
    turn, back = rng.sample("abcde", 2)
    return f"""def {name}({s}):
    x, y, dx, dy = 0, 0, {rng.choice(("1, 0", "0, 1"))}
    for c in {s}:
        if c == "{turn}":
            dx, dy = -dy, dx
        elif c == "{back}":
            x -= dx
            y -= dy
        else:
            x += dx * {rng.randint(1, 3)}
            y += dy
    return [x, y, x * {rng.randint(2, 5)} + y]"""


@_family("text", "number")
def weigh(rng: Random, name: str, s: str) -> str:
    """A number from letters and places."""
    return f"""def {name}({s}):
    total = 0
    for i, c in enumerate({s}):
        if c in "{"".join(rng.sample("abcdefgh", 3))}":
            total += {rng.choice(("i", "ord(c) - 96", "2 * i + 1"))}
        else:
            total = {rng.choice(("total - 1", "total * 2 % 50", "total + len(s_)".replace("s_", s)))}
    return total"""


# --- From lists of words ---------------------------------------------------------------------------------------------


@_family("words", "words")
def select(rng: Random, name: str, ws: str) -> str:
    """Some words, changed and sorted."""
    when = rng.choice(("len(w) % 2 == 0", f"len(w) > {rng.randint(2, 3)}", 'w[-1] in "aeiou"', "i % 3 != 1"))
    new = rng.choice(("w[::-1]", "w[1:] + w[0]", "w + w[0]", "w.upper()"))
    key = rng.choice(("w[-1]", "(len(w), w)", "w[::-1]"))
    return f"""def {name}({ws}):
    kept = []
    for i, w in enumerate({ws}):
        if w and {when}:
            kept.append({new})
        else:
            kept.append(w[:{rng.randint(2, 3)}])
    return sorted([w for w in kept if w], key=lambda w: {key})"""


@_family("words", "text")
def weave(rng: Random, name: str, ws: str) -> str:
    """One letter or more of every word, joined."""
    piece = rng.choice(("w[i % len(w)]", "w[:2]", "w[-1] + w[0]", "w[i % len(w):]"))
    order = rng.choice((ws, f"{ws}[::-1]", f"sorted({ws})"))
    return f"""def {name}({ws}):
    out = ""
    for i, w in enumerate({order}):
        if w:
            out {rng.choice(("+= {p}", "= {p} + out")).format(p=piece)}
    return out"""


@_family("words", "table")
def group(rng: Random, name: str, ws: str) -> str:
    """Lengths summed by a part of the word."""
    key = rng.choice(("w[0]", "w[-1]", "str(len(w))"))
    return f"""def {name}({ws}):
    sums = {{}}
    for w in {ws}:
        if not w:
            continue
        sums[{key}] = sums.get({key}, 0) + {rng.choice(("len(w)", "1", 'w.count("a") + 1'))}
    return sums"""


@_family("words", "ints")
def overlaps(rng: Random, name: str, ws: str) -> str:
    """How alike neighbouring words are."""
    value = rng.choice(("len(set(a) & set(b))", "len(a) * 2 - len(b)", "sum(c in b for c in a)"))
    return f"""def {name}({ws}):
    out = []
    for a, b in zip({ws}, {ws}[1:]):
        shared = {value}
        if shared > {rng.randint(1, 3)}:
            out.append(shared)
        out.append(len(out) {rng.choice("+-")} shared)
    return out"""


# --- From tables -----------------------------------------------------------------------------------------------------


@_family("table", "table")
def adjust(rng: Random, name: str, t: str) -> str:
    """Entries changed or left out, and one that counts what was left out."""
    return f"""def {name}({t}):
    new, dropped = {{}}, 0
    for key, n in {t}.items():
        if {_is(rng, "n")}:
            new[key] = {_change(rng, "n")}
        elif {rng.choice(('key > "c"', "len(new) % 2 == 0"))}:
            new[key + "{rng.choice("xyz")}"] = n
        else:
            dropped += {rng.choice(("1", "n"))}
    new["dropped"] = dropped
    return new"""


@_family("table", "words")
def ranked(rng: Random, name: str, t: str) -> str:
    """Keys by their numbers, some with the number written to them."""
    key = rng.choice((f"({t}[k], k)", f"(-{t}[k], k)", f"({t}[k] % {rng.randint(2, 4)}, k)"))
    return f"""def {name}({t}):
    out = []
    for k in sorted({t}, key=lambda k: {key}):
        if {_is(rng, f"{t}[k]")}:
            out.append(k + str({t}[k]))
        else:
            out.append(k)
    return out"""


@_family("table", "ints")
def sums_in_order(rng: Random, name: str, t: str) -> str:
    """Running sums over the keys in order."""
    return f"""def {name}({t}):
    total, out = 0, []
    for key in sorted({t}{rng.choice(("", ", reverse=True"))}):
        total += {rng.choice(("{t}[key]", "{t}[key] * len(key)", "{t}[key] - len(out)")).format(t=t)}
        out.append(total)
    return out"""
