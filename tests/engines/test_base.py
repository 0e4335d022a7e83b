from types import SimpleNamespace

import pytest

from fst_optimizer.engines.base import end_ids, not_served
from fst_optimizer.errors import EngineError, RetiredVersion


@pytest.mark.parametrize(
    ("models", "tokenizers", "expected"),
    [(5, 5, [5]), ([5, 6], 7, [5, 6, 7]), (None, 7, [7]), (5, None, [5]), ((5, 6), 6, [5, 6])],
)
def test_turns_end_at_the_models_tokens_and_the_tokenizers(models, tokenizers, expected):
    assert end_ids(SimpleNamespace(eos_token_id=models), SimpleNamespace(eos_token_id=tokenizers)) == expected


def test_a_model_without_an_end_of_turn_token_is_refused():
    nothing = SimpleNamespace(eos_token_id=None)
    with pytest.raises(EngineError, match="names an end-of-turn token"):
        end_ids(nothing, nothing)


def test_a_version_that_is_not_served_is_named_with_those_that_are():
    error = not_served(3, {2, 0})
    assert isinstance(error, RetiredVersion)
    assert str(error) == "policy version 3 is not served any more; these are: 0, 2"
