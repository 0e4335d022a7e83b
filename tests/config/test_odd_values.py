"""Whatever a setting is given, it is taken as it is or refused by name; nothing else is raised."""

import json
import math

import pytest

from fst_optimizer import UserError
from fst_optimizer.config.policy import LoraConfig
from fst_optimizer.config.run import FSTConfig
from helpers.settings import SETTINGS, full_name

NUMBERS = [0, -1, 1, 1.5, -0.0, 5e-324, 1e308, 2**63, 10**400, -(10**400)]
NOT_NUMBERS = [math.nan, math.inf, -math.inf, True, False, "8", "", b"8", 1j, object]
HOLDERS = [[], [1], [0.9, math.nan], {}, {"a": 1}, {1: 2}, {"a": [1, math.inf]}, {"a": "trian"}, (), ({},)]


@pytest.mark.parametrize(("section", "name"), SETTINGS, ids=[full_name(*one) for one in SETTINGS])
def test_an_odd_value_is_taken_as_it_is_or_refused_by_name(section, name):
    default = getattr(section(), name)
    for value in (None, *NUMBERS, *NOT_NUMBERS, *HOLDERS):
        try:
            made = section(**{name: value})
        except UserError as refused:
            assert full_name(section, name) in str(refused)
            assert ": " in str(refused)
            continue
        taken = getattr(made, name)
        assert isinstance(taken, bool) == isinstance(default, bool) or default is None
        assert value in ({}, []) or taken in (value, str(value))  # what is read as text, as GPUs are
        assert section(**json.loads(json.dumps(made.to_dict(), allow_nan=False))) == made


@pytest.mark.parametrize("value", [math.nan, math.inf, True, "8", b"8", 1j])
def test_no_number_is_made_of_what_is_none(value):
    taken = []
    for section, name in SETTINGS:
        default = getattr(section(), name)
        if isinstance(default, int | float) and not isinstance(default, bool):
            try:
                taken.append((full_name(section, name), section(**{name: value})))
            except UserError:
                continue
    assert taken == []


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: FSTConfig(fast={1: 2}), r"config: fast is \{1: 2\}: give an object of settings"),
        (lambda: FSTConfig.from_dict({"fast": {1: 2}}), r"config: fast is \{1: 2\}: give an object of settings"),
        (lambda: FSTConfig.from_dict({1: 2}), r"config is \{1: 2\}: give an FSTConfig or an object of settings"),
        (lambda: FSTConfig(seed=2**63), "seed is 9223372036854775808: give a whole number of at least 0 and below"),
        (lambda: LoraConfig(target_modules=[]), r"lora.target_modules is \[\]: give a list of names"),
    ],
)
def test_values_that_used_to_break_later(make, named):
    with pytest.raises(UserError, match=named):
        make()
