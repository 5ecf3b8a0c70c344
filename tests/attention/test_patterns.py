"""The 14 patterns against predicates of one pair; document lengths against their histograms."""

from __future__ import annotations

import json

import numpy as np
import pytest

from longspan.attention import patterns
from longspan.attention.patterns import DOCUMENT_PATTERNS, PATTERNS
from tests.data import data_dir
from tests.oracles import masks as oracle

NAMES = [
    "full",
    "causal",
    "full_document",
    "causal_document",
    "full_document_long",
    "causal_document_long",
    "share_question",
    "causal_blockwise",
    "prefix_lm_causal",
    "prefix_lm_document",
    "sliding_window",
    "sliding_window_causal",
    "global_sliding_window",
    "block_causal_document",
]
HISTOGRAM = {"[0,4)": 0.5, "[4,10)": 0.3, "[10, 30)": 0.2}


def half(length: int) -> int:
    return round(0.5 * length)


def test_all_fourteen_are_there() -> None:
    assert list(PATTERNS) == NAMES
    assert set(DOCUMENT_PATTERNS) <= set(PATTERNS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [[1], [11], [1, 1], [5, 1, 9, 2, 6]])
def test_pattern_equals_its_predicate(name: str, lengths: list[int]) -> None:
    s = sum(lengths)
    expected = {
        "full": lambda: oracle.full(s),
        "causal": lambda: oracle.causal(s),
        "full_document": lambda: oracle.full_document(s, lengths),
        "causal_document": lambda: oracle.causal_document(s, lengths),
        "full_document_long": lambda: oracle.full_document(s, lengths),
        "causal_document_long": lambda: oracle.causal_document(s, lengths),
        "share_question": lambda: oracle.share_question(s, lengths),
        "causal_blockwise": lambda: oracle.causal_blockwise(s, lengths),
        "prefix_lm_causal": lambda: oracle.prefix_lm(s, half(s)),
        "prefix_lm_document": lambda: oracle.prefix_lm_document(s, lengths, half),
        "sliding_window": lambda: oracle.sliding_window(s, 3, 3),
        "sliding_window_causal": lambda: oracle.sliding_window(s, 3, 0),
        "global_sliding_window": lambda: oracle.global_sliding_window(s, 3, 2),
        "block_causal_document": lambda: oracle.block_causal_document(s, block_documents(s, 2, 3), 2),
    }
    options = {
        "sliding_window": {"window": 3},
        "sliding_window_causal": {"window": 3},
        "global_sliding_window": {"window": 3, "num_global": 2},
        "block_causal_document": {"block": 2, "max_blocks": 3, "seed": 5},
    }
    given = {"lengths": lengths} if name in DOCUMENT_PATTERNS else options.get(name, {})
    mask = PATTERNS[name](s, **given)
    assert mask.num_tokens == s
    np.testing.assert_array_equal(mask.dense(), expected[name]())


def block_documents(s: int, block: int, max_blocks: int) -> list[int]:
    """The documents that seed 5 draws."""
    rng, lengths = np.random.default_rng(5), []
    while sum(lengths) < s:
        lengths.append(min(s - sum(lengths), block * int(rng.integers(1, max_blocks + 1))))
    return lengths


def test_benchmark_windows_look_both_ways_and_global_slices_are_full() -> None:
    mask = PATTERNS["sliding_window"](4096).dense()
    assert mask[2000, 3024] and not mask[2000, 3025] and mask[2000, 976] and not mask[2000, 975]
    mask = PATTERNS["global_sliding_window"](4096).dense()
    assert mask[0, 4095] and mask[4095, 0] and mask[1023].all() and not mask[1024, 4095]


@pytest.mark.parametrize("num_tokens", [1, 7, 1000, 20_011])
@pytest.mark.parametrize("sample", [patterns.sample_lengths, patterns.sample_lengths_long])
def test_lengths_fill_the_sequence_and_follow_the_seed(sample, num_tokens: int) -> None:
    lengths = sample(HISTOGRAM, num_tokens, 3)
    assert sum(lengths) == num_tokens and min(lengths) >= 1
    assert lengths == sample(HISTOGRAM, num_tokens, 3)
    if num_tokens >= 1000:
        assert lengths != sample(HISTOGRAM, num_tokens, 4)


def test_lengths_follow_the_histogram(tmp_path) -> None:
    path = tmp_path / "h.json"
    path.write_text(json.dumps(HISTOGRAM))
    lengths = np.array(patterns.sample_lengths(path, 100_000, 0))
    assert patterns.sample_lengths(HISTOGRAM, 100_000, 0) == lengths.tolist()
    shares = [np.mean(lengths < 4), np.mean((lengths >= 4) & (lengths < 10)), np.mean(lengths >= 10)]
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=0.02)
    assert lengths.max() < 30


def test_long_documents_hold_sixty_percent_and_are_shuffled() -> None:
    lengths = np.array(patterns.sample_lengths_long(HISTOGRAM, 1_000_000, 0))
    long = lengths >= 8 * 1024
    assert lengths.max() <= 30 * 1024
    assert 0.55 < lengths[long].sum() / 1e6 <= 0.61
    assert 0.1 < np.flatnonzero(long).mean() / len(lengths) < 0.9
    short = np.array(patterns.sample_lengths_long(HISTOGRAM, 1000, 0))
    assert short.max() >= 30 and 0.4 < short[short >= 30].sum() / 1000 <= 0.7


@pytest.mark.parametrize("name", ["pile", "prolong64k", "prolong512k"])
def test_histograms_of_the_benchmark(name: str) -> None:
    path = data_dir("longca") / f"{name}.json"
    bins, p = patterns.read_histogram(path)
    assert (bins[1:, 0] == bins[:-1, 1]).all() and abs(p.sum() - 1) < 1e-9
    mask = PATTERNS["causal_document"](65_536, lengths=patterns.sample_lengths(path, 65_536, 0))
    assert len(mask.bands) > 10


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: patterns.causal_document(9, lengths=[3, 5]), "num_tokens=9, got 8"),
        (lambda: patterns.read_histogram({"0-32": 1.0}), "'0-32'"),
        (lambda: patterns.read_histogram({"[0,32)": 0.0}), "not all zero"),
        (lambda: patterns.prefix_lm_causal(9, prefix_share=1.5), "got 1.5"),
        (lambda: patterns.global_sliding_window(9, num_global=-1), "got -1"),
        (lambda: patterns.block_causal_document(9, block=0), "at least 1"),
    ],
)
def test_refusals_are_one_line(make, rule: str) -> None:
    with pytest.raises(ValueError, match=rule) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("num_tokens", "block", "ratio"), [(64, 8, 0.3), (61, 8, 0.3), (64, 8, 1.0), (64, 4, 0.01)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_block_sparse_masks_are_random_blocks_with_one_in_every_row(num_tokens, block, ratio, seed) -> None:
    mask = patterns.block_sparse(num_tokens, block=block, ratio=ratio, seed=seed)
    size = -(-num_tokens // block)
    blocks = mask.dense()[::block, ::block]  # the first pair of each block stands for all
    assert blocks.shape == (size, size)
    whole = blocks.repeat_interleave(block, 0).repeat_interleave(block, 1)[:num_tokens, :num_tokens]
    assert bool((mask.dense() == whole).all())
    assert int(blocks.sum()) == max(size, round(ratio * size * size))
    assert bool(blocks.any(dim=1).all())
    assert mask == patterns.block_sparse(num_tokens, block=block, ratio=ratio, seed=seed)
    if ratio < 1:
        assert mask != patterns.block_sparse(num_tokens, block=block, ratio=ratio, seed=seed + 1)


@pytest.mark.parametrize(
    "options", [{"block": 0, "ratio": 0.5}, {"block": 8, "ratio": 0.0}, {"block": 8, "ratio": 1.5}]
)
def test_block_sparse_masks_that_are_none_are_refused(options) -> None:
    with pytest.raises(ValueError, match="block must be at least 1 and ratio"):
        patterns.block_sparse(64, **options)
