# SPDX-License-Identifier: Apache-2.0
"""Checks: what is not in order in a published folder is found before anything of it is loaded."""

import contextlib
import shutil
import tarfile

import pytest
import torch
from helpers.publications import edit, put, stage, stories_run
from safetensors.torch import load_file, save_file

from training.publishing import checks, publish, trials
from training.publishing.folder import write_sums


OWN_CODE = (checks.PACKAGE / "modeling_memory_mosaic.py").read_text(encoding="utf-8")
FOREIGN = {"AutoModel": "evil/repo--modeling_memory_mosaic.MemoryMosaicModel"}
NESTED = {"AutoModel": "evil/repo--sub/modeling_memory_mosaic.MemoryMosaicModel"}
PIPELINE = {"impl": "extra/mod.P", "pt": ["AutoModelForCausalLM"], "type": "text"}
INDEX = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
NAN = float("nan")
# YAML that is small, and has eight to the eighth values when its aliases are written out.
LAUGHS = "a: &a [1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 8)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)


def change_tensors(folder, change=lambda tensor: tensor, more=None, without=None):
    path = folder / "model.safetensors"
    tensors = {name: change(tensor) for name, tensor in load_file(path).items() if name != without}
    save_file(tensors | (more or {}), path, {"format": "pt"})


def one_infinite(tensor):
    tensor.view(-1)[-1] = float("inf")
    return tensor


def another_version(folder):
    """The code of a version that had fewer files."""
    put(folder, "modeling_memory_mosaic.py", OWN_CODE + "\n")
    (folder / "cache_memory_mosaic.py").unlink()


def card(folder, metadata):
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n", encoding="utf-8")


# Each change to a published folder, and the message that refuses it. Its checksums are written again afterwards.
FILES = {
    "disguised-pickle": (
        lambda f: torch.save({"weights": torch.zeros(2)}, f / "model.safetensors"),
        "model.safetensors is not what its name says",
    ),
    "pickle": (lambda f: torch.save({}, f / "pytorch_model.bin"), "pytorch_model.bin is a pickle"),
    "more-code": (
        lambda f: put(f, "custom_generate/generate.py", "print(1)"),
        "generate.py is no file of a published",
    ),
    "own-code-elsewhere": (
        lambda f: put(f, "sub/modeling_memory_mosaic.py", OWN_CODE),
        "is no file of a published model",
    ),
    "script": (lambda f: put(f, "run.sh", "echo hello"), "run.sh is no file of a published model"),
    "linked-folder": (lambda f: (f / "extra").symlink_to(f.parent), "extra is a link"),
    "linked-file": (lambda f: (f / "units.png").symlink_to(f / "loss.png"), "units.png is a link"),
    "processor": (
        lambda f: put(f, "processor_config.json", {"auto_map": FOREIGN}),
        "processor_config.json is no file",
    ),
    "template": (
        lambda f: put(f, "chat_template.jinja", "{% for i in range(99) %}{% endfor %}"),
        "is no file of a pub",
    ),
    "two-kinds": (
        lambda f: put(f, "adapter_config.json", {}),
        "is not a published model, adapter, data set, Space, mem",
    ),
    "no-kind": (lambda f: (f / "config.json").unlink(), "is not a published model, adapter, data set, Space, mem"),
    "attributes": (lambda f: put(f, ".gitattributes", "* filter=evil"), ".gitattributes does more than to keep"),
    "deep-units": (lambda f: put(f, "units.json", "[" * 100_000), "units.json cannot be read as JSON"),
    "list-of-results": (lambda f: put(f, "result.json", "[]"), "result.json holds no JSON object"),
    "broken-settings": (lambda f: put(f, "config.json", "{"), "config.json cannot be read as JSON"),
    "list-of-settings": (lambda f: put(f, "tokenizer_config.json", []), "tokenizer_config.json holds no JSON object"),
    "deep": (lambda f: put(f, "config.json", "[" * 100_000), "config.json cannot be read as JSON: it is nested too"),
    "digits": (lambda f: put(f, "config.json", '{"a": ' + "9" * 6000 + "}"), "config.json cannot be read as JSON"),
    "deep-settings": (
        lambda f: put(f, "config.json", '{"model_type": "memory_mosaic", "dtype":' + "[" * 900 + "]" * 900 + "}"),
        "config.json",
    ),
    "markup-in-a-name": (
        lambda f: put(f, "<img src=x onerror=alert(1)>.png", "x"),
        "is the name of a file with signs",
    ),
    "control-in-a-name": (lambda f: put(f, "a\x1b[2J.png", "x"), "is the name of a file with signs"),
    "line-in-a-name": (lambda f: put(f, "results/a\nb.json", {}), "is the name of a file with signs"),
}
CODE = {
    "changed-code": (
        lambda f: put(f, "modeling_memory_mosaic.py", OWN_CODE + "\nprint(1)\n"),
        "differs from this project's",
    ),
    "lost-code": (lambda f: (f / "cache_memory_mosaic.py").unlink(), "lacks code .*cache_memory_mosaic.py"),
    "another-version": (another_version, "modeling_memory_mosaic.py differs .* or check the folder with the version"),
    "another-licence": (
        lambda f: put(f, "LICENSE", "All rights reserved."),
        "is not this project's, although its code",
    ),
    "no-licence": (lambda f: (f / "LICENSE").unlink(), "has code, but no LICENSE"),
    "code-of-others": (lambda f: edit(f, "config.json", auto_map=FOREIGN), "leads to 'evil/repo--model"),
    "code-of-others-nested": (lambda f: edit(f, "config.json", auto_map=NESTED), "leads to 'evil/repo--sub"),
    "no-map": (lambda f: edit(f, "config.json", auto_map=None), "leads to None"),
    "list-map": (lambda f: edit(f, "config.json", auto_map={"AutoTokenizer": [None, "x.Y"]}), "leads to .None, 'x.Y'"),
    "no-class": (
        lambda f: edit(f, "config.json", auto_map={"AutoModelForCausalLM": "modeling_memory_mosaic.torch"}),
        "has 'modeling_memory_mosaic.torch' for 'AutoModelForCausalLM', which is no class for that",
    ),
    "other-class": (
        lambda f: edit(f, "config.json", auto_map={"AutoConfig": "modeling_memory_mosaic.MemoryMosaicForCausalLM"}),
        "for 'AutoConfig', which is no class for that",
    ),
    "other-architecture": (
        lambda f: edit(f, "config.json", architectures=["GPT2LMHeadModel"]),
        "`architectures` in config.json names 'GPT2LMHeadModel'",
    ),
    "another-model": (lambda f: edit(f, "config.json", model_type="gpt2"), "holds a model of type 'gpt2'"),
    "type-of-a-list": (lambda f: edit(f, "config.json", model_type=["memory_mosaic"]), "holds a model of type"),
}
SETTINGS = {
    "pipeline": (
        lambda f: edit(f, "config.json", custom_pipelines={"text-generation": PIPELINE}),
        "`custom_pipelines` in config.json is .*leads elsewhere",
    ),
    "kernel": (
        lambda f: edit(f, "config.json", attn_implementation="evil/kernel"),
        "`attn_implementation` in config.json is 'evil/kernel'",
    ),
    "tokenizer-code": (
        lambda f: edit(f, "tokenizer_config.json", auto_map={"AutoTokenizer": "evil/repo--tok.T"}),
        "`auto_map` in tokenizer_config.json",
    ),
    "nested-setting": (
        lambda f: edit(f, "generation_config.json", more=[{"custom_generate": "evil/repo"}]),
        "`more` in generation_config.json is",
    ),
    "markup-in-a-label": (lambda f: edit(f, "config.json", id2label={"0": "<script>"}), "config.json has '<script>'"),
    "markup-in-a-key": (lambda f: edit(f, "config.json", id2label={"<b>": "a"}), "config.json has '<b>'"),
    "other-end-of-texts": (
        lambda f: edit(f, "generation_config.json", eos_token_id=[0, 10**9]),
        "`eos_token_id` in generation_config.json is .0, 1000000000., but 0 in config.json",
    ),
    "layers": (lambda f: edit(f, "config.json", num_hidden_layers=10**9), "num_hidden_layers. in config.json is 10"),
    "width": (lambda f: edit(f, "config.json", hidden_size=10**12), "hidden_size. in config.json is 10"),
    "other-width": (lambda f: edit(f, "config.json", hidden_size=64, head_dim=32), "tensors do not fit config.json"),
    "heads": (lambda f: edit(f, "config.json", num_attention_heads=-1), "describes no model that can be built"),
    "not-a-number": (lambda f: edit(f, "config.json", layer_norm_eps=float("nan")), "is nan, which is no number"),
    "repository": (
        lambda f: edit(f, "config.json", dtype="someone/repo"),
        "`dtype` in config.json names 'someone/repo'",
    ),
    "address": (lambda f: edit(f, "config.json", dtype="https://x.org"), "`dtype` in config.json names 'https:"),
    "path": (lambda f: edit(f, "config.json", dtype="../x"), "`dtype` in config.json names '../x'"),
    "endless-text": (
        lambda f: edit(f, "generation_config.json", max_new_tokens=10**12),
        "`max_new_tokens` in generation_config.json is 1000000000000: a published model leaves",
    ),
    "stop-strings": (lambda f: edit(f, "generation_config.json", stop_strings=["a"]), "`stop_strings` in generation"),
}
TOKENIZER = {
    "template-within": (
        lambda f: edit(f, "tokenizer_config.json", chat_template="{{ messages }}"),
        "`chat_template` in tokenizer_config.json",
    ),
    "templates-within": (
        lambda f: edit(f, "tokenizer_config.json", chat_template=[{"name": "default", "template": "x"}]),
        "`chat_template` in tokenizer_config.json",
    ),
    "word-that-ends": (
        lambda f: edit(f, "tokenizer_config.json", eos_token="a"),
        "'a' in tokenizer_config.json is no",
    ),
    "new-word": (
        lambda f: edit(f, "tokenizer_config.json", extra_special_tokens=["<evil>"]),
        "'<evil>' in tokenizer_config.json is no special token",
    ),
    "other-end": (lambda f: edit(f, "tokenizer_config.json", eos_token="<|pad|>"), "but the model's has the id 0"),
    "other-words": (
        lambda f: edit(f, "tokenizer_config.json", added_tokens_decoder={"0": {"content": "<evil>"}}),
        "`added_tokens_decoder` in tokenizer_config.json has 0",
    ),
    "map-of-words": (
        lambda f: put(f, "special_tokens_map.json", {"eos_token": "<evil>"}),
        "'<evil>' in special_tokens_map.json is no special token",
    ),
    "large-vocabulary": (
        lambda f: edit(f, "tokenizer.json", added_tokens=[{"id": 10**6, "content": "x", "special": True}]),
        "tokenizer.json has the id 1000000, but the model has",
    ),
    "no-vocabulary": (lambda f: edit(f, "tokenizer.json", model=[]), "tokenizer.json has no vocabulary"),
}
WEIGHTS = {
    "weights-outside": (lambda f: put(f, "model.safetensors.index.json", INDEX), "leads to '../outside.safetensors'"),
    "map-of-a-list": (lambda f: put(f, "model.safetensors.index.json", {"weight_map": ["a"]}), "has no `weight_map`"),
    "text-beside-weights": (
        lambda f: save_file(load_file(f / "model.safetensors"), f / "model.safetensors", {"format": "pt", "by": "x"}),
        "says .'by', 'format'. beside its tensors",
    ),
    "nan": (lambda f: change_tensors(f, lambda t: t * NAN), "numbers that are not finite: it predicts nothing"),
    "nan-in-half-precision": (lambda f: change_tensors(f, lambda t: t.half() * NAN), "numbers that are not finite"),
    "nan-in-bfloat16": (lambda f: change_tensors(f, lambda t: t.bfloat16() * NAN), "numbers that are not finite"),
    "one-infinite": (lambda f: change_tensors(f, one_infinite), "numbers that are not finite"),
    "integers": (lambda f: change_tensors(f, lambda t: t.long()), "is of I64: weights here are of"),
    "second-weights": (
        lambda f: shutil.copy(f / "model.safetensors", f / "model-00001-of-00002.safetensors"),
        "which ones are meant cannot be known",
    ),
    "weights-of-another-variant": (
        lambda f: shutil.copy(f / "model.safetensors", f / "model.fp16.safetensors"),
        "which ones are meant cannot be known",
    ),
    "index-beside-the-whole": (
        lambda f: put(f, "model.safetensors.index.json", {"weight_map": {"lm_head.weight": "model.safetensors"}}),
        "model.safetensors holds other tensors than model.safetensors.index.json says",
    ),
    "no-weights": (lambda f: (f / "model.safetensors").unlink(), "the weights are .., where"),
    "more-tensors": (
        lambda f: change_tensors(f, more={"evil.weight": torch.zeros(2)}),
        "do not fit config.json, such",
    ),
    "fewer-tensors": (
        lambda f: change_tensors(f, without="model.norm.weight"),
        "do not fit config.json, such as 'model.n",
    ),
}
METADATA = {
    "tag-in-the-card": (lambda f: card(f, "license: !!python/name:os.system ''"), "not YAML that can be read, line 1"),
    "laughs-in-the-card": (lambda f: card(f, f"license: mit\n{LAUGHS}"), "values when its aliases are written out"),
    "list-for-a-card": (lambda f: card(f, "- a"), "are no table of values by name"),
    "key-twice-in-the-card": (
        lambda f: card(f, "license: mit\nbase_model: evil/x\nlicense: apache-2.0"),
        "has the key 'license' twice, and readers differ",
    ),
    "key-twice-within-the-card": (lambda f: card(f, "tags: [{a: 1, a: 2}]"), "has the key 'a' twice"),
    "date-in-the-card": (lambda f: card(f, "license: 2020-99-99"), "not YAML that can be read"),
    "broken-card": (lambda f: card(f, "license: [mit"), "not YAML that can be read"),
    "numbers-in-the-card": (lambda f: card(f, "1: 2"), "are no table of values by name"),
    "list-of-licences": (lambda f: card(f, "license: [mit]"), "states no licence"),
    "gate-in-the-card": (
        lambda f: card(f, "license: mit\nextra_gated_prompt: pay"),
        "the card has 'extra_gated_prompt'",
    ),
    "widget-in-the-card": (lambda f: card(f, "license: mit\nwidget: [{text: x}]"), "the card has 'widget'"),
    "library-in-the-card": (
        lambda f: card(f, "license: mit\nlibrary_name: evil"),
        "`library_name` in the card is 'evil'",
    ),
    "secret-licence": (lambda f: card(f, "license: '<script>'"), "states no licence"),
}
HARM = FILES | CODE | SETTINGS | TOKENIZER | WEIGHTS | METADATA


@pytest.mark.parametrize("harm", HARM)
def test_what_is_not_in_order_is_found_before_anything_is_loaded(copy, monkeypatch, harm):
    change, message = HARM[harm]
    change(copy)
    with contextlib.suppress(ValueError):  # a link has no checksum
        write_sums(copy)
    monkeypatch.setattr(trials, "check_loads", lambda *arguments: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=message):
        publish.verify_published(str(copy))


def change_weights(folder):
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)


def lose_license(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(text.replace("license: apache-2.0\n", "", 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (change_weights, "changed since they were published, by their sha256: model.safetensors"),
        (lambda f: put(f, "results/more.json", {}), r"files it does not list \['results/more.json'\]"),
        (lambda f: (f / "tokenizer.json").unlink(), r"missing files \['tokenizer.json'\]"),
        (lambda f: (f / "SHA256SUMS").unlink(), "has no SHA256SUMS"),
        (lose_license, "states no licence"),
    ],
    ids=["changed", "unlisted", "missing", "no-sums", "no-licence"],
)
def test_what_has_changed_is_found(copy, harm, message):
    harm(copy)
    with pytest.raises(ValueError, match=message):
        publish.verify_published(str(copy))


def test_a_folder_of_an_earlier_version_is_refused_by_its_code(tmp_path, request):
    with tarfile.open(request.config.rootpath / "tests" / "golden" / "old_formats.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "formats" / "finished" / "published" / "model"
    with pytest.raises(ValueError, match="_memory_mosaic.py differs .* the version of this project that published it"):
        publish.verify_published(str(folder))


def test_a_folder_in_order_passes_every_check(staged):
    lines = []
    publish.verify_published(str(staged), log=lines.append)
    assert [line.split(":")[0] for line in lines[:-2]] == ["ok"] * 8 and "byte for byte" in lines[2]
    assert lines[7].startswith("ok: validation_loss measured again is ") and "(within 0.005 nats)" in lines[7]
    assert "none of this proves who wrote it" in lines[-2] and "the text of the card is not checked" in lines[-1]


def test_downloads_of_git_and_of_the_hub_are_verified_too(copy):
    put(copy, ".git/COMMIT_EDITMSG", "Publish")
    put(copy, ".gitattributes", "*.7z filter=lfs diff=lfs merge=lfs -text\n" * 3)
    put(copy, ".cache/huggingface/download/config.json.metadata", "0")
    assert len(checks.check_folder(copy)) == 6


def test_a_data_set_that_would_load_other_files_is_refused(tmp_path):
    folder = stage(stories_run(tmp_path / "stories"), "someone/stories")
    text = (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(text.replace("data_files: stories", "data_files: /tmp/other"), encoding="utf-8")
    with pytest.raises(ValueError, match="it would load something else"):
        publish.verify_published(str(folder))
