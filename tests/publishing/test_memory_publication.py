# SPDX-License-Identifier: Apache-2.0
"""A memory on its way to the Hub: what was read stands on its card, and what is wrong with it is found."""

import json
import re
import shutil

import pytest
import torch
from helpers import processes
from helpers.damage import flip
from helpers.hub_server import TOKEN, Hub, Repository
from helpers.publications import COMMIT, about_memory, edit, memorize, prepare, put, stage_memory
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from modeling_memory_mosaic.files_memory_mosaic import FILE_NAME, SETTINGS_NAME
from training import hub, memories
from training.__main__ import app
from training.evaluate import load_model
from training.files import checksum
from training.memories import forget_source, memorize_files, replace_memory
from training.publishing import artifacts, checks, publish, trials, upload
from training.publishing.folder import CARD, published_files, write_sums
from training.run_folder import locked


BASE = f"someone/smoke@{COMMIT}"


@pytest.fixture
def copied(staged_memory, tmp_path):
    return shutil.copytree(staged_memory[0], tmp_path / "memory")


@pytest.fixture
def unpublished(memory, tmp_path):
    """A copy of a memory that a test may change."""
    return shutil.copytree(memory, tmp_path / "texts", ignore=shutil.ignore_patterns("published"))


def result_of(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def header_of(folder):
    with safe_open(folder / FILE_NAME, framework="pt") as file:
        return json.loads(file.metadata()[SETTINGS_NAME])


def write_again(folder, change=lambda tensors: tensors, metadata=None, **settings):
    """Write the file of a memory again, with other tensors or settings, and its size into the result."""
    content = {SETTINGS_NAME: json.dumps(header_of(folder) | settings)} if metadata is None else metadata
    save_file(change(load_file(folder / FILE_NAME)), folder / FILE_NAME, content)
    state(folder, bytes=(folder / FILE_NAME).stat().st_size)


def state(folder, **changes):
    """Change what a result says of the memory itself."""
    edit(folder, "result.json", memory=result_of(folder)["memory"] | changes)


@pytest.mark.slow
def test_a_card_says_what_was_read_by_which_model(staged_memory, memory, run):
    folder, lines = staged_memory
    assert published_files(folder) == ["README.md", "SHA256SUMS", FILE_NAME, "recall.png", "result.json"]
    result, card = result_of(folder), ModelCard.load(folder / CARD)
    for name in ("lily", "tom"):
        path = memory.with_name(f"{name}.txt")
        text = next(text for text in result["memory"]["texts"] if text["name"] == path.name)
        for row in (f"{text['tokens']} | {text['tokens'] - 1} |", f"`{checksum(path)}` |"):
            assert f"| `{path.name}` | {row}" in card.text, row
    weights = checksum(run / "model" / "model.safetensors")
    for part in (weights, header_of(folder)["fingerprint"], COMMIT, "float32", f"{result['memory']['bytes']:,}"):
        assert part in card.text
    assert "Licence of the texts: public domain." in card.text and "It knows nothing." in card.text
    metadata = card.data.to_dict()
    assert metadata["base_model"] == "someone/smoke" and metadata["library_name"] == "modeling-memory-mosaic"
    assert "pipeline_tag" not in metadata and metadata["license"] == "apache-2.0"
    assert (result["base"]["repo_id"], result["base"]["revision"]) == ("someone/smoke", COMMIT)
    log = "\n".join(lines)
    difference = re.search("ok: 2 of 2 texts, read again by the base: a number differs by at most (.+)", log)[1]
    assert float(difference) < 1e-5
    assert "ok: 2 of 2 texts, put back from their tokens, have the sha256" in log
    assert f"the loss on its texts, measured again, is {result['recall']['loss']['behind']:.4f}" in log
    assert "ok: 3 snippets of the card run" in log and "not checked" not in log


def test_no_file_holds_a_path_of_the_machine(staged_memory, memory, run):
    for name in published_files(staged_memory[0]):
        content = (staged_memory[0] / name).read_bytes()
        assert str(memory.parent).encode() not in content and str(run.parent).encode() not in content, name


def change(name, function):
    return lambda folder: write_again(folder, lambda tensors: tensors | {name: function(tensors[name])})


def other_base(**changes):
    return lambda folder: edit(folder, "result.json", base=result_of(folder)["base"] | changes)


def in_card(old, new):
    def harm(folder):
        text = (folder / CARD).read_text(encoding="utf-8")
        assert old in text
        (folder / CARD).write_text(text.replace(old, new, 1), encoding="utf-8")

    return harm


# Each change to a published memory, and the message that refuses it. Its checksums are written again afterwards.
HARM = {
    "pickle": (lambda f: torch.save({}, f / "memory.pt"), "memory.pt is a pickle"),
    "disguised-pickle": (lambda f: torch.save({}, f / FILE_NAME), f"{FILE_NAME} is not what its name says"),
    "code": (lambda f: put(f, "store_memory_mosaic.py", "print(1)"), "is no file of a published memory"),
    "model-beside-it": (
        lambda f: put(f, "config.json", {}),
        "is not a published model, adapter, data set, Space",
    ),
    "link": (lambda f: (f / "loss.png").symlink_to(f / CARD), "loss.png is a link"),
    "text-beside-tensors": (lambda f: write_again(f, metadata={"memory": "{}", "by": "x"}), "says .'by', 'memory'"),
    "deep-header": (lambda f: write_again(f, metadata={"memory": "[" * 100_000}), "nested too deeply"),
    "list-for-settings": (lambda f: write_again(f, metadata={"memory": "[]"}), "does not say of a memory"),
    "another-format": (lambda f: write_again(f, format=2), "`format`: Input should be 1"),
    "more-settings": (lambda f: write_again(f, auto_map="evil/repo--x.Y"), "`auto_map`: Extra inputs"),
    "list-of-precisions": (lambda f: write_again(f, precision=["int8"]), "`precision`"),
    "another-model": (lambda f: write_again(f, model_type="gpt2"), "`model_type`"),
    "path": (lambda f: write_again(f, sources=["/home/me/lily.txt", "tom.txt"]), "`sources.0`: String should match"),
    "path-up": (lambda f: write_again(f, sources=["../lily.txt", "tom.txt"]), "`sources.0`: String should match"),
    "markup": (lambda f: write_again(f, sources=["<img src=x>", "tom.txt"]), "`sources.0`: String should match"),
    "control": (lambda f: write_again(f, sources=["lily\x1b[2J", "tom.txt"]), "`sources.0`: String should match"),
    "one-name": (lambda f: write_again(f, sources=["tom.txt", "tom.txt"]), "names two texts alike"),
    "another-name": (lambda f: write_again(f, sources=["mia.txt", "tom.txt"]), "the texts of .* but result.json says"),
    "another-fingerprint": (lambda f: write_again(f, fingerprint="0" * 64), "the fingerprint of memory.safetensors"),
    "another-tokenizer": (lambda f: write_again(f, tokenizer="0" * 64), "the tokenizer of memory.safetensors"),
    "another-precision": (lambda f: write_again(f, precision="int8"), "the precision of memory.safetensors"),
    "many-slots": (lambda f: write_again(f, num_slots=10**12), "must be indices of"),
    "nan": (change("layers.1.values", lambda t: t.fill_(torch.nan)), "not finite"),
    "another-width": (change("layers.0.keys", lambda t: t[:, :, 1:].contiguous()), "of shape"),
    "integers": (change("layers.0.keys", lambda t: t.long()), "is torch.int64 of shape"),
    "bias": (change("layers.0.slot_bias", lambda t: t + torch.inf), "slot_bias"),
    "unknown-text": (change("source_ids", lambda t: t + 2), "beyond the 2 sources"),
    "unknown-token": (change("input_ids", lambda t: t + 10**6), "are not below 512, the tokens of its model"),
    "more-tensors": (
        lambda f: write_again(f, lambda t: t | {"evil": torch.zeros(2)}),
        "1 tensors of .* are missing or no part of it, such as 'evil'",
    ),
    "fewer-layers": (
        lambda f: write_again(f, lambda tensors: {k: t for k, t in tensors.items() if "layers.1" not in k}),
        "3 tensors of .* are missing",
    ),
    "pairs": (lambda f: state(f, pairs=3), "the pairs of memory.safetensors are"),
    "size": (lambda f: state(f, bytes=3), "the bytes of memory.safetensors are"),
    "another-task": (lambda f: edit(f, "result.json", task="language_modeling"), "`task`: Input should be 'memorize'"),
    "no-base": (lambda f: edit(f, "result.json", base=None), "result.json does not say of a memory"),
    "base-of-a-branch": (other_base(revision="main"), "`base.revision`"),
    "base-on-the-disk": (other_base(repo_id="../base"), "`base.repo_id`"),
    "base-of-a-line": (other_base(repo_id="a/b\n"), "`base.repo_id`"),
    "base-without-weights": (other_base(weights={}), "`base.weights`"),
    "layers-without-end": (
        lambda f: edit(f, "result.json", architecture=result_of(f)["architecture"] | {"num_hidden_layers": 10**9}),
        "`architecture.num_hidden_layers`",
    ),
    "files": (lambda f: edit(f, "result.json", data={"read": {"files": {}}}), "the files of memory.safetensors"),
    "other-base-in-card": (in_card("base_model: someone/smoke", "base_model: evil/x"), "`base_model` in the card is"),
    "library-in-card": (in_card("library_name: modeling-memory-mosaic", "library_name: evil"), "`library_name` in"),
    "widget-in-card": (in_card("language: en", "language: en\nwidget: [{text: x}]"), "the card has 'widget'"),
    "no-licence": (in_card("license: apache-2.0\n", ""), "states no licence"),
}


@pytest.mark.parametrize("harm", HARM)
def test_what_is_not_in_order_is_found_before_a_model_is_there(copied, monkeypatch, harm):
    do_harm, message = HARM[harm]
    do_harm(copied)
    if harm != "link":  # a link has no checksum
        write_sums(copied)
    monkeypatch.setattr(hub, "download", lambda *arguments, **options: pytest.fail("a model was fetched"))
    with pytest.raises(ValueError, match=message):
        publish.verify_published(str(copied))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "int8", "fp8"])
def test_a_memory_in_any_precision_is_what_its_model_reads(run, tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(trials, "check_snippets", lambda *arguments: "no snippet was run")
    lines = []
    folder = stage_memory(memorize(tmp_path / "texts", run / "model", dtype, a="Once upon a time."), lines=lines)
    assert "1 of 1 texts, read again by the base" in "\n".join(lines)
    assert dtype in (folder / CARD).read_text(encoding="utf-8") and header_of(folder)["precision"] == dtype


@pytest.mark.parametrize("dtype", [None, "int8", "fp8"])
def test_pairs_that_the_model_does_not_read_are_refused(run, tmp_path, dtype):
    """Each number is finite and all statements hold, but the values of two layers have changed places."""
    folder = memorize(tmp_path / "texts", run / "model", dtype, a="Once upon a time there was a red ball.")

    def exchange(tensors):
        ends = ("values", "values.scale") if dtype else ("values",)
        pairs = [(f"layers.{one}.{end}", f"layers.{1 - one}.{end}") for one in range(2) for end in ends]
        return tensors | {name: tensors[other].clone() for name, other in pairs}

    write_again(folder, exchange)
    edit(folder, "result.json", base=result_of(folder)["base"] | {"repo_id": "someone/smoke", "revision": COMMIT})
    with pytest.raises(ValueError, match=r"the pairs of 'a.txt' differ by .* more than by rounding"):
        trials.check_memory(folder, run / "model")


@pytest.mark.slow
def test_a_memory_is_verified_with_its_base(copied, staged, monkeypatch):
    """The base is fetched at the commit that the memory names, and checked before it is loaded."""
    asked, lines = [], []

    def download(*arguments, into):
        asked.append(arguments)
        return staged

    monkeypatch.setattr(hub, "download", download)
    publish.verify_published(str(copied), log=lines.append)
    assert asked == [("someone/smoke", COMMIT)] and f"its base is someone/smoke at commit {COMMIT}" in lines
    assert "byte for byte" in "\n".join(lines) and "2 of 2 texts, read again" in "\n".join(lines)
    other_base(weights={"model.safetensors": "0" * 64})(copied)
    write_sums(copied)
    with pytest.raises(ValueError, match="has other weights than result.json says"):
        publish.verify_published(str(copied), log=lines.append)


def test_what_has_changed_is_found(copied, unpublished):
    flip(copied / FILE_NAME)
    with pytest.raises(ValueError, match=f"changed since they were published, by their sha256: {FILE_NAME}"):
        checks.check_sums(copied)
    for name in (FILE_NAME, "result.json"):
        changed = shutil.copytree(unpublished, unpublished.with_name(f"changed-{name}"))
        flip(changed / name)
        with pytest.raises(ValueError, match=f"is damaged .*{name}.*`memorize` the texts again"):
            prepare(changed, about_memory(unpublished), base=BASE)


def test_a_memory_needs_a_base_a_result_and_a_description_of_its_texts(unpublished, about):
    described = about_memory(unpublished)
    for base in (None, "someone/smoke", "someone/smoke@main"):
        with pytest.raises(ValueError, match="the card has to name the model that has read it on the Hub"):
            prepare(unpublished, described, base=base)
    assert prepare(unpublished, described, base=BASE).what == "memory"
    with pytest.raises(ValueError, match="'memorize' has memory"):
        prepare(unpublished, described, base=BASE, what="model")
    digests = list(result_of(unpublished)["data"]["read"]["files"].values())
    with pytest.raises(ValueError, match=rf"read data are {digests[0]} \(lily.txt\), {digests[1]} \(tom.txt\)"):
        prepare(unpublished, about, base=BASE)
    (unpublished / "result.json").unlink()
    process = CliRunner().invoke(app, ["publish", str(unpublished), "--repo-id", "someone/texts", "--base", BASE])
    assert process.exit_code == 1 and "has no result.json: memorize the texts again" in process.stderr


def test_another_base_than_the_one_that_has_read_is_refused(unpublished, run, tmp_path, monkeypatch):
    other = shutil.copytree(run / "model", tmp_path / "model")
    weights = load_file(other / "model.safetensors")
    save_file({name: weight * 2 for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    memory = memorize(tmp_path / "memories" / "texts", other, a="Once upon a time.")
    shutil.copy(run / "model" / "model.safetensors", other)
    with pytest.raises(ValueError, match="are not those that .* was read with"):
        stage_memory(memory)

    def refuse(repo_id, revision, weights):
        assert (repo_id, revision) == ("someone/smoke", COMMIT) and list(weights) == ["model.safetensors"]
        raise ValueError("other weights")

    key = "memorize", "memory"
    monkeypatch.setitem(artifacts.ARTIFACTS, key, artifacts.ARTIFACTS[key]._replace(run_trials=lambda *arguments: []))
    monkeypatch.setattr(hub, "check_base_weights", refuse)
    monkeypatch.setattr(upload, "upload_folder", lambda *arguments: pytest.fail("it was uploaded"))
    with pytest.raises(ValueError, match="^other weights$"):
        publish.publish(unpublished, "someone/texts", "memory", about_memory(unpublished), BASE, log=lambda line: None)


@pytest.mark.parametrize("secret", ["hf_" + "a1B2" * 9, "of-no-known-form", "-----BEGIN RSA PRIVATE KEY-----"])
@pytest.mark.parametrize("place", ["text", "about"])
def test_nothing_that_holds_a_secret_is_staged(run, tmp_path, monkeypatch, place, secret):
    """A token of a text is a number in the file, where no search of bytes finds it."""
    monkeypatch.setenv("HF_TOKEN", "of-no-known-form")
    monkeypatch.setattr(trials, "check_memory", lambda *arguments: pytest.fail("it was loaded"))
    text = f"Once upon a time.\nThe key is {secret}\n" if place == "text" else "Once upon a time."
    memory = memorize(tmp_path / "texts", run / "model", a=text)
    assert secret.encode() not in (memory / FILE_NAME).read_bytes()
    about = about_memory(memory)
    if place == "about":
        about.write_text(about.read_text().replace("To be published", f"{secret} is published"), encoding="utf-8")
    found = "the text a.txt, line 2" if place == "text" else r"README.md, line \d+"
    with pytest.raises(ValueError, match=f"{found}, holds what .* looks like") as error:
        stage_memory(memory, about=about)
    assert secret not in str(error.value) and not (memory / "published" / "memory").exists()


@pytest.mark.parametrize("name", ["notes.pt", "extra"])
def test_a_pickle_or_a_link_beside_a_memory_is_refused(unpublished, name):
    path = unpublished / name
    torch.save({}, path) if name == "notes.pt" else path.symlink_to(unpublished.parent)
    with pytest.raises(ValueError, match=f"{name} is a (pickle|link)"):
        stage_memory(unpublished)


def test_a_text_that_is_forgotten_stands_nowhere(memory, run, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "check_snippets", lambda *arguments: "no snippet was run")
    folder = shutil.copytree(memory, tmp_path / "texts")
    put(folder, "notes.txt", "mine")
    about = about_memory(folder)
    stage_memory(folder, about=about)
    digest = result_of(folder)["data"]["read"]["files"]["lily.txt"]
    assert len(forget_source(run / "model", folder, "lily.txt").sources) == 1
    assert (folder / "notes.txt").read_text() == "mine" and not (folder / "published").exists()
    for path in filter(lambda path: path.is_file(), tmp_path.rglob("*")):
        assert path == about or not {b"lily", digest.encode()} & {
            part for part in (b"lily", digest.encode()) if part in path.read_bytes()
        }, path
    result = result_of(folder)
    assert [text["name"] for text in result["memory"]["texts"]] == ["tom.txt"]
    assert result["memory"]["bytes"] == (folder / FILE_NAME).stat().st_size
    staged = stage_memory(folder)
    assert (
        "lily" not in (staged / CARD).read_text(encoding="utf-8") and "from 1 text that" in (staged / CARD).read_text()
    )


def test_a_memory_of_before_is_forgotten_in_place(memory, run, tmp_path):
    """Earlier versions wrote no result, and `save_pretrained` writes none."""
    folder = tmp_path / "texts"
    folder.mkdir()
    shutil.copy(memory / FILE_NAME, folder)
    forget_source(run / "model", folder, "lily.txt")
    assert header_of(folder)["sources"] == ["tom.txt"] and [path.name for path in folder.iterdir()] == [FILE_NAME]
    with locked(folder), pytest.raises(ValueError, match="it is being published"):
        forget_source(run / "model", folder, "tom.txt")


def test_what_is_left_of_a_text_is_said_and_not_compared(unpublished, run, monkeypatch):
    monkeypatch.setattr(trials, "check_snippets", lambda *arguments: "no snippet was run")
    model, _ = load_model(run / "model")
    lines = []
    replace_memory(unpublished, lambda memory: memory.forget("tom.txt", slice(3, 8)), model)
    folder = stage_memory(unpublished, lines=lines)
    tokens, pairs = (result_of(folder)["memory"]["texts"][1][name] for name in ("tokens", "pairs"))
    assert pairs == tokens - 6 and f"| `tom.txt` | {tokens} | {pairs} |" in (folder / CARD).read_text(encoding="utf-8")
    assert "ok: 1 of 2 texts, read again by the base" in "\n".join(lines)
    assert "ok: 1 of 2 texts, put back from their tokens" in "\n".join(lines)
    replace_memory(unpublished, lambda memory: memory.consolidate(8), model)
    stage_memory(unpublished, lines=lines)
    assert "not checked: the pairs, as no text of at most 100,000 tokens is whole and not merged" in lines
    assert "not checked: the sha256 of the texts, which their tokens do not give back" in lines


def test_a_long_memory_is_read_again_in_part(staged_memory, run, monkeypatch):
    monkeypatch.setattr(trials, "MOST_READ", 30)
    assert "1 of 2 texts, read again" in trials.check_memory(staged_memory[0], run / "model")[0]
    monkeypatch.setattr(trials, "MOST_READ", 3)
    assert (
        "not checked: the pairs, as no text of at most 3 tokens"
        in trials.check_memory(staged_memory[0], run / "model")[0]
    )


def test_texts_are_named_by_paths_that_say_nothing_of_the_machine(run, tmp_path, monkeypatch):
    for name in ("a.txt", "more/a.txt", "more/b.txt"):
        put(tmp_path, name, "Once upon a time.")
    monkeypatch.chdir(tmp_path)
    files = [tmp_path / "a.txt", tmp_path / "more" / ".." / "more" / "b.txt"]
    assert memorize_files(run / "model", files, tmp_path / "one").sources == ["a.txt", "b.txt"]
    paths = [file.relative_to(tmp_path) for file in (tmp_path / "a.txt", tmp_path / "more" / "a.txt")]
    assert memorize_files(run / "model", paths, tmp_path / "two").sources == ["a.txt", "more/a.txt"]
    with pytest.raises(ValueError, match="would both be named 'a.txt': call the command in a folder that holds both"):
        memorize_files(run / "model", [tmp_path / "a.txt", tmp_path / "more" / "a.txt"], tmp_path / "three")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="c.txt is no text in UTF-8"):
        memorize_files(run / "model", [tmp_path / "c.txt"], tmp_path / "three")


def test_a_model_that_keeps_no_pairs_is_refused(run, tmp_path, monkeypatch):
    model = GPT2LMHeadModel(GPT2Config(n_embd=4, n_layer=1, n_head=1, vocab_size=512))
    monkeypatch.setattr(memories, "load_model", lambda folder: (model, load_model(run / "model")[1]))
    with pytest.raises(ValueError, match="the model is a gpt2: only Memory Mosaics memorize texts"):
        memorize(tmp_path / "texts", tmp_path, a="Once upon a time.")


@pytest.mark.slow
def test_a_memory_is_published_and_verified_by_a_stranger(memory, staged, tmp_path):
    """The base is there at a commit. The stranger has an empty cache and nothing but the address of the memory."""
    with Hub() as server:
        repository = server.repositories["model", "someone/smoke"] = Repository(private=False)
        files = {name: (staged / name).read_bytes() for name in published_files(staged) if name != CARD}
        environment = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        base = f"someone/smoke@{repository.commit('main', files)}"
        options = ["--repo-id", "someone/texts", "--about", str(about_memory(memory)), "--base", base]
        environment |= {"HF_HOME": str(tmp_path / "home")}
        process = processes.call("-m", "training", "publish", str(memory), *options, **environment)
        assert process.returncode == 0 and "uploaded: " in process.stdout, process.stderr
        assert FILE_NAME in server.repositories["model", "someone/texts"].files()
        process = processes.call("-m", "training", "publish", "someone/texts", "--verify-only", **environment)
        assert process.returncode == 0, process.stderr
        assert "2 of 2 texts, read again" in process.stdout and process.stdout.count("byte for byte") == 1
