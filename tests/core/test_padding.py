"""Which tokens an attention mask calls real."""

from __future__ import annotations

import torch

from sparing.core.padding import owners, real_tokens


def test_a_mask_of_tokens_is_above_0_where_they_are_real():
    mask = torch.tensor([[1, 1, 0], [0, 2, 1]])
    assert real_tokens(mask).tolist() == [[True, True, False], [False, True, True]]


def test_in_a_mask_of_pairs_a_token_that_does_not_see_itself_is_padding():
    pairs = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    assert real_tokens(pairs).tolist() == [[True, True, True]]
    pairs[0, 0, 2] = torch.tensor([True, False, False])
    assert real_tokens(pairs).tolist() == [[True, True, False]]


def test_other_masks_tell_nothing():
    for mask in (None, torch.zeros(1, 1, 3, 3), torch.ones(1, 1, 1, 3, dtype=torch.bool), "mask"):
        assert real_tokens(mask) is None


def test_owners_of_packed_batches_only():
    owner = torch.tensor([[0, 0, 1, -1]])
    assert owners({"owner": owner}) is owner
    assert owners({"owner": torch.tensor([1])}) is None
    assert owners({}) is None
    assert owners([owner]) is None
