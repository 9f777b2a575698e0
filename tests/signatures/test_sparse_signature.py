"""SparseSignature as a scikit-learn citizen."""

from sklearn.utils.estimator_checks import parametrize_with_checks

from magnification_invariant.signatures import SparseSignature


@parametrize_with_checks([SparseSignature(n_lambdas=8, cv=2)])
def test_scikit_learn_conventions(estimator, check):
    check(estimator)
