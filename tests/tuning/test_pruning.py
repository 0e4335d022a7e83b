import optuna
import pytest
from hypothesis import given, settings, strategies
from optuna.trial import TrialState, create_trial

from fst_optimizer.errors import UserError
from fst_optimizer.tuning.pruning import (
    SCORES,
    SmallHyperband,
    WilcoxonOnGrid,
    check_pruner,
    clearly_below,
    make_pruner,
)

optuna.logging.set_verbosity(optuna.logging.WARNING)


def by_example(*values):
    return {f"e{number}": value for number, value in enumerate(values)}


def test_five_examples_that_are_all_worse_are_clearly_below():
    # All five differences are negative: one of 2^5 equally likely patterns of signs, p = 1/32 = 0.031.
    ours, theirs = by_example(0.1, 0.2, 0.3, 0.4, 0.5), by_example(0.2, 0.4, 0.6, 0.8, 1.0)
    assert clearly_below(ours, theirs, 0.05)
    assert not clearly_below(ours, theirs, 0.03)
    # Four of them are not enough: 1/16 = 0.0625.
    assert not clearly_below(by_example(0.1, 0.2, 0.3, 0.4), by_example(0.2, 0.4, 0.6, 0.8), 0.05)


def test_equal_scores_and_better_ones_are_not_below():
    same = by_example(*[0.5] * 20)
    assert not clearly_below(same, same)
    assert not clearly_below(by_example(*[0.9] * 20), same)
    assert not clearly_below({}, same)
    assert not clearly_below({"other": 0.0}, same)


@settings(max_examples=50, deadline=None)
@given(strategies.lists(strategies.floats(0, 1), min_size=2, max_size=30), strategies.floats(0, 1))
def test_at_most_one_of_two_is_clearly_below_the_other(values, shift):
    ours, theirs = by_example(*values), by_example(*[max(0.0, value - shift) for value in values])
    assert not (clearly_below(ours, theirs) and clearly_below(theirs, ours))
    assert not clearly_below(ours, theirs)


def study_with(pruner, *trials):
    study = optuna.create_study(direction="maximize", pruner=pruner)
    study.add_trials(trials)
    return study


def ended(value, intermediate, **attrs):
    return create_trial(value=value, intermediate_values=intermediate, user_attrs=attrs)


def test_wilcoxon_compares_with_the_best_trial_at_the_same_point():
    good, bad = by_example(*[1.0] * 10), by_example(*[0.0] * 10)
    best = ended(0.9, {1: 0.1, 2: 1.0}, **{SCORES: {"1": bad, "2": good}})
    study = study_with(WilcoxonOnGrid(), best, ended(0.2, {2: 0.2}, **{SCORES: {"2": bad}}))
    trial = study.ask()
    trial.set_user_attr(SCORES, {"1": bad})
    trial.report(0.0, 1)
    assert not trial.should_prune()  # the best trial was as bad at the first point
    trial.set_user_attr(SCORES, {"1": bad, "2": bad})
    trial.report(0.0, 2)
    assert trial.should_prune()


def test_wilcoxon_prunes_nothing_before_a_trial_is_complete():
    study = study_with(WilcoxonOnGrid())
    trial = study.ask()
    assert not trial.should_prune()
    trial.set_user_attr(SCORES, {"1": by_example(*[0.0] * 10)})
    trial.report(0.0, 1)
    assert not trial.should_prune()


def test_hyperband_keeps_a_third_at_each_rung():
    study = optuna.create_study(direction="maximize", pruner=SmallHyperband(9), study_name="by hand")
    hyperband = study.pruner.pruner
    first = study.ask()
    first.report(0.5, 1)
    first.should_prune()
    # floor(log3 8) + 1 brackets, with rungs at 1 and 3 points, and at 3 points.
    assert hyperband._n_brackets == 2
    assert hyperband._trial_allocation_budgets == [3, 2]
    kept = 0
    for number in range(200):
        trial = study.ask()
        for step in range(1, 10):
            trial.report((number * 37 % 200) / 200, step)
            if step < 9 and trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            kept += 1
            study.tell(trial, 0.5)
    # A ninth of the three in five, a third of the two in five: 20%, and some more while there is little to compare.
    assert 0.18 < kept / 200 < 0.3


def test_hyperband_hides_no_trials_from_the_sampler():
    study = study_with(SmallHyperband(9), *[ended(0.1, {1: 0.1}) for _ in range(5)])
    from optuna.pruners import _filter_study

    assert _filter_study(study, study.trials[0]) is study


def test_the_median_waits_for_some_trials():
    study = study_with(make_pruner("median", 9, ("score",)), *[ended(0.5, {1: 0.5}) for _ in range(3)])
    low = study.ask()
    low.report(0.1, 1)
    assert not low.should_prune()
    study.add_trial(ended(0.5, {1: 0.5}))
    assert low.should_prune()


def test_pruners_by_name():
    with pytest.raises(UserError, match="did you mean 'hyperband'"):
        check_pruner("hyperbnad")
    assert isinstance(make_pruner("hyperband", 9, ("score", "rollouts")), optuna.pruners.NopPruner)
    assert isinstance(make_pruner("none", 9, ("score",)), optuna.pruners.NopPruner)
