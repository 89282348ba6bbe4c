import pytest

from sam_ext.errors import ConfigError
from sam_ext.resolution import ResolutionPolicy, default_policy

SQUARE = ResolutionPolicy()
NATIVE = ResolutionPolicy(mode="native", min_side=48, max_side=96)
BUDGET = ResolutionPolicy(mode="budget", max_tokens=12)


@pytest.mark.parametrize(
    ("policy", "image_hw", "input_size", "padded_size"),
    [
        pytest.param(SQUARE, (480, 640), (48, 64), (64, 64), id="square, larger"),
        pytest.param(SQUARE, (20, 10), (64, 32), (64, 64), id="square, smaller"),
        pytest.param(SQUARE, (75, 133), (36, 64), (64, 64), id="square, rounded"),
        pytest.param(SQUARE, (1, 900), (1, 64), (64, 64), id="square, very thin"),
        pytest.param(NATIVE, (50, 70), (50, 70), (64, 80), id="native, as it is"),
        pytest.param(NATIVE, (48, 32), (48, 32), (48, 32), id="native, no padding needed"),
        pytest.param(NATIVE, (20, 10), (48, 24), (48, 32), id="native, smaller"),
        pytest.param(NATIVE, (75, 200), (36, 96), (48, 96), id="native, larger"),
        pytest.param(NATIVE, (1, 900), (1, 96), (16, 96), id="native, very thin"),
        pytest.param(BUDGET, (300, 400), (48, 64), (48, 64), id="budget, the grid fits exactly"),
        pytest.param(BUDGET, (10, 10), (48, 48), (48, 48), id="budget, enlarged, 9 of 12 tokens"),
        pytest.param(BUDGET, (100, 65), (64, 42), (64, 48), id="budget, a column is padded"),
        pytest.param(BUDGET, (1, 900), (1, 192), (16, 192), id="budget, very thin"),
    ],
)
def test_sizes(policy, image_hw, input_size, padded_size):
    assert policy.input_size(image_hw, train_side=64) == input_size
    assert policy.padded_size(input_size, train_side=64) == padded_size


def test_a_budget_is_used_up_and_never_passed():
    """One pixel more on the long side would need a token too many."""
    policy = ResolutionPolicy(mode="budget", max_tokens=50)
    for image_hw in [(h, w) for h in (7, 30, 111, 640) for w in (9, 45, 333)]:
        height, width = policy.input_size(image_hw, train_side=64, patch_size=4)
        assert -(-height // 4) * -(-width // 4) <= 50
        scale = (max(height, width) + 1) / max(image_hw)
        larger = [-(-round(side * scale, 6) // 4) for side in image_hw]
        assert larger[0] * larger[1] > 50


def test_the_patch_size_counts():
    assert NATIVE.padded_size((50, 70), train_side=64, patch_size=8) == (56, 72)
    assert BUDGET.input_size((300, 400), train_side=64, patch_size=8) == (24, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            {"mode": "full"},
            "ResolutionPolicy.mode must be square, native or budget, got 'full'",
            id="mode",
        ),
        pytest.param(
            {"mode": "native", "min_side": 64},
            "ResolutionPolicy.max_side must be at least 1 with mode 'native', got None",
            id="native without its bound",
        ),
        pytest.param(
            {"mode": "budget", "max_tokens": 0},
            "ResolutionPolicy.max_tokens must be at least 1 with mode 'budget', got 0",
            id="no tokens",
        ),
        pytest.param(
            {"max_side": 64},
            "ResolutionPolicy.max_side must be None with mode 'square', got 64; "
            "it would do nothing",
            id="a bound that does nothing",
        ),
        pytest.param(
            {"mode": "native", "min_side": 65, "max_side": 64},
            "ResolutionPolicy.min_side must be at most max_side, got 65 and 64",
            id="bounds crossed",
        ),
    ],
)
def test_a_policy_that_says_nothing_is_refused(arguments, message):
    with pytest.raises(ConfigError) as raised:
        ResolutionPolicy(**arguments)
    assert str(raised.value) == message


@pytest.mark.parametrize(("train_side", "side"), [(256, 384), (1024, 1024)])
def test_default_policies_enlarge_and_reduce_to_one_side(train_side, side):
    policy = default_policy(train_side)
    for image_hw in [(60, 80), (300, 200), (2448, 3264)]:
        assert max(policy.input_size(image_hw, train_side=train_side)) == side


def test_padding_to_larger_units_leaves_few_shapes():
    policy = ResolutionPolicy(mode="native", min_side=100, max_side=300, pad_to=24)
    sizes = {"train_side": 64, "patch_size": 16}
    assert policy.padded_size((49, 200), **sizes) == (96, 240)
    assert policy.input_size((49, 200), **sizes) == (49, 200)
    assert ResolutionPolicy(pad_to=24).padded_size((49, 64), **sizes) == (64, 64)
    with pytest.raises(ConfigError, match="pad_to must be at least 1, got 0"):
        ResolutionPolicy(pad_to=0)
