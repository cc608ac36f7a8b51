# SPDX-License-Identifier: Apache-2.0
"""A memory on the disk: what is loaded answers as what was saved, and everything else is refused."""

import json

import pytest
import torch
from helpers.hub_server import served
from helpers.kinds import make_mosaic
from helpers.models import make_ids, make_model
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file

from modeling_memory_mosaic import MosaicMemory, files_memory_mosaic
from modeling_memory_mosaic.files_memory_mosaic import CARD_NAME, FILE_NAME, PRECISIONS, SETTINGS_NAME, read_settings
from training.text.tokenizer import train_tokenizer


TEXTS = ["Mia has the red ball in the park.", "Tom has a blue kite at home."]
question = make_ids(1, 6, seed=9)


MODELS = [(fields, dtype) for fields in ({}, "mosaic v2 otherwise") for dtype in (torch.float32, torch.bfloat16)]


@pytest.fixture(params=[*MODELS, ({}, torch.float64)], ids=str)
def model(request):
    fields, dtype = request.param
    return make_mosaic(fields, dtype=dtype)


def joined(model):
    return MosaicMemory.union([model.memorize(make_ids(1, n, seed=n), source=f"text {n}") for n in (5, 9, 2)])


@torch.no_grad()
def answer(model, memory):
    return model(**memory.prompt(question)).logits


def test_a_memory_that_was_saved_answers_to_the_bit(model, tmp_path):
    memory = joined(model)
    memory.save_pretrained(tmp_path)
    loaded = MosaicMemory.from_pretrained(tmp_path, model)
    assert loaded.sources == memory.sources and len(loaded) == len(memory) and loaded.nbytes == memory.nbytes
    assert torch.equal(answer(model, loaded), answer(model, memory))
    # It joins texts that are read now, and forgets its own.
    new = model.memorize(make_ids(1, 4), source="new")
    both = MosaicMemory.union([loaded, new]).forget("text 9")
    expected = MosaicMemory.union([memory.forget("text 9"), new])
    assert torch.equal(answer(model, both), answer(model, expected))
    chosen = MosaicMemory.from_pretrained(tmp_path, model, sources=["text 2", "text 5"])
    assert torch.equal(answer(model, chosen), answer(model, loaded.forget("text 9")))


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("bfloat16", 1e-2), ("int8", 1e-2), ("fp8", 5e-2)])
def test_a_memory_may_be_stored_in_fewer_bytes(dtype, error, tmp_path):
    model = make_model(dtype=torch.float64)
    memory = joined(model)
    memory.save_pretrained(tmp_path, dtype=dtype)
    loaded = MosaicMemory.from_pretrained(tmp_path, model)
    assert loaded.dtype == torch.float64
    for keys, expected in zip(loaded.keys, memory.keys, strict=True):
        assert (keys - expected).norm() < error * expected.norm()
    assert 0 < (answer(model, loaded) - answer(model, memory)).abs().max() < 10 * error
    # Rounding what was rounded changes nothing.
    loaded.save_pretrained(tmp_path / "again", dtype=dtype)
    again = MosaicMemory.from_pretrained(tmp_path / "again", model)
    assert torch.equal(answer(model, again), answer(model, loaded))


def spoil(folder, source):
    """Write NaN in place of all pairs of a text."""

    def damage(tensors):
        is_of_text = tensors["source_ids"] == read_settings(folder / FILE_NAME)["sources"].index(source)
        scaled = {name.removesuffix(".scale") for name in tensors if name.endswith(".scale")}
        for name, tensor in tensors.items():
            if name.startswith("layers.") and name not in scaled:  # of codes, the scales
                tensor[:, is_of_text] = torch.nan
        return tensors

    rewrite(folder, damage)


@pytest.mark.parametrize("variant", [{}, "mosaic v2 otherwise"], ids=["mosaic", "mosaic v2"])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("max_pairs", [None, 6])
def test_of_chosen_texts_alone_the_pairs_are_read(max_pairs, dtype, variant, tmp_path):
    """Whatever the pairs of the others are; and to the bit as if the whole had been loaded. Merged ones too."""
    model = make_mosaic(variant, dtype=torch.float32)
    memory = joined(model)
    if max_pairs is not None:
        memory.consolidate(max_pairs, model=model)
    memory.save_pretrained(tmp_path, dtype=dtype)
    whole = MosaicMemory.from_pretrained(tmp_path, model)
    spoil(tmp_path, "text 9")
    for names in (["text 5"], ["text 2", "text 5"], []):
        chosen, expected = MosaicMemory.from_pretrained(tmp_path, model, sources=names), whole.select(names)
        assert chosen.sources == expected.sources and torch.equal(chosen.source_ids, expected.source_ids)
        assert torch.equal(chosen.input_ids, expected.input_ids) and torch.equal(chosen.places, expected.places)
        for name in ("keys", "values", "slot_bias"):
            assert all(map(torch.equal, getattr(chosen, name), getattr(expected, name)))
        assert not names or torch.equal(answer(model, chosen), answer(model, expected))
    for names in (None, ["text 9"], ["text 9", "text 2"]):
        with pytest.raises(ValueError, match="not finite|slot_bias"):
            MosaicMemory.from_pretrained(tmp_path, model, sources=names)
    with pytest.raises(ValueError, match="no text named 'text 7'. It has 'text 5', 'text 9', 'text 2'"):
        MosaicMemory.from_pretrained(tmp_path, model, sources=["text 7"])


def test_texts_are_chosen_from_several_folders(tmp_path):
    model, folders = make_model(), [tmp_path / "one", tmp_path / "other"]
    memories = [model.memorize(make_ids(2, n, seed=n), source=[f"a {n}", f"b {n}"]) for n in (5, 8)]
    for two, folder in zip(memories, folders, strict=True):
        MosaicMemory.union(two).save_pretrained(folder)
    spoil(folders[0], "a 5")
    spoil(folders[1], "b 8")
    loaded = MosaicMemory.from_pretrained(folders, model, sources=["a 8", "b 5"])
    expected = MosaicMemory.union([memories[0][1], memories[1][0]])
    assert loaded.sources == ["b 5", "a 8"] and torch.equal(answer(model, loaded), answer(model, expected))


def test_a_memory_of_other_weights_is_refused(tmp_path):
    model = make_model()
    memory = joined(model)
    memory.save_pretrained(tmp_path)
    MosaicMemory.from_pretrained(tmp_path, make_model())  # the same weights, in another object
    for other in (make_model(seed=1), make_model(num_hidden_layers=3), make_model(dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="Other weights wrote this memory"):
            MosaicMemory.from_pretrained(tmp_path, other)
    loaded = MosaicMemory.from_pretrained(tmp_path, make_model(dtype=torch.bfloat16), check_weights=False)
    assert loaded.dtype == torch.bfloat16
    with torch.no_grad():
        model.lm_head.weight.mul_(2)  # the embeddings too, to which it is tied
    with pytest.raises(ValueError, match="have changed since"):
        memory.save_pretrained(tmp_path)
    assert MosaicMemory.from_pretrained(tmp_path, make_model()).sources == memory.sources


def change(name, function):
    return lambda tensors: tensors | {name: function(tensors[name])}


DAMAGES = {
    "not a number": (change("layers.1.values", lambda t: t.fill_(torch.nan)), "not finite"),
    "another width": (change("layers.0.keys", lambda t: t[:, :, 1:].contiguous()), "of shape"),
    "fewer slots": (change("layers.0.keys", lambda t: t[:, 1:].contiguous()), "of shape"),
    "another precision": (change("layers.0.values", lambda t: t.double()), "torch.float64 of shape"),
    "no layer": (
        lambda tensors: {k: t for k, t in tensors.items() if "layers.1" not in k},
        "damaged, or holds no memory",
    ),
    "unknown text": (change("source_ids", lambda t: t + 3), "beyond the 3 sources"),
    "negative place": (change("places", lambda t: t - 2), "must be indices"),
    "bias": (change("layers.0.slot_bias", lambda t: t + torch.inf), "slot_bias"),
}


def rewrite(folder, damage=lambda tensors: tensors, **settings):
    """Write a stored memory again, with damaged tensors or other settings."""
    path = folder / FILE_NAME
    content = json.dumps(read_settings(path) | settings)
    save_file(damage(load_file(path)), path, metadata={SETTINGS_NAME: content})


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_pairs_are_refused(name, tmp_path):
    model = make_model()
    joined(model).save_pretrained(tmp_path)
    damage, message = DAMAGES[name]
    rewrite(tmp_path, damage)
    with pytest.raises(ValueError, match=message):
        MosaicMemory.from_pretrained(tmp_path, model)


SETTINGS = {
    "format 9": {"format": 9},
    "int4": {"precision": "int4"},
    "a memory of a gpt2": {"model_type": "gpt2"},
    "must be indices": {"num_slots": 4},
    "Other weights": {"fingerprint": 64 * "0"},
}


@pytest.mark.parametrize("message", SETTINGS)
def test_other_settings_are_refused(message, tmp_path):
    model = make_model()
    joined(model).save_pretrained(tmp_path)
    rewrite(tmp_path, **SETTINGS[message])
    with pytest.raises(ValueError, match=message):
        MosaicMemory.from_pretrained(tmp_path, model)


def test_files_that_are_cut_or_missing_are_refused(tmp_path):
    model = make_model()
    joined(model).save_pretrained(tmp_path)
    content = (tmp_path / FILE_NAME).read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        (tmp_path / FILE_NAME).write_bytes(content[:length])
        with pytest.raises(ValueError, match="damaged"):
            MosaicMemory.from_pretrained(tmp_path, model)
    save_file({"weight": torch.zeros(2)}, tmp_path / FILE_NAME)
    with pytest.raises(ValueError, match="does not describe a memory"):
        MosaicMemory.from_pretrained(tmp_path, model)
    (tmp_path / FILE_NAME).unlink()
    with pytest.raises(ValueError, match=f"holds no {FILE_NAME}"):
        MosaicMemory.from_pretrained(tmp_path, model)


def test_a_write_that_fails_leaves_the_older_memory(tmp_path, monkeypatch):
    model = make_model()
    memory = joined(model)
    memory.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dtype='int4'"):
        memory.save_pretrained(tmp_path, dtype="int4")

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(files_memory_mosaic, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        memory.forget("text 5").save_pretrained(tmp_path)
    assert MosaicMemory.from_pretrained(tmp_path, model).sources == ["text 5", "text 9", "text 2"]


def test_a_question_of_another_tokenizer_is_refused(tmp_path):
    tokenizer, other = (train_tokenizer([text] * 3, vocab_size=270) for text in TEXTS)
    model = make_model(vocab_size=300)
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    memory = model.memorize(ids, source="Mia", tokenizer=tokenizer)
    memory.save_pretrained(tmp_path)
    memory = MosaicMemory.from_pretrained(tmp_path, model)
    arguments = memory.prompt(["Who has the ball?", "Who?"], tokenizer)  # padding changes no tokenizer
    assert arguments["input_ids"].shape[0] == 2 and memory.prompt("Who?", tokenizer)
    with pytest.raises(ValueError, match="Another tokenizer"):
        memory.prompt("Who has the ball?", other)
    with pytest.raises(ValueError, match="Another tokenizer made the tokens of 'Tom'"):
        MosaicMemory.union([memory, model.memorize(ids, source="Tom", tokenizer=other)])


def test_several_folders_are_joined_and_weights_compared_once(tmp_path, monkeypatch):
    model = make_model()
    memories = [model.memorize(make_ids(1, n, seed=n), source=str(n)) for n in (5, 8, 6)]
    folders = [tmp_path / str(index) for index in range(3)]
    for memory, folder in zip(memories, folders, strict=True):
        memory.save_pretrained(folder)
    calls, fingerprint = [], files_memory_mosaic.weights_fingerprint
    monkeypatch.setattr(files_memory_mosaic, "weights_fingerprint", lambda *a: calls.append(a) or fingerprint(*a))
    loaded = MosaicMemory.from_pretrained(folders, model)
    assert len(calls) == 1 and loaded.sources == ["5", "8", "6"]
    expected = MosaicMemory.union(memories)
    question = make_ids(1, 4)
    answers = [model(**memory.prompt(question)).logits for memory in (loaded, expected)]
    assert torch.equal(*answers)
    other = make_model(seed=5)
    other.memorize(make_ids(1, 9), source="other").save_pretrained(folders[1])
    with pytest.raises(ValueError, match="Other weights wrote this memory"):
        MosaicMemory.from_pretrained(folders, model)
    with pytest.raises(ValueError, match="union of no memories"):
        MosaicMemory.from_pretrained([], model)


# huggingface_hub 2.4 uploads large files by an argument that httpx2 deprecates.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_memory_goes_to_the_hub_and_comes_back(model, tmp_path, monkeypatch):
    """At each of its commits: what a reader pins stays."""
    memory = joined(model)
    expected = answer(model, memory)
    with served(monkeypatch, tmp_path / "cache") as hub:
        first = memory.push_to_hub("someone/texts", private=True)
        memory.forget("text 9").push_to_hub("someone/texts")
        assert FILE_NAME in hub.repositories["model", "someone/texts"].files()
        assert hub.repositories["model", "someone/texts"].private
        loaded = MosaicMemory.from_pretrained("someone/texts", model)
        assert loaded.sources == ["text 5", "text 2"] and torch.equal(answer(model, loaded), answer(model, memory))
        pinned = MosaicMemory.from_pretrained("someone/texts", model, revision=first.oid)
        assert pinned.sources == ["text 5", "text 9", "text 2"] and torch.equal(answer(model, pinned), expected)
        # Of a folder and a repository, together, and with texts chosen.
        model.memorize(question, source="here").to(dtype=model.dtype).save_pretrained(tmp_path / "here")
        both = MosaicMemory.from_pretrained([tmp_path / "here", "someone/texts"], model, sources=["here", "text 2"])
        assert both.sources == ["here", "text 2"]
        with pytest.raises(OSError, match="someone/nothing"):
            MosaicMemory.from_pretrained("someone/nothing", model)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.parametrize("fields", [{}, "mosaic v2 otherwise"], ids=str)
def test_a_memory_goes_to_the_hub_with_a_card_that_forgets_too(fields, tmp_path, monkeypatch):
    model = make_mosaic(fields)
    memory = joined(model)
    memory.config._name_or_path = "someone/base"
    arxiv = "2507.03285" if fields else "2405.06394"
    with served(monkeypatch, tmp_path / "cache") as hub:
        memory.push_to_hub("someone/texts", dtype="bfloat16", tags=["letters"])
        files = hub.repositories["model", "someone/texts"].files
        card = ModelCard(files()[CARD_NAME].decode())
        metadata = card.data.to_dict()
        assert metadata["library_name"] == "modeling-memory-mosaic" and metadata["base_model"] == "someone/base"
        assert metadata["tags"] == ["memory", "associative-memory", f"arxiv:{arxiv}", "letters"]
        assert f"{len(memory)} key-value pairs in each head, from 3 texts." in card.text
        assert "| `text 9` | 9 |" in card.text and 'from_pretrained("someone/base")' in card.text
        # A folder of this machine is no base, and a text that was forgotten is named no more.
        memory.config._name_or_path = str(tmp_path)
        memory.forget("text 9").push_to_hub("someone/texts")
        card = files()[CARD_NAME].decode()
        assert "text 9" not in card and str(tmp_path) not in card and "base_model" not in card
        # A card of one's own stays.
        HfApi().upload_file(
            path_or_fileobj=b"---\nlicense: mit\n---\nMine.", path_in_repo=CARD_NAME, repo_id="someone/texts"
        )
        memory.push_to_hub("someone/texts")
        assert files()[CARD_NAME].endswith(b"Mine.")
