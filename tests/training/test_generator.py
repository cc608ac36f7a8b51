# SPDX-License-Identifier: Apache-2.0
"""The generator: answers depend on the recipe alone, and a model that cannot answer is named before it is used."""

import json

import pytest
from accelerate import PartialState
from helpers.story_generators import CHAT, recipe_of, save_generator, save_material
from transformers import AutoConfig

from training.tasks import babistories
from training.text import generator as generator_module
from training.text.generator import Generator


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return save_material(tmp_path_factory.mktemp("material"))


def generator_of(recipe):
    return Generator(recipe.generator, PartialState(cpu=True))


@pytest.mark.parametrize("mosaic", [False, True], ids=["gpt2", "mosaic"])
def test_answers_do_not_depend_on_the_padding(mosaic, material, tmp_path):
    save_generator(tmp_path / "generator", mosaic=mosaic)
    more = [f"generator.model={tmp_path / 'generator'}", "generator.top_k=1"]
    recipe = recipe_of(material, tmp_path / "run", *more)
    generator = generator_of(recipe)
    prompts, beginnings = ["the dog ran . the cat ran and ran", "tree", "a big boat"], ["One day", "In a", "the"]
    together = generator.answer(prompts, beginnings, 0)
    alone = [generator.answer([p], [b], 0)[0] for p, b in zip(prompts, beginnings, strict=True)]
    assert together == alone and len(set(together)) == 3
    assert all(answer.startswith(beginning) for answer, beginning in zip(together, beginnings, strict=True))


def test_sampling_is_the_recipes_alone(material, tmp_path):
    save_generator(tmp_path / "generator")
    path = tmp_path / "generator" / "generation_config.json"
    path.write_text(json.dumps({"repetition_penalty": 9.0, "top_k": 3, "max_new_tokens": 2, "eos_token_id": [0, 5]}))
    recipe = recipe_of(material, tmp_path, f"generator.model={tmp_path / 'generator'}", "generator.temperature=0.7")
    config = generator_of(recipe).model.generation_config
    assert (config.temperature, config.top_p, config.top_k, config.max_new_tokens) == (0.7, 1.0, 0, 24)
    assert config.repetition_penalty is None or config.repetition_penalty == 1.0
    assert config.eos_token_id == [0, 5] and config.do_sample


def test_chat_template_takes_the_prompt_and_leaves_the_answer_open(material, tmp_path):
    save_generator(tmp_path / "generator", CHAT)
    recipe = recipe_of(material, tmp_path / "run", f"generator.model={tmp_path / 'generator'}")
    generator = generator_of(recipe)
    assert generator._format("Tell a story.", "One day") == "[user] Tell a story.</s>\n[assistant] One day"
    plain = generator_of(recipe_of(material, tmp_path / "run"))
    assert plain._format("Tell a story.", "One day") == "Tell a story.\n\nOne day"
    assert plain._format("One day", "One day") == "One day"
    assert babistories.run(recipe)["metrics"]["kept"] > 0


def test_generator_that_cannot_be_loaded_is_named(material, tmp_path):
    with pytest.raises(ValueError, match="nobody/nothing"):
        babistories.run(recipe_of(material, tmp_path / "run", "generator.model=nobody/nothing"))
    save_generator(tmp_path / "generator")
    (tmp_path / "generator" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot load the generator '.*generator'"):
        babistories.run(recipe_of(material, tmp_path / "half", f"generator.model={tmp_path / 'generator'}"))


def test_missing_bitsandbytes_is_reported_first(material, tmp_path, monkeypatch):
    monkeypatch.setattr(generator_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(babistories, "Generator", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        babistories.run(recipe_of(material, tmp_path / "run", "generator.quantization=4bit"))
    assert not (tmp_path / "run").exists()


def test_experts_that_would_stay_as_they_are_are_refused(material, tmp_path, monkeypatch):
    save_generator(tmp_path / "generator")
    sizes = {"vocab_size": 64, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    AutoConfig.for_model("mixtral", num_attention_heads=2, num_key_value_heads=1, **sizes).save_pretrained(
        tmp_path / "generator"
    )
    monkeypatch.setattr(generator_module.importlib.util, "find_spec", lambda name: True)
    more = [f"generator.model={tmp_path / 'generator'}", "generator.quantization=4bit"]
    monkeypatch.setattr(generator_module.AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError, match="% of the parameters of .* are stacked experts"):
        babistories.run(recipe_of(material, tmp_path / "run", *more))
