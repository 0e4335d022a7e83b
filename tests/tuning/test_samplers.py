import optuna
import pytest

from fst_optimizer.errors import UserError
from fst_optimizer.tuning.samplers import SAMPLERS, check_sampler, make_sampler


def test_samplers_by_name():
    with pytest.raises(UserError, match="did you mean 'tpe'"):
        make_sampler("tpee", 0)
    with pytest.raises(UserError, match="one objective"):
        check_sampler("cmaes", 2)
    made = []
    for name in SAMPLERS:
        try:
            made.append(make_sampler(name, 0))
        except UserError as error:
            assert name in ("cmaes", "gp") and "not installed" in str(error)
    assert len({type(sampler) for sampler in made}) == len(made) >= 6


def test_tpe_is_multivariate_with_a_constant_liar():
    sampler = make_sampler("tpe", 0)
    assert sampler._multivariate and sampler._constant_liar and sampler._group


def test_a_study_that_goes_on_does_not_draw_its_first_trials_again():
    def first_draw(*parts):
        study = optuna.create_study(sampler=make_sampler("random", 7, *parts))
        return study.ask().suggest_float("x", 0, 1)

    assert first_draw(0, 0) == first_draw(0, 0)
    assert len({first_draw(0, 0), first_draw(1, 0), first_draw(0, 24)}) == 3
