# SPDX-License-Identifier: Apache-2.0
"""Stories judged by numbers: choices among endings and names, repetition at equal entropy, and its causes."""

import functools
import json
import math

import numpy as np
import pytest
import torch
import yaml
from helpers.models import make_ids, make_model, randomize_parameters
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig

from modeling_memory_mosaic import trace_tokens
from training.baselines.shifted_rope import ShiftedGPTNeoXConfig
from training.claims import judged
from training.experiments import cloze, repetition, samples
from training.experiments.continuations import (
    continue_prompts,
    describe_texts,
    distinct,
    flags,
    following_logits,
    mean_entropy,
    repeats,
    story_beginnings,
    temperature_of_entropy,
)
from training.paths import CONFIGURATION
from training.recipe import SourceSection, load_recipe, task_module
from training.tasks import language_modeling
from training.text.cloze_items import Item, ending_items
from training.text.sources import load_stories
from training.text.story_writer import write_stories
from training.text.tokenizer import train_tokenizer


RECIPES = CONFIGURATION / "recipe"
NAMES = ["cloze", "samples", "samples_greedy", "repetition"]
STORIES = {"source": "embedded", "split": "test", "num_stories": 40}
SMALL = [
    "base=smoke",
    "seeds=[0, 1]",
    "depths=[1]",
    "workers=1",
    "common.tokens=2_048",
    "common.data.train.num_stories=40",
    "common.data.validation.num_stories=12",
    "common.training.disable_tqdm=true",
    "common.generation.prompts=[]",
]
# By the task: settings for stories and models of this size.
SHORT = {"num_prompts": 10, "prompt_tokens": 8, "new_tokens": 48, "batch_size": 4}
SETTINGS = {
    "cloze": {"num_stories": 6, "names_per_story": 2, "batch_size": 5},
    "samples": {**SHORT, "entropies": [2.0, 4.0], "decoding": {"do_sample": True, "max_new_tokens": 6}},
    "samples_greedy": {**SHORT, "decoding": {"max_new_tokens": 6}},
    "repetition": {**SHORT, "factors": [0.5, 1.0], "copied_tokens": 1},
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder whose `runs/` the tests of this file share: each small model is trained once."""
    return tmp_path_factory.mktemp("story_texts")


@pytest.fixture
def small(workplace, monkeypatch):
    """Returns a function that reads a shipped experiment, without its claims, with two models of the smoke size."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(language_modeling, "verify_export", lambda folder, prompts, **options: prompts)
    (workplace / "prompts.json").write_text(json.dumps([{"kind": "factual", "prompt": "Once upon | a time"}]))

    def read(name):
        values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
        # Replaced here, because settings would only add to them.
        values["runs"] = {"Memory Mosaic": {"model": "mosaic-smoke"}, "GPT-2": {"model": "gpt2-smoke"}}
        values["claims"], values["stories"] = [], STORIES
        values |= SETTINGS[name] | ({"prompts": "prompts.json", "prompt_set": None} if "prompts" in values else {})
        path = workplace / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return load_recipe(path, SMALL)

    return read


def neox(**settings):
    """Return a small transformer with rotary positions and random parameters."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = GPTNeoXConfig(vocab_size=61, max_position_embeddings=128, **sizes)
    return randomize_parameters(AutoModelForCausalLM.from_config(config, **settings))


def shifted(**settings):
    """Return the same with shifted keys and values."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = ShiftedGPTNeoXConfig(vocab_size=61, max_position_embeddings=128, **sizes)
    return randomize_parameters(AutoModelForCausalLM.from_config(config, **settings))


def growing():
    """Return a small mosaic whose bandwidth grows with the number of pairs."""
    return make_model(bandwidth_exponent=0.3)


def gpt2():
    """Return a small GPT-2 with random parameters."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_positions=128, n_embd=24, n_layer=2, n_head=3)
    return randomize_parameters(AutoModelForCausalLM.from_config(config))


MODELS = {"mosaic": make_model, "growing": growing, "GPT-NeoX": neox, "shifted": shifted, "GPT-2": gpt2}


# Scores


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_log_probabilities_are_those_of_each_text_read_alone(make):
    model = make()
    ids = make_ids(40).tolist()
    targets = [(ids[:5], ids[5:9]), (ids[:12], ids[12:13]), (ids[:12], [3, 4]), (ids[7:11], [1]), (ids[:5], ids[5:9])]
    expected = []
    for before, after in targets:
        logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        expected.append(-torch.nn.functional.cross_entropy(logits, torch.tensor(after), reduction="sum").item())
    for batch_size in (1, 2, 8):
        scores = cloze.log_probabilities(model, targets, batch_size)
        assert scores == pytest.approx(expected, rel=1e-4)


def test_a_text_is_not_read_again_for_its_beginnings():
    targets = [([1, 2], [3, 4]), ([1, 2, 3], [9]), ([1], [7]), ([1, 2], [5, 6]), ([8], [1])]
    rows = [(text, sorted(one.number for one in asked)) for text, asked in cloze._rows(targets)]
    assert rows == [([8], [4]), ([1, 2, 5], [3]), ([1, 2, 3], [0, 1, 2])]


def test_candidates_are_the_tokens_of_the_story_behind_an_end_of_text():
    stories = list(write_stories(60, 5))
    tokenizer = train_tokenizer(stories, 400)
    items = ending_items(stories, 5, seed=0)
    targets = cloze.item_targets(items, tokenizer, 10_000)
    for item, (before, after) in zip(items, targets[::4], strict=True):
        whole = tokenizer(item.context + item.candidates[0], add_special_tokens=False)["input_ids"]
        assert before + after == [tokenizer.eos_token_id, *whole]
    cut = cloze.item_targets(items, tokenizer, 40)
    for (before, after), (rest, same) in zip(targets, cut, strict=True):
        assert same == after and before[-len(rest) :] == rest and len(rest) + len(same) - 1 <= 40
    # All candidates of an item follow the same tokens.
    assert all(len({tuple(before) for before, _ in cut[i : i + 4]}) == 1 for i in range(0, len(cut), 4))


def test_only_a_score_above_all_others_is_right():
    assert cloze._is_first_best(np.array([1.0, 0, 0, 0, 1, 1, 0, 0, 0, 2, 0, 0]), 3).tolist() == [1, 0, 0]


# Entropy and repetition


def test_the_temperature_of_an_entropy_has_that_entropy():
    logits = 3 * torch.randn(4, 6, 50, generator=torch.Generator().manual_seed(0))
    probabilities = (logits / 1.7).softmax(-1)
    assert mean_entropy(logits, 1.7) == pytest.approx(
        torch.special.entr(probabilities).sum(-1).mean().item(), rel=1e-5
    )
    for entropy in (0.5, 2.0, 3.5):
        assert mean_entropy(logits, temperature_of_entropy(logits, entropy)) == pytest.approx(entropy, rel=2e-3)
    with pytest.raises(ValueError, match="an entropy of 4 nats: ask for another one"):
        temperature_of_entropy(logits, 4)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_logits_are_those_that_predict_the_following_tokens(make):
    model, ids = make(), make_ids(3, 20)
    logits = following_logits(model, ids[:, :8], ids[:, 8:], batch_size=2)
    assert torch.allclose(logits, model(ids).logits[:, 7:-1], atol=1e-5)


def test_continuations_have_all_their_tokens_and_are_those_of_the_model():
    model = make_model(eos_token_id=5)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] *= 20  # otherwise the model would hardly ever end its text
    prompts = make_ids(5, 4)
    written = continue_prompts(model, prompts, 12, temperature=1.0, seed=0, batch_size=2)
    assert written.shape == (5, 12) and not (written == 5).any()
    again = continue_prompts(model, prompts, 12, temperature=1.0, seed=0, batch_size=2)
    assert torch.equal(again, written)
    assert not torch.equal(continue_prompts(model, prompts, 12, temperature=1.0, seed=1, batch_size=2), written)
    ids = prompts
    for _ in range(12):
        logits = model(ids).logits[:, -1]
        logits[:, 5] = -math.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(continue_prompts(model, prompts, 12, None, seed=0, batch_size=5), ids[:, 4:])


def test_repetition_is_counted_in_words():
    assert repeats("the cat sat on a mat and the cat sat on it")
    assert not repeats("the cat sat in a mat and the cat sat on it")
    assert distinct(["a b a b", "a b c d", "a"], 2) == pytest.approx((2 / 3 + 1) / 2)
    described = describe_texts(["a b c d a b c d", "a b c d e f"])
    assert described["repeats"] == "10" and flags(described["repeats"]).tolist() == [1, 0]
    assert described["words"] == 7 and described["distinct_1"] == 0.75


def test_beginnings_and_what_follows_are_the_story():
    stories = load_stories(**STORIES)
    tokenizer = train_tokenizer(stories["text"], 400)
    prompts, following, numbers = story_beginnings(stories, tokenizer, 7, 8, 30)
    assert prompts.shape == (7, 8) and following.shape == (7, 30)
    for row, number in enumerate(numbers):
        assert prompts[row, 0] == tokenizer.eos_token_id
        text = tokenizer.decode(torch.cat([prompts[row, 1:], following[row]]))
        assert stories[number]["text"].startswith(text)
    with pytest.raises(ValueError, match="none of the 40 stories has 5030 tokens"):
        story_beginnings(stories, tokenizer, 7, 30, 5000)


# Causes of repetition


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_sharpened_scales_scores_and_puts_them_back(make):
    model, ids = make(), make_ids(2, 20)
    before = model(ids).logits
    with repetition.sharpened(model, 1.0):
        assert torch.allclose(model(ids).logits, before, atol=1e-6)
    with repetition.sharpened(model, 2.0):
        assert not torch.allclose(model(ids).logits, before, atol=1e-3)
    assert torch.equal(model(ids).logits, before)


def test_a_factor_multiplies_the_scores_of_pairs():
    model, ids = make_model(num_hidden_layers=1), make_ids(1, 12)
    weights = trace_tokens(model, ids).weights[0, 0]
    with repetition.sharpened(model, 3.0):
        sharp = trace_tokens(model, ids).weights[0, 0]
    # Of weights that are proportional to exp(score), the ratio of two is taken to the power of the factor.
    ratio, sharp_ratio = (one[:, 9, 2] / one[:, 9, 5] for one in (weights, sharp))
    assert torch.allclose(ratio**3, sharp_ratio, rtol=1e-3)
    with (
        pytest.raises(ValueError, match="a factor of 1000000000.0 makes keys longer"),
        repetition.sharpened(model, 1e9),
    ):
        pass


def test_a_factor_counts_from_the_longest_keys_that_a_memory_allows():
    model, ids = make_model(num_hidden_layers=1), make_ids(1, 12)
    memory = model.model.layers[0].contextual_memory
    with torch.no_grad():
        memory.key_scale.fill_(0.53)  # acts as 0.5
    lengths = memory.key_length()
    with repetition.sharpened(model, 1.0):
        assert torch.equal(memory.key_length(), lengths)
    with repetition.sharpened(model, 0.25):
        assert torch.allclose(memory.key_length(), lengths / 2)
    assert (memory.key_scale == 0.53).all() and ids.shape == (1, 12)


def test_places_to_copy_from_are_those_of_the_same_run():
    ids = [1, 2, 3, 1, 2, 4, 1, 2]
    assert repetition.places_to_copy_from(ids, 1) == [[], [], [], [0], [1], [], [0, 3], [1, 4]]
    assert repetition.places_to_copy_from(ids, 2) == [[], [], [], [], [1], [], [], [1, 4]]
    found = repetition.find_copying(torch.tensor([ids[:4]]), torch.tensor([ids[4:]]), 1)
    # After 1 at place 3 the 2 comes that came before; after 2 at place 4 not the 3; after 1 at place 6 again a 2.
    assert found.columns.tolist() == [0, 1, 3]
    assert found.expected == [[2], [3], [2]] and found.comes.tolist() == [1, 0, 1]
    probabilities = torch.zeros(1, 4, 10)
    probabilities[0, :, 2], probabilities[0, :, 3] = 0.7, 0.2
    assert repetition._expectations(probabilities, found) == pytest.approx([0.7, 0.2, 0.7])


def test_weights_on_copied_places_are_those_of_pairs_or_of_next_tokens():
    ids = torch.tensor([[1, 2, 3, 1, 2, 4, 1, 2], [5, 5, 6, 7, 8, 5, 9, 3]])
    prompts, following = ids.split([4, 4], dim=1)
    found = repetition.find_copying(prompts, following, 1)
    mosaic = make_model()
    mosaic.set_attn_implementation("eager")
    # A trace names the token that completes a pair: the one after the token of its key.
    traced = trace_tokens(mosaic, ids).weights
    transformers = [make(attn_implementation="eager") for make in (neox, shifted)]
    attentions = [torch.stack(one(ids, output_attentions=True).attentions) for one in transformers]
    for model, weights in ((mosaic, traced), *zip(transformers, attentions, strict=True)):
        expected = np.mean(
            [
                weights[:, row, :, 4 + column - 1, [place + 1 for place in places]].sum(-1).detach().numpy()
                for row, column, places in zip(found.rows, found.columns, found.places, strict=True)
            ],
            axis=0,
        )
        measured = repetition.copying_weights(model, prompts, following, found, batch_size=1)
        assert measured == pytest.approx(expected, abs=1e-5)
        assert measured == pytest.approx(
            repetition.copying_weights(model, prompts, following, found, batch_size=2), abs=1e-6
        )


# The experiments


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_experiments_measure_every_effect_and_a_second_call_shows_them(name, small, monkeypatch):
    recipe = small(name)
    module = task_module(recipe.task)
    result = module.run(recipe)
    assert list(result["effects"]) == recipe.effect_names
    for effect in result["effects"].values():
        assert all(math.isfinite(effect[part]) for part in ("value", "low", "high"))
    assert len(result["measured"]["models"]) == 4 * max(1, len(getattr(recipe, "entropies", [])))
    assert "Memory Mosaic, 1 block" in result["table"]
    assert len({line.count(" |") for line in result["table"].splitlines()}) == 1, (
        "a row has a cell too many or too few"
    )
    assert result["data"]["stories"]["name"] == "embedded"
    monkeypatch.setattr(language_modeling, "run", lambda *_: pytest.fail("trained again"))
    assert module.run(recipe) == result
    if name == "cloze":
        assert (recipe.folder / "cloze.md").read_text(encoding="utf-8").count("\n4. ") >= 8
    if name == "samples":
        table = (recipe.folder / "samples.md").read_text(encoding="utf-8")
        assert "Once upon \\| a time" in table and table.count("\n| ") == 3
        at = {(row["label"], row["seed"], row["entropy"]): row for row in result["measured"]["models"]}
        assert at["GPT-2", 0, 2.0]["temperature"] < at["GPT-2", 0, 4.0]["temperature"]


def test_samples_are_what_the_model_generates(small):
    recipe = small("samples_greedy")
    result = samples.run(recipe)
    model, tokenizer = recipe.trainings[0].load()
    ids = tokenizer("Once upon | a time", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :])
    shown = result["measured"]["samples"][0]["continuations"]["Memory Mosaic, 1 block"]
    assert shown == text.replace("<|endoftext|>", "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the prompts"),
        ("{", "not JSON"),
        ('["Alice was"]', "it has to hold a list such as"),
        ('[{"text": "Alice was"}]', "kind"),
        ("[]", "there is no prompt"),
        ('[{"kind": "factual", "prompt": " "}]', "an empty one"),
    ],
)
def test_prompts_of_another_form_are_refused_before_anything_is_trained(content, message, small, tmp_path):
    path = tmp_path / "prompts.json"
    if content is not None:
        path.write_text(content)
    recipe = small("samples").model_copy(update={"prompts": str(path), "output_dir": str(tmp_path / "out")})
    with pytest.raises(ValueError, match=message):
        samples.run(recipe)


def test_accuracy_of_a_model_is_that_of_its_choices(small):
    recipe = small("cloze")
    result = cloze.run(recipe)
    endings, names = cloze._items(recipe)
    model, tokenizer = recipe.trainings[0].load()

    def scores(item):
        """Yield each candidate, its number of tokens and its log-probability."""
        for candidate in item.candidates:
            # One at a time, in the window of 64 tokens.
            ((before, after),) = cloze.item_targets([Item(0, item.context, (candidate,))], tokenizer, 64)
            longest = max(len(tokenizer(text)["input_ids"]) for text in item.candidates)
            before = before[-(64 - longest + 1) :]
            logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
            yield candidate, len(after), logits.gather(1, torch.tensor(after)[:, None]).sum().item()

    alone = [item._replace(context="") for item in endings]
    measures = {
        "endings": (endings, lambda candidate, tokens: len(candidate.encode())),
        "endings, by tokens": (endings, lambda candidate, tokens: tokens),
        cloze.ALONE: (alone, lambda candidate, tokens: len(candidate.encode())),
        "names": ([named.item for named in names], lambda candidate, tokens: 1),
    }
    for measure, (items, divisor) in measures.items():
        chosen = [
            int(np.argmax([score / divisor(candidate, tokens) for candidate, tokens, score in scores(item)]) == 0)
            for item in items
        ]
        assert flags(result["measured"]["models"][0]["right"][measure]).tolist() == chosen, measure
    with pytest.raises(ValueError, match="but a model reads 2"):
        cloze.item_targets(endings, tokenizer, 2)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("repetition", ["factors=[0.5]"], "lack 1, with which the others are compared: add it"),
        ("repetition", ["new_tokens=250"], "are more than the 256 tokens of a window"),
        ("samples", ["new_tokens=250"], "are more than the 256 tokens of a window"),
        ("cloze", ["depths=[1]"], "the experiment measures no effect 'endings: Memory Mosaic - GPT-2, 4 blocks'"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(name, settings, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(RECIPES / f"{name}.yaml", settings)


def test_stories_without_items_are_refused(small, tmp_path):
    path = tmp_path / "stories.jsonl"
    path.write_text('{"text": "a cat ran."}\n')
    with pytest.raises(ValueError, match="1 stories give 0 items of endings and 0 of names"):
        cloze.run(small("cloze").model_copy(update={"stories": SourceSection(source=str(path))}))


# Verdicts


SEEDS = range(5)
# Zeros and ones of 30 texts by seed: all alike, or quite different from seed to seed.
ALL, NONE, MIXED = ["1" * 30] * 5, ["0" * 30] * 5, ["1" * 30, "0" * 30] * 2 + ["1" * 30]


@functools.cache
def shipped(name):
    """Return a shipped recipe with one seed: effects are of the seeds that were measured."""
    return load_recipe(RECIPES / f"{name}.yaml", ["seeds=[0]"])


def verdicts(name, measured):
    """Return the verdicts on the claims of a shipped recipe, by claim."""
    return {claim["claim"]: claim["verdict"] for claim in judged(shipped(name), measured)["claims"]}


def by_model(name, numbers):
    """Return an entry for each model of a recipe: `numbers(label, seed)`."""
    recipe = shipped(name)
    places = [(label, depth, seed) for depth in recipe.depths for label in recipe.runs for seed in SEEDS]
    return [
        {"label": label, "depth": depth, "seed": seed} | one
        for label, depth, seed in places
        for one in numbers(label, seed)
    ]


def cloze_measured(mosaic, others):
    def right(label, seed):
        bits = (mosaic if label == "Memory Mosaic" else others)[seed]
        return [{"right": {"endings": bits, "names": bits, cloze.ALONE: others[seed]}}]

    names = {"stories": list(range(30)), "rivals": [0, 1, 2] * 10, "right": {cloze.MOST_FREQUENT: others[0]}}
    return {"endings": {"stories": list(range(30))}, "names": names, "models": by_model("cloze", right)}


def samples_measured(mosaic, others, name="samples", entropies=(2.0, 2.5, 3.0)):
    def written(label, seed):
        bits = (mosaic if label == "Memory Mosaic" else others)[seed]
        return [{"entropy": entropy, "repeats": bits, "distinct_2": float(bits[0])} for entropy in entropies]

    stories = {"repeats": others[0], "distinct_2": float(others[0][0])}
    return {"numbers": list(range(30)), "stories": stories, "models": by_model(name, written)}


@pytest.mark.parametrize(
    ("mosaic", "within", "above"),
    [(NONE, "supported", "contradicted"), (ALL, "contradicted", "supported"), (MIXED, "undecided", "undecided")],
)
def test_each_claim_on_choices_and_samples_can_have_each_verdict(mosaic, within, above):
    measured = {
        "cloze": cloze_measured(mosaic, NONE),
        "samples": samples_measured(mosaic, NONE),
        "samples_greedy": samples_measured(mosaic, NONE, "samples_greedy", [None]),
    }
    for name, numbers in measured.items():
        expected = {claim.claim: within if claim.within is not None else above for claim in shipped(name).claims}
        assert verdicts(name, numbers) == expected


def repetition_measured(half, cost, expected, rope_expected, new):
    """Return made-up numbers: repetition and loss at factor 0.5, and by seed what the mosaic and RoPE expect."""

    def model(label, seed):
        factors = {
            f"{factor:g}": {
                "repeats": half[seed] if factor == 0.5 else ALL[seed],
                "loss": [2.0 + (cost[seed] if factor == 0.5 else 0.0)] * 30,
            }
            for factor in (0.25, 0.5, 1.0, 2.0)
        }
        is_mosaic = label == "Memory Mosaic"
        excess = (expected if is_mosaic else rope_expected)[seed]
        losses = {repetition.AFTER_OLD: [1.0] * 30, repetition.AFTER_NEW: [2.0 + (new[seed] if is_mosaic else 0)] * 30}
        expectations = {name: [0.5 + excess] * 30 for name in repetition.EXPECTED.values()}
        return [{"factors": factors, **expectations, **losses}]

    # Half of the copies come.
    copying = {"rows": list(range(30)), "comes": "01" * 15}
    places = {repetition.AFTER_OLD: [1] * 30, repetition.AFTER_NEW: [1] * 30}
    models = by_model("repetition", model)
    return {"numbers": list(range(30)), "copying": copying, "places": places, "models": models}


FLAT, RAISED, LOWERED, UNSURE = [0.0] * 5, [0.4] * 5, [-0.4] * 5, [0.5, -0.5, 0.5, -0.5, 0.0]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((NONE, FLAT, RAISED, LOWERED, FLAT), "supported"),
        ((ALL, RAISED, LOWERED, RAISED, RAISED), "contradicted"),
        ((MIXED, UNSURE, UNSURE, [-one for one in UNSURE], UNSURE), "undecided"),
    ],
)
def test_each_claim_on_the_causes_of_repetition_can_have_each_verdict(numbers, expected):
    assert set(verdicts("repetition", repetition_measured(*numbers)).values()) == {expected}
