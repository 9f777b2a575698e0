"""The registry of methods, and their options."""

from dataclasses import asdict, dataclass, fields, replace

import pytest

from magnification_invariant.tasks import DANN, ERM, TASKS, Task, check_options, get_task, option, register


def test_methods_by_name():
    names = ["erm", "dann", "degraded", "gan", "cdann", "coral", "mixstyle", "multitask"]
    assert list(TASKS) == [*names, "two_view", "scale_pairs", "frozen"]
    assert get_task("erm") is ERM
    assert get_task("magnification_invariant.tasks.dann:DANN") is DANN
    with pytest.raises(ValueError, match="choose from erm, dann"):
        get_task("dan")
    with pytest.raises(ValueError, match="cannot import"):
        get_task("no.such:Thing")
    with pytest.raises(ValueError, match="not a subclass"):
        get_task("json:loads")
    try:
        own = register("own")(type("Own", (ERM,), {}))
        assert get_task("own") is own and issubclass(own, Task)
    finally:
        TASKS.pop("own")


@pytest.mark.parametrize("name", TASKS)
def test_options_explain_themselves(name):
    """What flags, searches and tables are made from: a help, a search within what is allowed, a full name."""
    options = TASKS[name].Options
    assert options() == options(**asdict(options())) and hash(options()) == hash(options())
    assert fields(options)[0].name == "label_smoothing"
    for each in fields(options):
        help, search, bounds = (each.metadata[key] for key in ("help", "search", "bounds"))
        assert len(help) > 10 and "%" not in help and len(each.name) > 4  # argparse formats help by %
        if search and search[-1] in ("log", "linear"):
            assert 0 < search[0] < search[1]
            values = search[:2]
        else:
            values = search or ()
        for value in values:
            assert getattr(replace(options(), **{each.name: value}), each.name) == value
        if bounds:
            with pytest.raises(ValueError, match=f"{each.name} is at least"):
                options(**{each.name: each.type(bounds[1] + 1)})
    with pytest.raises(TypeError, match="coef"):
        options(coef=1.0)
    with pytest.raises(AttributeError):
        options().label_smoothing = 0.5


def test_values_are_checked_and_of_one_type():
    @dataclass(frozen=True)
    class Options:
        weight: float = option(1.0, "a weight", bounds=(0, 10))
        steps: int = option(3, "steps")
        kind: str = option("a", "kind", choices=("a", "b"))
        on: bool = option(False, "whether")
        __post_init__ = check_options

    assert repr(Options(weight=2)) == repr(Options(weight=2.0))  # equal as text, and so as a digest
    for wrong, why in (
        ({"weight": "x"}, "weight is of type float, not 'x'"),
        ({"weight": float("nan")}, "weight is at least 0 and at most 10, not nan"),
        ({"steps": 1.0}, "steps is of type int, not 1.0"),
        ({"steps": True}, "steps is of type int, not True"),
        ({"on": 1}, "on is of type bool, not 1"),
        ({"kind": "c"}, "unknown kind 'c': choose from a, b"),
    ):
        with pytest.raises(ValueError, match=why):
            Options(**wrong)
