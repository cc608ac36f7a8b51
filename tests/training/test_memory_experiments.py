# SPDX-License-Identifier: Apache-2.0
"""Experiments on memories run from trainings to pictures, and their effects are those of what they measured."""

import random

import numpy as np
import pytest
import torch
import yaml
from helpers.models import make_ids, make_model
from helpers.runs import short_recipe

from modeling_memory_mosaic import MosaicMemory
from training.experiments import bound, bound_recall, comparison, join, reading, searching, streaming, surprise
from training.paths import CONFIGURATION
from training.recipe import load_recipe, task_module
from training.synthetic.readings import Reading
from training.synthetic.recall import score_rows
from training.tasks import language_modeling, symbols
from training.text.question_rows import IGNORED


RECIPES = CONFIGURATION / "recipe"
TEXT = [
    "base=smoke",
    "workers=1",
    "common.tokens=2_048",
    "common.data.train.num_stories=40",
    "common.data.validation.num_stories=12",
    "common.training.disable_tqdm=true",
    "common.generation.prompts=[]",
]
MOSAIC = {"Memory Mosaic": {"model": "mosaic-smoke"}}
ROPE = {"model": "rope-tiny", "model_args": {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2}}
ROPE["model_args"] |= {"num_attention_heads": 2, "intermediate_size": 32}
LONGER = ["data.context_length=128", "model_args.max_position_embeddings=128"]
STORIES = {"source": "embedded", "split": "validation", "num_stories": 60}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder whose `runs/` the tests of this file share."""
    return tmp_path_factory.mktemp("memories")


@pytest.fixture
def small(workplace, monkeypatch):
    """Returns a function that reads a shipped experiment on stories, with models of the smoke size."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(language_modeling, "verify_export", lambda folder, prompts, **options: prompts)

    def read(name, runs, seeds=(0,), **settings):
        values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
        values |= {"runs": runs, "claims": [], "seeds": list(seeds)} | settings
        path = workplace / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return load_recipe(path, TEXT)

    return read


def run(recipe):
    result = task_module(recipe.task).run(recipe)
    assert result["effects"].keys() == set(recipe.effect_names)
    draws = hasattr(task_module(recipe.task), "draw")
    assert (recipe.folder / f"{recipe.name}.png").is_file() == draws
    assert all(
        "finished" in line for line in task_module(recipe.task).plan(recipe).values() if "parameters" in str(line)
    )
    return result


@pytest.mark.slow
def test_losses_of_bounded_memories_are_compared_with_all_pairs_and_with_windows(small):
    texts = {"stories": STORIES | {"windows": "stream", "num_windows": 3}}
    sizes = {"context_length": 96, "measured_from": 48, "budgets": [8, 32], "policies": ["fifo", "usage"]}
    recipe = small("bound", MOSAIC | {"RoPE": ROPE}, texts=texts, **sizes)
    result = run(recipe)
    losses = {
        (one["label"], one["way"], one["budget"]): one["loss"] for one in result["measured"]["losses"]["stories"]
    }
    assert len(losses) == 2 * (1 + 2 * 2)
    for one in recipe.contrasts:
        effect = result["effects"][f"stories: {one.name}"]
        assert effect["value"] == pytest.approx(losses[one.one] - losses[one.other], abs=1e-6)
    model, tokenizer = recipe.trainings[0].load()
    documents = bound.load_stories(**STORIES)
    ids, _ = bound.cut_windows(documents, tokenizer, 96, "stream", 3)
    expected = bound.text_losses(model, ids, "usage", 8)[:, 47:].mean()
    assert losses["Memory Mosaic", "usage", 8] == pytest.approx(float(expected), abs=1e-5)
    # Several at once, in processes of their own, measure the same in the same order.
    alone, beside = (
        comparison.measure_all(recipe.model_copy(update={"workers": workers}), bound._losses_of, ids)
        for workers in (1, 2)
    )
    assert [training.name for training, _ in beside] == [training.name for training in recipe.trainings]
    for (_, one), (_, other) in zip(alone, beside, strict=True):
        assert one.keys() == other.keys() and all(one[place] == pytest.approx(other[place], abs=1e-6) for place in one)
    assert len(list((recipe.folder / "measures").glob("*.log"))) == len(recipe.trainings)


@pytest.mark.slow
def test_a_stream_is_measured_in_stretches_beside_pieces(small):
    sizes = {"num_tokens": 1_280, "stretch": 64, "budget": 16, "policies": ["lru"]}
    recipe = small("streaming", MOSAIC | {"RoPE": ROPE}, text=STORIES | {"num_stories": 40}, **sizes)
    result = run(recipe)
    streams = {(one["label"], one["way"]): one for one in result["measured"]["streams"]}
    assert streams.keys() == {*recipe.settings, *((label, streaming.PIECES) for label in recipe.runs)}
    model, tokenizer = recipe.trainings[0].load()
    ids = streaming._stream_ids(recipe)
    assert len(ids) == 1_280
    expected = bound.text_losses(model, ids[None], "lru", 16)[0]
    losses = streams["Memory Mosaic", "lru"]["losses"][0]
    assert losses[0] == pytest.approx(float(expected[:63].mean()), abs=1e-5)
    assert losses[1:] == pytest.approx(expected[63:].view(-1, 64).mean(1).tolist(), abs=1e-5)
    pieces = streams["Memory Mosaic", streaming.PIECES]["losses"][0]
    logits = model(ids.view(-1, 64)[:1]).logits[0, :-1].detach()
    assert pieces[0] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, ids[1:64])), abs=1e-5)
    gain = result["effects"]["loss, Memory Mosaic, lru - pieces read from nothing"]["value"]
    assert gain == pytest.approx(float(np.mean(losses) - np.mean(pieces)), abs=1e-6)
    assert result["effects"]["growth of the memory after the first tenth, Memory Mosaic, lru"]["value"] == 0


def test_a_stream_that_is_too_short_or_cut_askew_is_refused(small):
    sizes = {"stretch": 64, "budget": 16, "policies": ["lru"]}
    with pytest.raises(ValueError, match="must be whole tenths of `stretch` 64"):
        small("streaming", MOSAIC, num_tokens=1_000, text=STORIES, **sizes)
    recipe = small("streaming", MOSAIC, num_tokens=640_000, text=STORIES, **sizes)
    with pytest.raises(ValueError, match="fewer than `num_tokens` 640000: read more stories, or lower it"):
        task_module(recipe.task).run(recipe, restart=True)


def test_losses_behind_what_was_read_are_those_of_its_memory(small):
    settings = {"tokens": 2_048, "data": {"context_length": 64}, "generation": {"prompts": []}}
    settings["data"] |= {split: STORIES | {"split": split} for split in ("train", "validation")}
    settings["training"] = {"per_device_train_batch_size": 4, "eval_steps": 100, "save_steps": 100}
    runs = MOSAIC | {"sharper": {"model": "mosaic-smoke", "evaluation": {"bandwidth_exponent": 0.25}}}
    recipe = small(
        "reading",
        runs,
        read=STORIES,
        asked=STORIES | {"split": "validation", "windows": "stream", "num_windows": 4},
        context_length=64,
        num_tokens=[128, 256],
        consolidated=[32],
        lora_settings=settings,
    )
    result = run(recipe)
    entries = {(one["label"], one["way"]): one for one in result["measured"]["losses"]}
    assert entries.keys() == {
        *((label, way) for label in runs for way in (reading.NOTHING, *recipe.ways)),
        ("Memory Mosaic", reading.LORA),
    }
    assert entries["Memory Mosaic", reading.LORA]["trained"] > 0
    for name, (one, other) in recipe.contrasts.items():
        difference = entries[one]["losses"][0] - entries[other]["losses"][0]
        assert result["effects"][name]["value"] == pytest.approx(difference, abs=1e-6)
    most = entries["Memory Mosaic", "256 tokens in parts read alone, merged into 32"]
    assert most["pairs"] <= 32 and 0 < most["bound"] <= 2
    model, tokenizer = recipe.trainings[0].load()
    windows, _ = reading.cut_windows(reading.load_stories(**STORIES), tokenizer, 64, "stream", 4)
    read = reading._tokens(reading.load_stories(**STORIES), tokenizer, 128)
    parts = [model.memorize(part[None], source=str(number)) for number, part in enumerate(read.view(2, 64))]
    expected = reading.window_losses(model, windows, MosaicMemory.union(parts), 3).mean()
    assert entries["Memory Mosaic", "128 tokens in parts read alone"]["losses"][0] == pytest.approx(expected, abs=1e-5)


def test_every_read_out_is_within_its_bound_in_mosaics_and_transformers(small):
    sizes = {"num_tokens": 512, "part_length": 64, "num_queries": 4, "tolerances": [0.01, 0.5], "shares": [0.1]}
    recipe = small("searching", MOSAIC | {"RoPE": ROPE}, read=STORIES, asked=STORIES, **sizes)
    measured = run(recipe)["measured"]
    assert {label: [len(one) for one in seeds] for label, seeds in measured["concentration"].items()} == {
        "Memory Mosaic": [4],
        "RoPE": [4],
    }
    for one in measured["shares"]:
        for seed in one["seeds"]:
            assert seed[searching.MARGIN] > -1e-5 and 0 < seed["mean error"] <= seed["largest error"] < 2
    for one in measured["settings"]:
        for seed in one["seeds"]:
            assert seed[searching.MARGIN] > -1e-5 and seed["largest bound"] <= one["tolerance"]
            assert 0 <= seed["share of pairs read"] <= 1 and len(seed["heads"]) == 2 * 2


def test_pairs_with_most_of_the_weight_are_counted():
    keys, bias = torch.zeros(100, 4), torch.zeros(100)
    one = searching.Queries(torch.ones(2, 4), keys, keys, bias, 1.0)
    assert searching.share_with_mass(one) == pytest.approx(0.99, abs=0.011)  # all alike
    bias[7] = 100.0
    assert searching.share_with_mass(one) == pytest.approx(0.01)


def test_queries_of_a_mosaic_are_those_that_its_answers_come_from():
    model = make_model(dtype=torch.float64)
    parts, question = make_ids(3, 9), make_ids(1, 5, seed=3)
    asked = searching.mosaic_queries(model, parts, question)
    assert asked.keys() == {(layer, head) for layer in range(2) for head in range(3)}
    for one in asked.values():
        assert one.queries.shape == (5, 8) and len(one.keys) == len(one.values) == len(one.bias) == 27
        assert (one.bias == -torch.inf).sum() == 3
    # In the first layer nothing depends on the memory.
    keys = model.memorize(question).keys[0][0]
    for head in range(3):
        torch.testing.assert_close(asked[0, head].queries[:-1], keys[head, 1:], rtol=0, atol=1e-5)
    assert model.base_model.search is None


def test_surprise_finds_what_was_planted(small):
    source = {"source": "embedded", "num_stories": 40}
    recipe = small(
        "surprise", MOSAIC | {"RoPE": ROPE}, validation=source, test=source | {"split": "validation"}, num_texts=3
    )
    result = run(recipe)
    for one in result["measured"]["models"]["Memory Mosaic"]:
        assert 0 <= one["story borders"]["error of the best unit"] <= 1
    assert list(result["measured"]["models"]["RoPE"][0]["odd words"]) == ["loss"]


def test_a_text_is_marked_where_stories_begin_and_words_are_odd(small):
    recipe = short_recipe("unused")
    tokenizer = language_modeling._make_tokenizer(recipe)
    stories = [text.replace("\n", " ") for text in surprise.load_stories(**STORIES)["text"][:3]]
    plain = surprise.marked_text(stories, 1, tokenizer, random.Random(0))
    marked = surprise.marked_text(stories, 5, tokenizer, random.Random(0))
    assert marked.is_odd.sum() == 5 and plain.is_odd.sum() == 1
    text = tokenizer.decode(marked.ids)
    assert len(text.split(" ")) == sum(len(story.split(" ")) for story in stories)
    first = [tokenizer(f" {story.split(' ')[0]}")["input_ids"][0] for story in stories[1:]]
    assert marked.ids[marked.is_border].tolist() == first
    assert surprise.area(np.array([1.0, 2, 3, 4]), np.array([False, False, True, True])) == 1
    assert surprise.area(np.array([1.0, 1, 1, 1]), np.array([False, True, True, False])) == 0.5


# Recall


def small_join(tmp_path, monkeypatch, name="join_pairs", kind="pairs"):
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    training = {"max_steps": 4, "eval_steps": 2, "save_steps": 4, "per_device_train_batch_size": 4}
    values["common"] = {
        "data": {"kind": kind, "num_rows": 16, "num_test": 4, "max_documents": 3},
        "training": training | {"disable_tqdm": True},
    }
    sizes = {"hidden_size": 16, "num_attention_heads": 2}
    values["runs"] = {label: {"model_args": sizes, **one} for label, one in values["runs"].items()}
    values |= {"seeds": [0], "workers": 1, "num_rows": 4, "claims": []}
    values |= {"num_documents": [2, 4]}
    values |= {"budgets": [2, 6], "policies": ["fifo", "usage"]} if name == "bound_recall" else {}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return load_recipe(path)


@pytest.mark.slow
def test_models_answer_behind_joined_documents_in_every_reading(tmp_path, monkeypatch):
    recipe = small_join(tmp_path, monkeypatch)
    result = run(recipe)
    for label, (one,) in result["measured"]["models"].items():
        assert list(one["readings"]) == recipe.readings(label)
        for name, measured in one["readings"].items():
            assert measured["accuracy"].keys() == measured["loss"].keys() == {"2", "4"}
            if name in (join.JOINED, join.STORED, join.ENCODED):
                assert measured[join.OF_ORDERS] < 1e-5, (label, name)
            assert measured.get(join.OF_OBJECTS, 0) < 1e-5
            assert (join.OF_OBJECTS in measured) == (name == join.JOINED)
    rows = join.draw_rows(recipe, "test")
    documents = [tuple(map(tuple, some[0].documents)) for some in rows.orders]
    assert len(set(documents)) == len(documents) == 6 and len({frozenset(one) for one in documents}) == 1
    first = recipe.trainings[0]
    model = join.load_causal_lm(first.recipe.folder / "best")
    dataset = join.RecallDataset(first.recipe.data, 4, "test", 4)
    expected = score_rows(model, [dataset.row(index) for index in range(4)], 8, Reading())["accuracy"]
    assert result["measured"]["models"]["Memory Mosaic"][0]["readings"]["joined"]["accuracy"]["4"] == expected


@pytest.mark.slow
def test_documents_leave_few_pairs(tmp_path, monkeypatch):
    recipe = small_join(tmp_path, monkeypatch, "bound_recall", kind="facts")
    result = run(recipe)
    assert len(result["measured"]["settings"]) == len(recipe.settings) == 2 * (1 + 2 * 2) + 2 * (1 + 3 * 2)
    row = bound_recall.RecallDataset(recipe.trainings[0].recipe.data, 1, "test", 3).row(0)
    readers = (bound_recall.mosaic_logits, bound_recall.transformer_logits)
    for training, logits_of in zip(recipe.trainings, readers, strict=True):
        model, (way, *_) = join.load_causal_lm(training.recipe.folder / "best"), recipe.ways(training.label)
        other = bound_recall.RecallDataset(training.recipe.data, 2, "test", 2).row(1)
        whole, behind = logits_of(model, [row, other], bound_recall.ALL, 0)
        torch.testing.assert_close(behind, logits_of(model, [other], bound_recall.ALL, 0)[0], rtol=0, atol=1e-5)
        assert whole.shape == (len(row.question), 1024)
        torch.testing.assert_close(logits_of(model, [row], way, 100)[0], whole, rtol=0, atol=1e-5)
        for way in recipe.ways(training.label):
            assert (logits_of(model, [row], way, 2)[0] - whole).abs().max() > 1e-6
            # Rows are read together as each alone.
            if way not in ("random", bound_recall.AT_RANDOM):
                _, beside = logits_of(model, [row, other], way, 2)
                torch.testing.assert_close(beside, logits_of(model, [other], way, 2)[0], rtol=0, atol=1e-5)
    places = [bound_recall._kept_places(way, 4, 9, random.Random(0)) for way in recipe.ways(training.label)]
    assert places[:2] == [{5, 6, 7, 8}, {0, 1, 7, 8}] and len(places[2]) == 4
    right = torch.nn.functional.one_hot(torch.tensor([*row.question[1:], 0]), 1024)
    assert bound_recall._num_right(right, row) == (len(row.asked), len(row.asked))
    right[row.answers.index(0) - 1] = torch.nn.functional.one_hot(torch.tensor(0), 1024) * 2
    assert bound_recall._num_right(right, row) == (len(row.asked) - 1, len(row.asked))


def test_an_interrupted_training_on_facts_ends_as_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {
        "data": {"kind": "facts", "num_rows": 24, "num_test": 4, "max_documents": 2},
        "training": {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "per_device_train_batch_size": 4},
        "model_args": {"hidden_size": 16, "num_attention_heads": 2},
    }

    def recipe(folder):
        return load_recipe(RECIPES / "recall_training.yaml", settings=[settings, {"output_dir": folder}])

    whole = symbols.run(recipe("whole"))
    stop = RuntimeError("stopped")
    with monkeypatch.context() as patch:
        patch.setattr(symbols.LANGUAGES["recall"], "report", lambda *args: (_ for _ in ()).throw(stop))
        with pytest.raises(RuntimeError, match="stopped"):
            symbols.run(recipe("parted"))
    again = symbols.run(recipe("parted"))
    assert again["metrics"] == whole["metrics"] and again["learning_curve"] == whole["learning_curve"]
    # The model is a folder with its tokenizer, of which memories can be asked.
    assert (tmp_path / "whole/best/tokenizer.json").is_file()


# The demo


def test_a_language_model_learns_facts_among_stories(tmp_path, monkeypatch):
    monkeypatch.setattr(language_modeling, "verify_export", lambda folder, prompts, **options: prompts)
    facts = ["data.facts.num_rows=40", "data.facts.num_test=6", "data.facts.max_documents=2"]
    recipe = short_recipe(tmp_path / "facts", *facts, *LONGER, "tokenizer.vocab_size=500")
    result = language_modeling.run(recipe)
    assert 0 <= result["metrics"]["answer_accuracy"] <= 1 and result["metrics"]["num_answers"] > 6
    plain = short_recipe(tmp_path / "plain")
    assert "facts" not in plain.model_dump()["data"] and "facts" in recipe.model_dump()["data"]
    with pytest.raises(ValueError, match="set `streaming` to false"):
        short_recipe(tmp_path / "streamed", *facts, *LONGER, "data.streaming=true")


def test_answers_count_as_much_as_stories(tmp_path):
    recipe = short_recipe(tmp_path / "facts", "data.facts.num_rows=4", *LONGER)
    tokenizer = language_modeling._make_tokenizer(recipe)
    model = language_modeling.build_model(recipe, tokenizer).eval()
    rows = [language_modeling.fact_rows(recipe, tokenizer, "train")[index] for index in range(2)]
    rows.append({"input_ids": list(range(20, 60))})
    batch = language_modeling.facts_collator(model.config)(rows)
    assert (batch["labels"][:2] == IGNORED).all() and (batch["answer_labels"][2] == IGNORED).all()
    assert batch["labels"][2, :40].tolist() == rows[2]["input_ids"]
    arguments = language_modeling.training_arguments(recipe)
    trainer = language_modeling.LanguageModelTrainer(model=model, args=arguments, eval_dataset=rows)
    loss = trainer.compute_loss(model, dict(batch))
    inputs = {name: part for name, part in batch.items() if not name.endswith("labels")}
    logits = model(**inputs).logits[:, :-1]
    parts = [
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[name][:, 1:].flatten(), ignore_index=IGNORED)
        for name in ("labels", "answer_labels")
    ]
    torch.testing.assert_close(loss, sum(parts))
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch), num_items_in_batch=7), sum(parts))
