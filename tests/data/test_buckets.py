"""Buckets against the original's lists and choices."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.buckets import BucketRule, bucket_rule, bucket_sizes, rounded_limits, sort_into_buckets
from library.data.classic import BucketManager
from library.messages import UserError


@pytest.fixture(scope="module")
def cases(golden):
    return json.loads((golden / "datasets_buckets.json").read_text(encoding="utf-8"))


def limits(config):
    return config["min_bucket_reso"], config["max_bucket_reso"], config["bucket_reso_steps"]


def rule_of(config):
    base = tuple(config["resolution"])
    if config["bucket_no_upscale"]:
        return BucketRule(None, base=base, step=config["bucket_reso_steps"])
    return BucketRule(bucket_sizes(base, *limits(config)))


def test_lists_equal_the_original_without_empty_sizes(cases):
    compared = 0
    for config in cases["configs"] + cases["more_lists"]:
        if config.get("bucket_list") is None:
            continue
        # The original lists sizes with a side of 0; they are left out here.
        expected = [tuple(size) for size in config["bucket_list"] if min(size) > 0]
        assert bucket_sizes(tuple(config["resolution"]), *limits(config)) == expected, config
        compared += 1
    assert compared == 27


def test_lists_that_divided_by_zero_are_refused(cases):
    failing = [config for config in cases["more_lists"] if "error" in config]
    assert failing
    for config in failing:
        with pytest.raises(UserError, match="min_bucket_reso"):
            bucket_sizes(tuple(config["resolution"]), *limits(config))


def test_choice_equals_the_original(cases):
    rules = [rule_of(config) for config in cases["configs"]]
    wrong, refused = [], 0
    for case in cases["cases"]:
        fit = rules[case["config"]].fit(tuple(case["image"]))
        if "error" in case or min(case["bucket"]) < 1:
            # A picture smaller than one step: the original failed or made an empty bucket.
            refused += 1
            if fit is not None:
                wrong.append((case, fit))
        elif (list(fit.bucket), list(fit.resized)) != (case["bucket"], case["resized"]) or fit.ratio_error != (
            pytest.approx(case["ar_error"], rel=1e-9, abs=1e-12)
        ):
            wrong.append((case, fit))
    assert not wrong
    assert refused == 5


def test_without_bucketing_one_size_is_covered(cases):
    for case in cases["bucketing_disabled"]:
        fit = bucket_rule(tuple(case["resolution"]), enable=False).fit(tuple(case["image"]))
        assert (list(fit.bucket), list(fit.resized)) == (case["bucket"], case["resized"]), case
        assert fit.ratio_error == pytest.approx(case["ar_error"], rel=1e-9, abs=1e-12)


def test_order_of_buckets(cases):
    for case in cases["bucket_order"]:
        config = cases["configs"][case["config"]]
        manager = BucketManager(
            config["bucket_no_upscale"],
            tuple(config["resolution"]),
            config["min_bucket_reso"],
            config["max_bucket_reso"],
            config["bucket_reso_steps"],
        )
        if not config["bucket_no_upscale"]:
            manager.make_buckets()
        sizes = [tuple(size) for size in case["images"]]
        for number, size in enumerate(sizes):
            manager.add_image(manager.select_bucket(*size)[0], number)
        assert [list(reso) for reso in manager.resos] == case["order_of_creation"]
        manager.sort()
        assert [list(reso) for reso in manager.resos] == case["order_after_sort"]
        assert [manager.reso_to_id[reso] for reso in manager.resos] == list(range(len(manager.resos)))
        rule = rule_of(config)
        buckets = sort_into_buckets([rule.fit(size) for size in sizes], [1] * len(sizes))
        assert [list(size) for size in buckets.sizes] == case["order_after_sort"]
        assert buckets.members == manager.buckets


def test_limits_are_rounded_outwards():
    assert rounded_limits(300, 1000, 64) == (256, 1024)
    assert rounded_limits(256, 1024, 64) == (256, 1024)


@pytest.mark.parametrize(
    ("base", "settings", "word"),
    [
        ((128, 512), {"smallest": 256}, "min_bucket_reso"),
        ((512, 2048), {"largest": 1024}, "max_bucket_reso"),
        ((512, 512), {"smallest": 32, "step": 64}, "min_bucket_reso"),
        ((512, 512), {"step": 0}, "bucket_reso_steps"),
        ((0, 512), {}, "resolution"),
    ],
)
def test_settings_without_a_bucket_are_refused(base, settings, word):
    with pytest.raises(UserError, match=word):
        bucket_rule(base, enable=True, **settings)


def test_info_counts_repeats_and_averages_errors_without_them():
    rule = bucket_rule((512, 512), enable=True)
    fits = [rule.fit(size) for size in [(512, 512), (640, 480)]]
    buckets = sort_into_buckets(fits, [3, 1])
    assert buckets.info() == {
        "buckets": {0: {"resolution": (512, 512), "count": 3}, 1: {"resolution": (576, 448), "count": 1}},
        "mean_img_ar_error": abs(576 / 448 - 640 / 480) / 2,
    }
    assert sort_into_buckets([], []).info() == {"buckets": {}, "mean_img_ar_error": 0.0}


def test_rule_survives_pickling():
    for rule in (bucket_rule((512, 512), enable=True), bucket_rule((512, 512), enable=True, no_upscale=True)):
        assert pickle.loads(pickle.dumps(rule)).fit((1000, 700)) == rule.fit((1000, 700))


@given(
    size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    step=st.sampled_from([8, 32, 64]),
    no_upscale=st.booleans(),
)
def test_resized_picture_covers_a_bucket_of_whole_steps(size, step, no_upscale):
    fit = bucket_rule((512, 448), enable=True, step=step, no_upscale=no_upscale).fit(size)
    if fit is None:
        assert no_upscale and (min(size) < step or max(size) / min(size) > 10)
        return
    assert fit.bucket[0] % step == 0 and fit.bucket[1] % step == 0 and min(fit.bucket) > 0
    assert fit.resized[0] >= fit.bucket[0] and fit.resized[1] >= fit.bucket[1]
    if no_upscale:
        assert fit.resized[0] <= max(size[0], step) and fit.bucket[0] <= size[0] and fit.bucket[1] <= size[1]
