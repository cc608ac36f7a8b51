# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: a byte-level BPE trained on the stories themselves, or any pretrained fast one.

One rule holds wherever text is encoded: **a text is its own tokens, and nothing is added to it.** Training puts the
end of text behind each story, and that token alone stands between two stories; prompts, scored texts and measured
texts get none. Many pretrained tokenizers add a begin token before each text or an end token behind it.
`load_tokenizer` removes these tokens, and the tokenizer that is exported with a model does not add them either.
Pipelines, the evaluation harness and the Space call that tokenizer as it is, and so read a prompt as the model read
its training text.
"""

import json
import logging
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from training.files import read_json


END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"

logger = logging.getLogger(__name__)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE: any text can be encoded and comes back exactly.

    The same texts always give the same tokenizer. It pads on the left, as generating from a batch needs.

    Args:
        texts (`Iterable[str]`): read once, never held as a whole.
        vocab_size (`int`): number of entries: 256 bytes, `<|endoftext|>` (bos and eos), `<|pad|>`, and the merges. A
            small corpus may offer fewer merges; the tokenizer is then smaller.

    Raises:
        ValueError: `vocab_size` below 258, `texts` is one string, or the texts offer nothing to learn.
    """
    if isinstance(texts, str):
        raise ValueError("texts is a single string, whose characters would be the texts: give [text]")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 2
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size is {vocab_size}, but the {len(alphabet)} bytes and two special tokens alone need {smallest}"
        )
    backend = Tokenizer(models.BPE())
    # No space is put in front, as it would come back with the text.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # A pair that occurs once belongs to one text and not to the language. All bytes are entries, whether they occur or
    # not, so that any text can be encoded.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=sorted(alphabet),
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() == smallest < vocab_size:
        raise ValueError(
            f"nothing could be learnt for a vocabulary of {vocab_size}: the texts are empty or no two bytes occur "
            "together twice; give more text"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,  # else spaces before punctuation would be lost
    )


def added_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return what a tokenizer adds to a text by itself, in words such as `'<s>' in front`; empty if nothing."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    tokens, mask = tokenizer.convert_ids_to_tokens(encoding["input_ids"]), encoding["special_tokens_mask"]
    # The place of the text's own first token.
    begin = mask.index(0) if 0 in mask else len(mask)
    front, rest = tokens[:begin], tokens[begin:]
    behind = [token for token, is_added in zip(rest, mask[begin:], strict=True) if is_added]
    places = {"in front": front, "behind": behind}
    return [f"{''.join(added)!r} {place}" for place, added in places.items() if added]


def _without_added_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return the same tokenizer without the step that adds tokens.

    Some classes of transformers restore that step whenever they are loaded. The plain class takes everything from the
    file, so that the saved tokenizer adds nothing wherever it is loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        backend = read_json(file) | {"post_processor": None}
        file.write_text(json.dumps(backend, ensure_ascii=False), encoding="utf-8")
        plain = PreTrainedTokenizerFast.from_pretrained(folder)
    plain.name_or_path = tokenizer.name_or_path
    return plain


def _find_pad_token(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return an unused special token made for padding, else the eos."""
    in_use = set(tokenizer.special_tokens_map.values())
    for _, token in sorted(tokenizer.added_tokens_decoder.items()):
        if token.special and "pad" in token.content.lower() and token.content not in in_use:
            return token.content
    return tokenizer.eos_token


def load_tokenizer(name_or_path: str, keep_added: bool = False) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer that adds nothing to a text, has bos, eos and pad, and pads on the left.

    Tokens that it adds by itself are removed, with a warning: see the rule at the head of this file.

    The vocabulary is never enlarged, because a pretrained model has no embedding for a new entry. A missing bos
    becomes the eos and the reverse: both only mark where a text begins or ends. A missing pad becomes a special token
    made for padding if the vocabulary has one (its text contains "pad"), else the eos, with a warning: a mask of pads
    by their id then also masks every end of a text.

    Args:
        name_or_path (`str`): a folder written by `save_pretrained`, or a name on the Hub.
        keep_added (`bool`): keep the tokens that it adds by itself, for a model that was trained with them.

    Raises:
        ValueError: there is no such tokenizer, it is not a fast one, or it has neither bos nor eos.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # each library has errors of its own for a file that it cannot read
        raise ValueError(
            f"cannot load the tokenizer {name_or_path!r}: it has to be a folder with a tokenizer.json (or the files "
            f"that one is made from), or the name of a repository on the Hub that can be reached ({error})"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{name_or_path!r} is a {type(tokenizer).__name__}: only fast tokenizers are supported")
    if tokenizer.eos_token is None and tokenizer.bos_token is None:
        raise ValueError(f"{name_or_path!r} has neither bos nor eos: set `eos_token` in its tokenizer_config.json")
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.bos_token
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _find_pad_token(tokenizer)
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            logger.warning("%s has no token for padding: its eos %s pads", name_or_path, tokenizer.eos_token)
    added = [] if keep_added else added_tokens(tokenizer)
    if added:
        tokens = " and ".join(added)
        logger.warning("%s adds %s of each text: taken away, as training text has none", name_or_path, tokens)
        tokenizer = _without_added_tokens(tokenizer)
    tokenizer.padding_side = "left"
    tokenizer.init_kwargs["padding_side"] = "left"  # else `save_pretrained` would not keep it
    return tokenizer
