# SPDX-License-Identifier: Apache-2.0
"""A text is its own tokens wherever it is read: tokenizers that add a begin token, an end token or both add nothing.

Every place that calls a tokenizer is walked with the export of a run whose tokenizer was made by others.
"""

import functools
import random
import re

import pytest
import torch
from datasets import Dataset
from helpers.kinds import MOSAIC, make_memory_model
from helpers.models import make_model
from helpers.runs import short_recipe
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CodeLlamaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

from hub_cards.space import app, texts
from modeling_memory_mosaic import MemoryMosaicForCausalLM
from modeling_memory_mosaic.inspection_memory_mosaic import measure_units
from training import vectors
from training.commands.texts import answer, continue_texts
from training.evaluate import load_model, tokens_and_bytes
from training.experiments import cloze, continuations, position_loss, samples, surprise
from training.export import export_model
from training.memories import load_memory, memorize_files
from training.paths import CLONE, CONFIGURATION
from training.recipe import load_recipe
from training.tasks import fine_tuning, language_modeling
from training.text import cloze_items
from training.text.generator import Generator, GeneratorSection
from training.text.question_rows import FactRows
from training.text.sources import load_stories
from training.text.tokenizer import added_tokens, load_tokenizer, train_tokenizer
from training.text.windows import pack_windows


TEXT = "Tom saw a big dog."
MARKS = ["<pad>", "<s>", "</s>"]
VOCABULARY = {token: index for index, token in enumerate([*MARKS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
PLAIN = [VOCABULARY[token] for token in TEXT.replace(" ", "Ġ")]
TEMPLATES = {"nothing": "$A", "begin": "<s> $A", "end": "$A </s>", "both": "<s> $A </s>"}
ADDED = {"nothing": [], "begin": ["'<s>' in front"], "end": ["'</s>' behind"]}
ADDED["both"] = ADDED["begin"] + ADDED["end"]


def save_tokenizer(kind, folder, padding=True):
    """Make a tokenizer as other projects do: bytes, and a template for what is added to each text."""
    backend = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = TemplateProcessing(single=TEMPLATES[kind], special_tokens=[("<s>", 1), ("</s>", 2)])
    marks = {"bos_token": "<s>", "eos_token": "</s>"} | ({"pad_token": "<pad>"} if padding else {})
    PreTrainedTokenizerFast(tokenizer_object=backend, **marks).save_pretrained(folder)
    assert added_tokens(AutoTokenizer.from_pretrained(folder)) == ADDED[kind]
    return folder


@pytest.fixture(scope="module", params=TEMPLATES)
def run(request, tmp_path_factory):
    """Make a run with such a tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = f"tokenizer.pretrained={save_tokenizer(request.param, folder / 'pretrained')}"
    changes = ["tokenizer.vocab_size=null", "tokenizer.max_training_stories=null", "tokens=1_280"]
    recipe = short_recipe(folder / "run", *changes, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_modeling, "verify_export", lambda folder, prompts, **options: prompts)
        language_modeling.run(recipe)
    return recipe


@pytest.fixture
def read(monkeypatch):
    """Record what the model reads, one list of rows for each pass."""
    passes, forward = [], MemoryMosaicForCausalLM.forward

    @functools.wraps(forward)
    def recording(self, input_ids=None, *arguments, **options):
        passes.append(input_ids.tolist())
        return forward(self, input_ids, *arguments, **options)

    monkeypatch.setattr(MemoryMosaicForCausalLM, "forward", recording)
    return passes


def by_the_command(folder):
    continue_texts(*load_model(folder), [TEXT], max_new_tokens=2, do_sample=False)


def by_a_pipeline(folder):
    pipeline("text-generation", model=str(folder))(TEXT, max_new_tokens=2)


def by_plain_transformers(folder):
    inputs = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")
    AutoModelForCausalLM.from_pretrained(folder).generate(**inputs, max_new_tokens=2)


def by_the_samples(folder):
    samples.continuations(*load_model(folder), [TEXT], 0, {"do_sample": False, "max_new_tokens": 2})


def by_the_space(folder):
    texts.write(*app.load(str(folder)), TEXT, 2, 0, 0)


@pytest.mark.parametrize("way", [by_the_command, by_a_pipeline, by_plain_transformers, by_the_samples, by_the_space])
def test_a_prompt_is_read_as_it_stands(way, run, read):
    way(run.folder / "model")
    assert read[0] == [PLAIN]


def test_training_reads_stories_with_one_end_behind_each(run):
    stories = load_stories("embedded", num_stories=3)
    tokenizer = load_tokenizer(str(run.folder / "tokenizer"))
    whole = [VOCABULARY[byte] for byte in "".join(f"{text}</s>" for text in stories["text"]) if byte in VOCABULARY]
    assert len(whole) > 500
    expected = [
        token
        for text in stories["text"]
        for token in [*(VOCABULARY[{" ": "Ġ", "\n": "Ċ"}.get(byte, byte)] for byte in text), VOCABULARY["</s>"]]
    ]
    windows = pack_windows(stories, tokenizer, 1)
    assert [row["input_ids"][0] for row in windows] == expected
    streamed = pack_windows(load_stories("embedded", num_stories=3, streaming=True), tokenizer, 1)
    assert [row["input_ids"][0] for row in streamed] == expected
    assert tokens_and_bytes(stories, tokenizer)[0] == len(expected)


def test_measured_texts_are_read_as_they_stand(run):
    model, tokenizer = load_model(run.folder / "model")
    end = VOCABULARY["</s>"]
    item = cloze_items.Item(story=0, context=TEXT, candidates=(TEXT, TEXT[:5]))
    expected = [([end, *PLAIN], PLAIN), ([end, *PLAIN], PLAIN[:5])]
    assert cloze.item_targets([item], tokenizer, 100) == expected
    beginnings = continuations.story_beginnings(Dataset.from_dict({"text": [TEXT]}), tokenizer, 1, 6, len(PLAIN) - 5)
    assert (beginnings.prompts.tolist(), beginnings.following.tolist()) == ([[end, *PLAIN[:5]]], [PLAIN[5:]])
    ids, _ = position_loss.cut_windows(Dataset.from_dict({"text": [TEXT]}), tokenizer, len(PLAIN), "documents", 1)
    assert ids.tolist() == [PLAIN]
    assert measure_units(model, tokenizer, [TEXT, TEXT[:5]])["tokens"] == len(PLAIN) + 5
    assert FactRows(tokenizer, 2000, 1, "train", 2, 1)._encode(TEXT) == PLAIN
    documents = FactRows(tokenizer, 2000, 1, "train", 2, 1).row(0).documents
    assert all(VOCABULARY["</s>"] not in ids for ids in documents)
    assert surprise.marked_text([TEXT], 0, tokenizer, random.Random(0)).ids.tolist() == PLAIN


def test_memorized_files_and_questions_are_read_as_they_stand(run, read, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    memorize_files(run.folder / "model", [tmp_path / "a.txt"], tmp_path / "memory")
    assert load_memory(str(tmp_path / "memory"), load_model(run.folder / "model")[0]).input_ids.tolist() == PLAIN
    answer(*load_model(run.folder / "model"), [str(tmp_path / "memory")], TEXT, max_new_tokens=1)
    assert read[0] == [PLAIN]


def test_chunks_of_a_data_set_of_vectors_are_read_as_they_stand(run, monkeypatch):
    _, tokenizer = load_model(run.folder / "model")
    backbone = type(MOSAIC)(**MOSAIC.to_dict() | {"vocab_size": len(VOCABULARY)})
    model = make_memory_model(encoder=backbone, decoder=backbone)
    with torch.no_grad():
        rows, length = vectors.encode_text(model, tokenizer, "a.txt", TEXT)
        expected = model.encoder(torch.tensor([PLAIN])).memories
    size = model.config.chunk_length
    whole = len(PLAIN) - len(PLAIN) % size
    assert length == len(PLAIN) and "".join(row["text"] for row in rows) == TEXT[:whole]
    torch.testing.assert_close(model.memories_from_rows(rows)["memories"], expected)
    monkeypatch.setattr(
        vectors, "given_back", lambda model, rows: [PLAIN[i : i + size] for i in range(0, whole, size)]
    )
    assert vectors.measure_given_back(model, tokenizer, rows) == 1.0


def test_the_harness_reads_a_text_behind_the_end_of_the_one_before(run):
    harness = HFLM(pretrained=str(run.folder / "model"), device="cpu", batch_size=2)
    assert harness.tok_encode(TEXT) == PLAIN
    ids, mask = harness.tok_batch_encode([TEXT, TEXT[:5]])
    assert ids[0].tolist() == PLAIN and ids[1][mask[1] == 1].tolist() == PLAIN[:5]
    assert harness.prefix_token_id == VOCABULARY["</s>"]


def test_what_stands_before_a_text_is_what_stood_there_in_training(run):
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    ids = {VOCABULARY["</s>"], tokenizer.bos_token_id, model.config.bos_token_id, model.generation_config.bos_token_id}
    assert ids == {tokenizer.eos_token_id}
    assert model.generate(max_new_tokens=1)[0, 0] == VOCABULARY["</s>"]
    assert tokenizer.padding_side == "left" and tokenizer.pad_token == "<pad>"


def lora_on(base):
    settings = {"name": "lora", "model": str(base), "base": None, "data": {"context_length": 64}}
    return load_recipe(CONFIGURATION / "recipe" / "shakespeare_lora.yaml", settings=[settings])


def test_a_fine_tuning_reads_as_its_base(run, tmp_path):
    recipe = lora_on(run.folder / "model")
    tokenizer = fine_tuning._base_tokenizer(recipe)
    export_model(fine_tuning.build_model(recipe, tokenizer).merge_and_unload(), tokenizer, tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(TEXT).input_ids == PLAIN


@pytest.mark.parametrize("kind", ["begin", "end", "both"])
def test_a_base_of_others_whose_tokenizer_adds_tokens_is_refused(kind, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(kind, tmp_path / "tokenizer"))
    export_model(make_model(vocab_size=len(tokenizer)), tokenizer, tmp_path / "base")
    with pytest.raises(ValueError, match=f"adds {' and '.join(ADDED[kind])} of each text by itself.*load_tokenizer"):
        fine_tuning._base_tokenizer(lora_on(tmp_path / "base"))


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_generator_of_others_keeps_its_begin_and_must_not_end_a_prompt(kind, tmp_path):
    section = GeneratorSection(model=str(save_tokenizer(kind, tmp_path)), batch_size=1)
    state = language_modeling.PartialState(cpu=True)
    if "</s>" in TEMPLATES[kind]:
        with pytest.raises(ValueError, match="adds '</s>' behind each prompt.*add_eos_token=false"):
            Generator(section, state)
    else:
        ids = Generator(section, state).tokenizer(TEXT).input_ids
        assert ids == [*([VOCABULARY["<s>"]] if kind == "begin" else []), *PLAIN]


@pytest.mark.parametrize("settings", [{"add_bos_token": True}, {"add_eos_token": True}, {}], ids=str)
@pytest.mark.parametrize("kind", [LlamaTokenizer, CodeLlamaTokenizer, GPT2Tokenizer])
def test_a_class_that_adds_tokens_whenever_it_is_loaded_is_left_behind(kind, settings, tmp_path, caplog):
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *"▁Ġ Tomsaw"])}
    made = kind(vocab=vocabulary, merges=[], bos_token="<s>", eos_token="</s>", unk_token="<unk>", **settings)
    made.chat_template = "{{ messages }}"
    made.save_pretrained(tmp_path / "theirs")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    ours = load_tokenizer(str(tmp_path / "theirs"))
    assert ("taken away" in caplog.text) == bool(added_tokens(theirs))
    ours.save_pretrained(tmp_path / "ours")
    for tokenizer in (ours, AutoTokenizer.from_pretrained(tmp_path / "ours")):
        expected = theirs("Tom saw", add_special_tokens=False).input_ids
        assert tokenizer("Tom saw").input_ids == tokenizer("Tom saw", add_special_tokens=False).input_ids == expected
        assert not added_tokens(tokenizer) and tokenizer.chat_template == made.chat_template
        assert tokenizer.decode(expected) == theirs.decode(expected)
        assert (tokenizer.bos_token, tokenizer.eos_token, len(tokenizer)) == ("<s>", "</s>", len(theirs))


def test_a_tokenizer_that_adds_nothing_is_left_as_it_is(tmp_path, caplog):
    train_tokenizer(["once upon a time"] * 9, 260).save_pretrained(tmp_path)
    loaded, plain = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.backend_tokenizer.to_str() == plain.backend_tokenizer.to_str() and not caplog.records
    assert torch.equal(*(t("once", return_tensors="pt").input_ids for t in (loaded, plain)))


# Files that call a tokenizer. A new one needs a test above, and a line here.
WALKED = {
    *("training/text/windows.py", "training/evaluate.py", "training/text/tokenizer.py"),
    *("training/text/generator.py", "training/text/story_selection.py", "training/experiments/position_loss.py"),
    *("training/commands/chat.py", "training/synthetic/needles.py"),
    *("training/vectors.py", "training/publishing/trials.py"),
    *("training/commands/texts.py", "training/text/question_rows.py", "training/experiments/surprise.py"),
    *("training/experiments/samples.py", "training/experiments/cloze.py", "training/experiments/continuations.py"),
    "hub_cards/space/shared.py",
    "modeling_memory_mosaic/inspection_memory_mosaic.py",
}


def test_every_place_that_calls_a_tokenizer_is_walked():
    call = re.compile(r"(?<![\w])(?:self\.)?tokenizer\(|\bencode_batch\w*\(")
    paths = [*CLONE.glob("training/**/*.py"), *CLONE.glob("hub_cards/space/*.py")]
    paths += CLONE.glob("modeling_memory_mosaic/inspection_*.py")
    calls = {p.relative_to(CLONE).as_posix() for p in paths if call.search(p.read_text(encoding="utf-8"))}
    assert calls == WALKED
