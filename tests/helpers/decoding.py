# SPDX-License-Identifier: Apache-2.0
"""Decoding by programs of plain tensors, compared with the plain model."""

import torch

from helpers.models import make_ids


NUM_NEW = 64


def greedy(model, ids):
    """Return the likeliest tokens behind a prompt `(1, T)`, as the plain model generates them."""
    return model.generate(ids, max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None)[0, ids.shape[1] :].tolist()


def assert_decodes_as(model, prefill, decode, num_prompt, atol=1e-4):
    """Compare logits of random ids, which unlike a text of the model itself do not repeat.

    Args:
        prefill: returns logits `(1, vocab)` and states of a prompt `(1, T)`.
        decode: of one token `(1, 1)`, the number of those before `(1,)`, and states.
    """
    ids = make_ids(1, num_prompt + NUM_NEW, seed=num_prompt, vocab_size=model.config.vocab_size)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[0, num_prompt - 1 :]
        logits, *states = prefill(ids[:, :num_prompt])
        rows = [torch.as_tensor(logits)[0]]
        for place in range(num_prompt, ids.shape[1]):
            logits, *states = decode(ids[:, place : place + 1], torch.tensor([place]), states)
            rows.append(torch.as_tensor(logits)[0].clone())
    assert len(set(expected.argmax(-1).tolist())) > 8
    torch.testing.assert_close(torch.stack(rows), expected, rtol=0, atol=atol)
    assert torch.equal(torch.stack(rows).argmax(-1), expected.argmax(-1))
