"""The data of a run: ids, the held-out fifth, and an order of batches that follows from the seed alone."""

from __future__ import annotations

import hashlib
import json
import math
import random
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fst_optimizer.errors import UserError
from fst_optimizer.text import shown
from fst_optimizer.types import Group, Item, items_of

if TYPE_CHECKING:
    import dspy

HELD_OUT_SHARE = 5
"""Without a validation set, one example in this many is held out of the training set."""


@dataclass(frozen=True)
class Stage:
    """One task of a stream."""

    name: str
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    """Scores on it are for the record: they choose nothing."""


def stages_of(stages: Any, valsets: Any, seed: int) -> tuple[Stage, ...]:
    """The stages of a stream from `(name, trainset)` pairs; ids begin with the stage's number, as ids must differ.

    Without `valsets` a seeded fifth of every stage's trainset is held out.

    Raises:
        UserError: fewer than two pairs, names that are no names or come twice, data that are none, or validation sets
            of other names.
    """
    pairs = list(stages) if isinstance(stages, Iterable) and not isinstance(stages, str | Mapping) else []
    if len(pairs) < 2 or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise UserError(f"stages is {shown(stages)}: give two or more pairs of a name and a trainset")
    names = [name for name, _ in pairs]
    if bad := [name for name in names if not isinstance(name, str) or not name or names.count(name) > 1]:
        raise UserError(f"stages has the name {bad[0]!r}: give every stage a name of its own, a text")
    if valsets is not None and (not isinstance(valsets, Mapping) or set(valsets) != set(names)):
        given = shown(list(valsets)) if isinstance(valsets, Mapping) else shown(valsets)
        raise UserError(f"valsets has {given}: give an object with the examples of every stage ({', '.join(names)})")
    found = []
    for number, (name, trainset) in enumerate(pairs, 1):
        train, val = split_data(trainset, None if valsets is None else valsets[name], seed)
        own = [tuple(replace(item, id=f"{number}/{item.id}") for item in items) for items in (train, val)]
        found.append(Stage(name, *own))
    return tuple(found)


def split_data(
    trainset: Sequence[dspy.Example], valset: Sequence[dspy.Example] | None, seed: int
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Training and validation items. `valset=None` holds a seeded fifth of the training set out.

    Raises:
        UserError: nothing to train on or to validate on.
    """
    trainset, valset = check_examples(trainset, valset)
    if valset is None:
        order = list(range(len(trainset)))
        random.Random(f"held-out/{seed}").shuffle(order)
        held = set(order[: max(1, len(order) // HELD_OUT_SHARE)])
        everything = items_of(trainset, "train")
        return (
            tuple(item for index, item in enumerate(everything) if index not in held),
            tuple(item for index, item in enumerate(everything) if index in held),
        )
    shared = {fingerprint(example) for example in trainset} & {fingerprint(example) for example in valset}
    if shared:
        warnings.warn(
            f"trainset and valset share {len(shared)} example(s): validation scores will flatter the result",
            stacklevel=6,
        )
    return items_of(trainset, "train"), items_of(valset, "val")


def check_examples(
    trainset: Sequence[dspy.Example], valset: Sequence[dspy.Example] | None
) -> tuple[list[dspy.Example], list[dspy.Example] | None]:
    """The two as lists, where there is something to train on and to validate on.

    Raises:
        UserError: a set is empty, or an example is none, does not name its inputs, or has a field that is no text.
    """
    trainset, valset = listed(trainset, "trainset"), None if valset is None else listed(valset, "valset")
    if not trainset:
        raise UserError("trainset is empty: give at least one example")
    for example in (*trainset, *(valset or ())):
        fingerprint(example)  # raises where it is no dspy.Example or names no inputs
    if valset is None and len(trainset) < 2:
        raise UserError("trainset has one example and valset is None: give more examples, or a valset")
    if valset is not None and not valset:
        raise UserError("valset is empty: give examples, or None to hold a fifth of the trainset out")
    return trainset, valset


def listed(examples: Sequence[dspy.Example], name: str) -> list[dspy.Example]:
    """The examples of the argument `name` (`trainset`, ...), each of which can be written down.

    Raises:
        UserError: they are no list of examples, or one has a field that is no text.
    """
    import dspy

    if isinstance(examples, str | bytes | Mapping | Set) or not isinstance(examples, Iterable):
        raise UserError(f"{name} is {shown(examples)}: give a list of dspy.Example")
    found = list(examples)
    for index, example in enumerate(found):
        if not isinstance(example, dspy.Example):
            raise UserError(
                f"{name}: example {index} is {shown(example)}, which is {type(example).__name__}: give a dspy.Example"
            )
    check_fields(found, name.removesuffix("set"))
    return found


def check_fields(examples: Sequence[dspy.Example], split: str) -> None:
    """Every field can be written down, in prompts and in files.

    Raises:
        UserError: names the example and its field.
    """
    for index, example in enumerate(examples):
        for name, value in example.items() if hasattr(example, "items") else ():
            if problem := _problem_of(value):
                raise UserError(f"example {split}-{index}: its field {name!r} {problem}")


def _problem_of(value: object) -> str:
    """Why a value cannot be written down; empty if it can."""
    try:
        json.dumps(value, sort_keys=True, default=_both_texts, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = shown(error.object[error.start : error.end][:1])
        return f"holds half a character ({half}): clean it, e.g. text.encode('utf-8', 'replace').decode()"
    except RecursionError:
        return "is nested too deeply, or contains itself: give plain data"
    except Exception as error:
        if "Circular reference" in str(error):
            return "contains itself: give plain data"
        return f"cannot be turned into text ({shown(error)}): give plain data"
    return ""


def _both_texts(value: object) -> str:
    return f"{value!r} {value!s}"


def fingerprint(example: dspy.Example) -> str:
    """A hash of an example's inputs: two examples that ask the same are the same."""
    try:
        asked = dict(example.inputs())
    except AttributeError as error:
        raise UserError(f"example {example!r} is {type(example).__name__}: give a dspy.Example") from error
    except ValueError as error:
        raise UserError(
            f"example {example!r} does not say which fields are inputs: call .with_inputs(...) on it"
        ) from error
    text = json.dumps(asked, sort_keys=True, default=repr, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def batch_at(items: Sequence[Item], index: int, size: int, seed: int) -> tuple[Item, ...]:
    """Batch number `index` of an endless stream: every epoch is a new shuffle, and no state is kept.

    A batch may span two epochs, and never holds an example twice unless it is larger than the data.
    """
    size = min(size, len(items))
    return _in_order(items, index * size, size, seed)


def undecided_batch(
    items: Sequence[Item], index: int, size: int, seed: int, known: Mapping[str, Success]
) -> tuple[Item, ...]:
    """The same with one half in that order and the other drawn by how undecided examples are (`by_undecided`).

    The first half is why no example starves: all have their turn within two epochs, whatever is known of them.
    """
    size = min(size, len(items))
    before, after = index * size // 2, (index + 1) * size // 2
    turns = _in_order(items, before, after - before, seed)
    own = {item.id for item in turns}
    others = [item for item in items if item.id not in own]
    return (*turns, *by_undecided(others, known, f"undecided/{seed}/{index}")[: size - len(turns)])


@dataclass(frozen=True)
class Success:
    """How an example went in slow steps lately."""

    mean: float
    """Of its scores, from 0 to 1."""
    square: float
    """Mean of their squares."""
    groups: int = 1

    @property
    def undecided(self) -> float:
        """Four times the variance of its scores: 1 where half of them are 1 and half 0; 0 where all are the same."""
        return min(1.0, 4 * max(0.0, self.square - self.mean**2))


NEWEST = 0.3
"""Weight of an example's newest group in what is known of it; of the first ones more, so that all count the same."""
DECIDED = 0.1
"""Weight of an example in a drawing whose scores are all the same, beside 1 of one that is not known or undecided."""
MOST_KNOWN = 5000
"""Examples of which a run remembers how they went, those of the last steps."""


def by_undecided(items: Sequence[Item], known: Mapping[str, Success], name: str) -> list[Item]:
    """All items, drawn one after the other, the more undecided ones with larger weights; `name` is the seed.

    Source: P. Efraimidis and P. Spirakis, Weighted random sampling with a reservoir (2006).
    """
    rng = random.Random(name)
    weights = [known[item.id].undecided if item.id in known else 1.0 for item in items]
    waits = [-math.log(1.0 - rng.random()) / (DECIDED + (1 - DECIDED) * weight) for weight in weights]
    return [items[place] for place in sorted(range(len(items)), key=waits.__getitem__)]


def with_groups(known: Mapping[str, Success], groups: Sequence[Group]) -> dict[str, Success]:
    """What is known of examples after these groups. Scores outside [0, 1] count as the nearest in it."""
    found = dict(known)
    for group in groups:
        scores = [min(1.0, max(0.0, one.score)) for one in group.rollouts if not one.lost]
        if not scores:
            continue
        now = Success(math.fsum(scores) / len(scores), math.fsum(score**2 for score in scores) / len(scores))
        if old := found.pop(group.example_id, None):  # what was seen last comes last
            weight = max(NEWEST, 1 / (old.groups + 1))
            mean, square = (
                old_value + weight * (value - old_value)
                for old_value, value in ((old.mean, now.mean), (old.square, now.square))
            )
            now = Success(mean, square, old.groups + 1)
        found[group.example_id] = now
    return dict(list(found.items())[-MOST_KNOWN:])


def _in_order(items: Sequence[Item], position: int, size: int, seed: int) -> tuple[Item, ...]:
    """The next `size` different items from a position of the endless stream on."""
    batch: dict[str, Item] = {}
    while len(batch) < size:
        epoch, offset = divmod(position, len(items))
        order = list(range(len(items)))
        random.Random(f"epoch/{seed}/{epoch}").shuffle(order)
        for place in order[offset:]:
            if len(batch) == size:
                break
            position += 1
            batch.setdefault(items[place].id, items[place])
    return tuple(batch.values())
